"""What every stage takes of the memory, beside what its dry run says and beside a bare pass of the transformer.

python benchmarks/peak_memory.py                                        # the bundled model, on two cores
python benchmarks/peak_memory.py --size sd3-medium --latent-size 64     # random weights (4.5 GB of disk): for a GPU
python benchmarks/peak_memory.py --size sd3-medium --t5                 # with a random T5-XXL: 9.5 GB more
python benchmarks/peak_memory.py --fit                                  # the constants of w4a8/model/memory_needs.py and rounding/jobs.py

Peaks are MLX's own; resident is the process's. Runs every stage in a process of its own, small: 2 images, 2 blocks.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.figures import record
from w4a8.cli import format_bytes, stage_command

TOOK = re.compile(r"\[took\] ([\d.]+) s, (\d+) bytes MLX, (\d+) bytes resident")
SAID = re.compile(r"([\d.]+) (B|kB|MB|GB) of memory at the peak")
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
PROMISE = 1.15  # how far the peak may be from what the dry run says


def run(environment: dict[str, str], *arguments: str) -> str:
    """A stage's output and what it took; ends the benchmark when it fails."""
    command = [sys.executable, str(ROOT / "benchmarks/run_stage.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(arguments)}: {done.stderr.strip()[-400:]}")
    return done.stdout


def stages(size: str, latent: int, t5: bool, batch: int, micro_batch: int | None) -> list[tuple[str, list[str]]]:
    """(name, command) of every stage, on little."""
    first = ["--num-images", "2", "--num-steps", "2"]
    blocks, few = [], ["--num-images", "2", "--stride", "1"]
    if size == "sd3-emoji":
        first += ["--model", size]
    else:
        first += ["--latent-size", str(latent), str(latent), "--t5" if t5 else "--no-t5"]
        blocks = ["--blocks", "mm0,mm1"]
    rounding = [*blocks, "--iters", "10", "--batch-size", str(batch), "--unit", "block"]
    rounding += ["--micro-batch", str(micro_batch)] if micro_batch else []
    return [
        ("1, no images", ["generate_calibration_data.py", *first, "--no-images", "--force"]),
        ("1", ["generate_calibration_data.py", *first, "--force"]),
        ("2W", ["cache_adaround_data.py", *few, *blocks]),
        ("2A", ["collect_layer_activations.py", *few]),
        ("3A", ["analyze_activations.py"]),
        ("3W", ["optimize_adaround.py", *rounding]),
        ("4", ["evaluate_quantization.py", "--num-images", "1", "--num-steps", "2", "--variants", "w4-rtn,a8"]),
    ]


def bare_pass(environment: dict[str, str], size: str, latent: int, t5: bool) -> int:
    """MLX's peak of a forward pass with nothing but the transformer in memory."""
    text = 589 if t5 else 154
    code = (
        "import w4a8, mlx.core as mx\nfrom benchmarks.pass_timing import one_pass\n"
        f"with one_pass({size!r}, {text}, {latent}, alone=True) as one:\n"
        "    mx.eval(one.forward())\nprint(mx.get_peak_memory())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


@stage_command
@click.option("--size", type=click.Choice(["sd3-emoji", "sd3-medium"]), default="sd3-emoji", help="Which model.")
@click.option("--latent-size", type=click.IntRange(min=8), default=64, help="sd3-medium: height and width.")
@click.option("--t5/--no-t5", default=False, help="sd3-medium: with a random T5-XXL.")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, help="3W: samples of an iteration.")
@click.option("--micro-batch", type=click.IntRange(min=1), help="3W: samples at once.")
@click.option("--only", help="Comma-separated stages, such as 1,2A,3W.  [default: all]")
@click.option("--fit", is_flag=True, help="Measure what passes and iterations of several sizes take, instead.")
@click.option(
    "--hf-home", type=click.Path(path_type=Path, file_okay=False), help="A random model that is there already."
)
def main(
    size: str, latent_size: int, t5: bool, batch_size: int, micro_batch: int | None, only: str | None, fit: bool,
    hf_home: Path | None,
) -> None:  # fmt: skip
    """Peak memory of every stage, said and measured."""
    from benchmarks.memory_fit import print_fits

    if fit:
        print_fits()
        return
    with tempfile.TemporaryDirectory() as temporary:
        environment = {}
        if size == "sd3-medium":
            home = hf_home or Path(temporary) / "hf"
            if hf_home is None:
                make = [sys.executable, str(ROOT / "benchmarks/random_model.py"), "--hf-home", str(home)]
                subprocess.run([*make, *(["--t5"] if t5 else [])], check=True)
            environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        bare = bare_pass(environment, size, 16 if size == "sd3-emoji" else latent_size, t5)
        click.echo(f"{size}, latent {latent_size if size == 'sd3-medium' else 16}, T5 {'on' if t5 else 'off'}")
        click.echo(
            f"{'stage':14}{'dry run says':>14}{'MLX peak':>12}{'÷ said':>9}{'÷ bare pass':>13}{'resident':>12}{'seconds':>9}"
        )
        click.echo(f"{'bare pass':14}{'':14}{format_bytes(bare):>12}")
        for name, command in stages(size, latent_size, t5, batch_size, micro_batch):
            where = ["--calib-dir", str(Path(temporary) / "run")]
            if only is not None and name.split(",")[0] not in only.split(","):
                run(environment, *command, *where)  # what the others read
            else:
                said = SAID.search(run(environment, *command, *where, "--dry-run"))
                promised = float(said[1]) * UNITS[said[2]]
                seconds, mlx, resident = map(float, TOOK.search(run(environment, *command, *where)).groups())
                peak = mlx if name != "3A" else resident  # the analyzers compute with NumPy
                click.echo(
                    f"{name:14}{format_bytes(promised):>14}{format_bytes(peak):>12}{peak / promised:9.2f}{peak / bare:13.2f}"
                    f"{format_bytes(resident):>12}{seconds:9.1f}"
                )
                record(f"peak ÷ what the dry run says, stage {name}, {size}", peak / promised, PROMISE)


if __name__ == "__main__":
    main()
