"""Measure the peak memory of every stage beside what its dry run says, and beside a bare pass of the transformer.

python benchmarks/peak_memory.py                                        # the bundled model, on two cores
python benchmarks/peak_memory.py --size sd3-medium --latent-size 64     # random weights (4.5 GB of disk): for a GPU
python benchmarks/peak_memory.py --size sd3-medium --t5                 # with a random T5-XXL: 9.5 GB more
python benchmarks/peak_memory.py --fit       # the constants of w4a8/model/memory_needs.py and w4a8/rounding/iteration_bytes.py

Peaks are MLX's own; resident is the process's. Every stage runs in a process of its own, small: 2 images, 2 blocks.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import mlx.core as mx
import numpy as np

from benchmarks.figures import record
from benchmarks.pass_timing import SD3_MEDIUM, random_transformer, weight_bytes
from benchmarks.rounding_cost import RandomSamples
from tools.road import commands
from w4a8.backend import blas
from w4a8.backend.parallel import run_cpu_streams_side_by_side
from w4a8.cli import format_bytes, stage_command
from w4a8.model.diffusionkit import MMDiT
from w4a8.model.layers import model_blocks, model_layers
from w4a8.rounding.settings import STATIC_RULE, Settings
from w4a8.rounding.unit_training import UnitTraining
from w4a8.rounding.units import BlockUnit, UnitSpec

ROOT = Path(__file__).resolve().parent.parent
TOOK = re.compile(r"\[took\] ([\d.]+) s, (\d+) bytes MLX, (\d+) bytes resident")
SAID = re.compile(r"([\d.]+) (B|kB|MB|GB) of memory at the peak")
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
PROMISE = 1.15  # the largest ratio of the peak to what the dry run says
STAGES = ("1, no images", "1", "2W", "2A", "3A", "3W", "4")  # the lines of the road `memory`
TEXT = 154


@stage_command
@click.option("--size", type=click.Choice(["sd3-emoji", "sd3-medium"]), default="sd3-emoji", help="Which model.")
@click.option("--latent-size", type=click.IntRange(min=8), default=64, help="sd3-medium: height and width.")
@click.option("--t5/--no-t5", default=False, help="sd3-medium: with a random T5-XXL.")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, help="3W: samples of an iteration.")
@click.option("--micro-batch", type=click.IntRange(min=1), help="3W: samples at once.")
@click.option("--only", help="Comma-separated stages, such as 1,2A,3W.  [default: all]")
@click.option("--fit", is_flag=True, help="Measure what passes and iterations of several sizes take, instead.")
@click.option("--sizes", type=click.IntRange(min=1), help="--fit: only the first sizes, for a trial.  [default: all]")
@click.option(
    "--hf-home", type=click.Path(path_type=Path, file_okay=False), help="A random model that is there already."
)
def main(
    size: str, latent_size: int, t5: bool, batch_size: int, micro_batch: int | None, only: str | None, fit: bool,
    sizes: int | None, hf_home: Path | None,
) -> None:  # fmt: skip
    """Measure the peak memory of every stage, and compare it with what the stage's dry run says."""
    if fit:
        print_fits(sizes)
        return
    chosen = STAGES if only is None else tuple(name for name in STAGES if name.split(",")[0] in only.split(","))
    if not chosen:
        raise click.UsageError(f"--only {only}: none of {', '.join(STAGES[1:])}")
    with tempfile.TemporaryDirectory() as temporary:
        environment: dict[str, str] = {}
        values: dict[str, object] = {"model": size, "side": "", "t5": "", "blocks": ""}
        if size == "sd3-medium":
            values = {"model": SD3_MEDIUM, "side": latent_size, "t5": "--t5" if t5 else "--no-t5", "blocks": "mm0,mm1"}
            home = hf_home or Path(temporary) / "hf"
            if hf_home is None:
                make = [sys.executable, str(ROOT / "benchmarks/random_model.py"), "--hf-home", str(home)]
                subprocess.run([*make, *(["--t5"] if t5 else [])], check=True)
            environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        latent = latent_size if size == "sd3-medium" else 16
        bare = bare_pass(environment, size, latent, t5)
        click.echo(f"{size}, latent {latent}, T5 {'on' if t5 else 'off'}")
        click.echo(
            f"{'stage':14}{'dry run says':>14}{'MLX peak':>12}{'÷ said':>9}{'÷ bare pass':>13}{'resident':>12}{'seconds':>9}"
        )
        click.echo(f"{'bare pass':14}{'':14}{format_bytes(bare):>12}")
        road = commands("memory", Path(temporary) / "run", batch=batch_size, micro=micro_batch or "", **values)
        for name, command in list(zip(STAGES, road, strict=True))[: STAGES.index(chosen[-1]) + 1]:
            if name not in chosen:
                if name != STAGES[0]:  # the others read the files
                    run(environment, *command)
                continue
            amount, unit = found(SAID, run(environment, *command, "--dry-run"))
            promised = float(amount) * UNITS[unit]
            seconds, mlx, resident = map(float, found(TOOK, run(environment, *command)))
            peak = mlx if name != "3A" else resident  # the analyzers compute with NumPy
            click.echo(
                f"{name:14}{format_bytes(promised):>14}{format_bytes(peak):>12}{peak / promised:9.2f}{peak / bare:13.2f}"
                f"{format_bytes(resident):>12}{seconds:9.1f}"
            )
            record(f"peak ÷ what the dry run says, stage {name}, {size}", peak / promised, PROMISE)


