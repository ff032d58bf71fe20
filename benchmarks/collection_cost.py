"""Time stages 2A and 2W beside a plain forward pass, in turns in one process.

python benchmarks/collection_cost.py                       # the bundled model
python benchmarks/collection_cost.py --size sd3-medium     # 24 blocks, random weights, 512 px: for a GPU
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import click
import mlx.core as mx
import numpy as np

from benchmarks.figures import record
from benchmarks.pass_timing import compare, one_pass
from calibration_store.block_cache import write_cached_sample
from calibration_store.files import BackgroundWriter, atomic_file
from calibration_store.layout import ActivationPaths, BlockCachePaths
from w4a8.block_recording import Recording
from w4a8.cli import format_bytes, stage_command
from w4a8.model.catalog import package_versions
from w4a8.model.hooks import hooked_layers
from w4a8.passes import Pass
from w4a8.statistics.kernels import choose_statistics
from w4a8.statistics.recorders import collect_pass, write_pass

ROOT = Path(__file__).resolve().parent.parent
TIME_BOUNDS = {"cpu": 1.25, "cuda": 1.2, "metal": 1.2}  # of the statistics, by what computes them
MEMORY_BOUND = 0.25
RUN = "0" * 64  # stands for the calibration run that files name


@stage_command
@click.option("--size", type=click.Choice(["sd3-emoji", "sd3-medium"]), default="sd3-emoji", help="Which model.")
@click.option("--repeats", type=click.IntRange(min=1), default=30, help="Passes of each kind; medians are printed.")
@click.option("--text-tokens", type=click.IntRange(min=1), default=154, help="sd3-medium: 154 without T5, 589 with.")
@click.option("--samples", type=click.IntRange(min=1), default=20, help="Samples of the block cache to write.")
@click.option("--twin", is_flag=True, help="Time the plain MLX twin of the statistics, too (slow).")
def main(size: str, repeats: int, text_tokens: int, samples: int, twin: bool) -> None:
    """Time activation statistics and the block cache beside a plain forward pass."""
    with one_pass(size, text_tokens) as one, tempfile.TemporaryDirectory(dir=ROOT) as folder:
        click.echo(f"{size}, {one.pipeline.activation_dtype}, {mx.default_device()}, MLX {package_versions()['mlx']}")
        plain = time_statistics(one, Path(folder), repeats, twin, size)
        time_cache(one, Path(folder), samples, plain, size)


def time_statistics(one: Pass, folder: Path, repeats: int, twin: bool, label: str) -> float:
    """Print the costs of hooks and statistics; return the seconds of a plain pass."""

    def hooks_only() -> None:
        with hooked_layers(one.pipeline.mmdit, None):
            mx.eval(one.forward())

    def with_statistics(implementation: str) -> None:
        """Run a pass as stage 2A does, which writes its results while the next pass computes."""
        writer.submit(write_pass, ActivationPaths(folder), RUN, collect_pass(one, implementation), 0, 0, "float32")

    inputs: dict[int, mx.array] = {}
    with hooked_layers(one.pipeline.mmdit, lambda name, x: inputs.update({id(x): x})) as names:
        mx.eval(one.forward())
    count, activations = len(inputs), sum(x.nbytes for x in inputs.values())
    inputs.clear()
    implementation = choose_statistics()
    click.echo(
        f"{len(names)} linears, {count} distinct inputs, {format_bytes(activations)} of activations a pass; by {implementation}"
    )
    ways = {
        "plain": lambda: mx.eval(one.forward()),
        "hooks, nothing recorded": hooks_only,
        "statistics": lambda: with_statistics(implementation),
    }
    if twin:
        ways["statistics by the MLX twin"] = lambda: with_statistics("mlx")
    with BackgroundWriter(pending=1) as writer:
        seconds, peaks = compare(ways, repeats)
    for name in ways:
        extra, ratio = (peaks[name] - peaks["plain"]) / activations, seconds[name] / seconds["plain"]
        bounds = (TIME_BOUNDS.get(implementation), MEMORY_BOUND) if name == "statistics" else (None, None)
        record(f"stage 2A: {name} ÷ plain pass, {label}", ratio, bounds[0])
        record(f"stage 2A: extra peak memory ÷ activations, {name}, {label}", extra, bounds[1])
        click.echo(
            f"{name:28s} {seconds[name] * 1e3:8.2f} ms  {ratio:.3f} x  peak memory {extra:+.1%} of the activations"
        )
    return seconds["plain"]


def time_cache(one: Pass, folder: Path, samples: int, plain: float, label: str) -> None:
    """Print the cost of a sample of the block cache beside a plain pass and a plain write of the same bytes."""
    recording = Recording(one.pipeline.mmdit, None, ends=False)
    (arrays,) = recording.record(one)
    stored = sum(array.nbytes for array in arrays.values())
    separate = sum(arrays[key].nbytes for part in recording.keys.values() for half in part for key in half)
    content = [np.asarray(array).tobytes() for array in arrays.values()]
    writes = []
    for index in range(samples):
        start = time.perf_counter()
        with atomic_file(folder / f"plain_{index}") as file:
            for part in content:
                file.write(part)
        writes.append(time.perf_counter() - start)
    start = time.perf_counter()
    with BackgroundWriter(pending=0) as writer:
        for index in range(samples):
            writer.submit(write_cached_sample, BlockCachePaths(folder), RUN, index, 0, *recording.record(one))
    per_sample = (time.perf_counter() - start) / samples
    write = median(writes)
    if label == "sd3-emoji":
        record(f"stage 2W: a sample ÷ plain pass, {label}", per_sample / plain, 1.5)
    else:
        record(
            f"stage 2W: a sample ÷ (plain pass + 1.1 plain writes), {label}", per_sample / (plain + 1.1 * write), 1.0
        )
    record(
        f"stage 2W: bytes ÷ inputs and outputs stored apart, {label}",
        stored / separate,
        0.56 if label == "sd3-emoji" else 0.53,
    )
    click.echo(
        f"block cache: {format_bytes(stored)} a sample, {stored / separate:.3f} of inputs and outputs stored apart; "
        f"{per_sample * 1e3:.1f} ms a sample = {per_sample / plain:.2f} x plain; "
        f"plain write {write * 1e3:.1f} ms, plain pass + 1.1 writes {(plain + 1.1 * write) * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