def run(environment: dict[str, str], *arguments: str) -> str:
    """Run a stage, and return its output and what it took. Raises ClickException when it fails."""
    command = [sys.executable, str(ROOT / "benchmarks/run_stage.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(arguments)}: {done.stderr.strip()[-400:]}")
    return done.stdout


def found(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    """Return the groups of a pattern. Raises ClickException where the text does not have it."""
    match = pattern.search(text)
    if match is None:
        raise click.ClickException(f"no {pattern.pattern!r} in: {text[-400:]}")
    return match.groups()


def bare_pass(environment: dict[str, str], size: str, latent: int, t5: bool) -> int:
    """Return MLX's peak memory of a forward pass, with the transformer alone in memory."""
    code = (
        "import w4a8, mlx.core as mx\nfrom benchmarks.pass_timing import one_pass\n"
        f"with one_pass({size!r}, {589 if t5 else TEXT}, {latent}, alone=True) as one:\n"
        "    mx.eval(one.forward())\nprint(mx.get_peak_memory())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


# --- the constants that memory is foreseen with ---------------------------------------------------------------


def print_fits(sizes: int | None) -> None:
    """Measure passes and iterations of stage 3W at several sizes, and print the constants that fit them."""
    click.echo(f"{mx.default_device()} float32, peaks in arrays of 4 bytes")
    blas.cores = lambda: 1  # one group of rows
    fit_passes(sizes)
    fit_iterations(sizes)


def fit_passes(sizes: int | None) -> None:
    """Fit the peak of forward passes, beside the weights, in arrays of tokens and of scores."""
    arrays, peaks = [], []
    for hidden, side, rows, depth in (
        (192, 16, 2, 6), (192, 32, 2, 6), (192, 64, 2, 4), (384, 32, 2, 4), (768, 16, 2, 4), (384, 32, 8, 4),
    )[:sizes]:  # fmt: skip
        mmdit = transformer(hidden, depth)
        shapes = ((rows, side, side, 16), (rows, TEXT, 1, 4096), (rows, 2048))
        latent, text, pooled = (mx.random.normal(shape) for shape in shapes)
        timestep = mx.array([700.0])
        mmdit.cache_modulation_params(pooled, timestep)
        given = {"latent_image_embeddings": latent, "token_level_text_embeddings": text}
        mx.eval(mmdit.parameters(), given)
        for _ in range(2):
            mx.clear_cache()
            active = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(mmdit(**given, timestep=mx.broadcast_to(timestep[0], [rows])))
        peaks.append((mx.get_peak_memory() - active) / 4)
        arrays.append(elements(rows, side * side // 4 + TEXT, hidden))
    click.echo("forward pass: arrays of tokens, of scores")
    solve(arrays, peaks)


def fit_iterations(sizes: int | None) -> None:
    """Fit what a sample adds to the peak of an iteration of stage 3W."""
    run_cpu_streams_side_by_side()
    arrays, peaks = [], []
    for hidden, tokens, count in ((192, 64, 1), (192, 256, 1), (192, 1024, 1), (384, 256, 1), (192, 256, 4))[:sizes]:
        mmdit = transformer(hidden, count + 1)
        data = RandomSamples(model_blocks(mmdit)["mm0"], 8, tokens, TEXT, hidden)
        names = [f"mm{i}" for i in range(count)]
        spec = UnitSpec("unit", names, [name for name, layer in model_layers(mmdit).items() if layer.block in names])
        others = weight_bytes(mmdit)
        measured = []
        for samples in (2, 4):
            settings = Settings(batch_size=samples, activation_rule=STATIC_RULE)
            training = UnitTraining(BlockUnit.build(mmdit, spec, data, settings))
            for _ in range(3):
                training.step()
            training.iteration = settings.rounding_iters
            mx.reset_peak_memory()
            training.step()
            measured.append(mx.get_peak_memory() - others)
            weights = sum(weight.nbytes for weight in training.unit.weights.values())
            del training
            mx.clear_cache()
        each = (measured[1] - measured[0]) / 2
        click.echo(
            f"   hidden {hidden}, {tokens} tokens, {count} blocks: {each / 1e6:.1f} MB a sample, "
            f"{(measured[0] - 2 * each) / weights:.1f} x the weights"
        )
        if count == 1:
            peaks.append(each / 4)
            arrays.append(elements(2, tokens + TEXT, hidden))
    click.echo("an iteration of stage 3W, one block: arrays of tokens, of scores")
    solve(arrays, peaks)


def transformer(hidden: int, depth: int) -> MMDiT:
    """Return a random transformer of this width and number of blocks."""
    return random_transformer(mx.float32, depth_multimodal=depth, hidden_size_override=hidden, num_heads=hidden // 64)


def elements(rows: int, tokens: int, hidden: int) -> tuple[int, int]:
    """Return the number of elements of a token array, and of a block's attention scores."""
    return rows * tokens * hidden, rows * (hidden // 64) * tokens**2


def solve(arrays: Sequence[tuple[float, ...]], peaks: Sequence[float]) -> None:
    """Print the constants with the least squares of relative errors, and the ratios of foreseen to measured peaks."""
    a, b = np.array(arrays), np.array(peaks)
    constants = np.linalg.lstsq(a / b[:, None], np.ones(len(b)), rcond=None)[0]
    ratios = " ".join(f"{ratio:.2f}" for ratio in a @ constants / b)
    click.echo(f"   constants {' '.join(f'{value:.3g}' for value in constants)}   foreseen ÷ measured {ratios}")


if __name__ == "__main__":
    main()
