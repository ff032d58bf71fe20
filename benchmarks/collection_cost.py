"""What stages 2A and 2W cost beside a plain forward pass, taking turns in one process.

python benchmarks/collection_cost.py                       # the bundled model
python benchmarks/collection_cost.py --size sd3-medium     # 24 blocks, random weights, 512 px: for a GPU
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.figures import record
from cli_options import format_bytes, stage_command

BOUNDS = {
    ("statistics", "cpu"): 1.25,
    ("statistics", "cuda"): 1.2,
    ("statistics", "metal"): 1.2,
    ("statistics", "memory"): 0.25,
}


def load(size: str, text_tokens: int):
    """(pipeline, conditioning, latent, timestep): sd3-emoji, or SD3-Medium with random weights and inputs."""
    import diffusion

    mx = diffusion.mx
    if size == "sd3-emoji":
        pipeline = diffusion.load_pipeline(diffusion.describe_model(size), diffusion.default_dtype())
        text = diffusion.encode_prompts(pipeline, ["rocket"], 4.0)
        latent = diffusion.initial_noise(0, (16, 16)).astype(pipeline.activation_dtype)
        timestep = diffusion.sigma_schedule(pipeline, 50)[1][10]
        return pipeline, text, latent, timestep
    from mlx.utils import tree_map

    config = diffusion.HUB_MMDIT_CONFIGS["argmaxinc/mlx-stable-diffusion-3-medium"]
    config.low_memory_mode = False
    dtype = getattr(mx, diffusion.default_dtype())
    mmdit = diffusion.MMDiT(config)
    mmdit.update(tree_map(lambda array: array.astype(dtype), mmdit.parameters()))
    mx.eval(mmdit.parameters())
    tokens = mx.random.normal((2, text_tokens, 4096), key=mx.random.key(0)).astype(dtype)
    pooled = mx.random.normal((2, 2048), key=mx.random.key(1)).astype(dtype)
    latent = mx.random.normal((1, 64, 64, 16), key=mx.random.key(2)).astype(dtype)
    timestep = mx.array(700.0).astype(dtype)
    mx.eval(tokens, pooled, latent, timestep)
    return SimpleNamespace(mmdit=mmdit), diffusion.TextConditioning(tokens, pooled), latent, timestep


def compare(ways: dict[str, Callable[[], None]], repeats: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds, and median peak bytes above what was in use before, of each way, measured in turns."""
    import mlx.core as mx

    seconds, peaks = ({name: [] for name in ways} for _ in range(2))
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            gc.collect()
            mx.synchronize()
            active = mx.get_active_memory()
            mx.reset_peak_memory()
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
            peaks[name].append(mx.get_peak_memory() - active)
    return tuple({name: median(values) for name, values in figures.items()} for figures in (seconds, peaks))


def time_statistics(pipeline, replay, sample: dict, folder: Path, repeats: int, twin: bool, label: str) -> float:
    """Print what hooks and statistics cost; returns the seconds of a plain pass."""
    import mlx.core as mx

    from calibration_store import ActivationPaths, BackgroundWriter
    from collect_layer_activations import choose_statistics, new_recorder, write_partial
    from hooks import hooked_layers

    def forward() -> mx.array:
        return replay.forward(sample["x"], sample["timestep"])

    def hooks_only() -> None:
        with hooked_layers(pipeline.mmdit, None):
            mx.eval(forward())

    def with_statistics(implementation: str) -> None:
        """A pass as stage 2A runs it: its results are written while the next pass computes."""
        recorder = new_recorder(implementation)
        with hooked_layers(pipeline.mmdit, recorder.record):
            statistics = recorder.finish(forward())
        writer.submit(write_partial, ActivationPaths(folder), statistics, 0, 0, "float32")

    inputs: dict[int, mx.array] = {}
    with hooked_layers(pipeline.mmdit, lambda name, x: inputs.update({id(x): x})) as names:
        mx.eval(forward())
    count, activations = len(inputs), sum(x.nbytes for x in inputs.values())
    inputs.clear()
    implementation = choose_statistics()
    click.echo(
        f"{len(names)} linears, {count} distinct inputs, {format_bytes(activations)} of activations a pass; by {implementation}"
    )
    ways = {
        "plain": lambda: mx.eval(forward()),
        "hooks, nothing recorded": hooks_only,
        "statistics": lambda: with_statistics(implementation),
    }
    if twin:
        ways["statistics by the MLX twin"] = lambda: with_statistics("mlx")
    with BackgroundWriter(pending=1) as writer:
        seconds, peaks = compare(ways, repeats)
    for name in ways:
        extra = (peaks[name] - peaks["plain"]) / activations
        ratio = f"{seconds[name] * 1e3:8.2f} ms  {seconds[name] / seconds['plain']:.3f} x"
        record(
            f"stage 2A: {name} ÷ plain pass, {label}",
            seconds[name] / seconds["plain"],
            BOUNDS.get((name, implementation)),
        )
        record(f"stage 2A: extra peak memory ÷ activations, {name}, {label}", extra, BOUNDS.get((name, "memory")))
        click.echo(f"{name:28s} {ratio}  peak memory {extra:+.1%} of the activations")
    return seconds["plain"]


def time_cache(pipeline, replay, sample: dict, folder: Path, samples: int, plain: float, label: str) -> None:
    """Print what a sample of the block cache costs beside a plain pass and a plain write of the same bytes."""
    import numpy as np

    from cache_adaround_data import boundary_keys, record_pass, write_sample
    from calibration_store import BackgroundWriter, BlockCachePaths, atomic_file
    from hooks import block_slots

    keys = boundary_keys(list(block_slots(pipeline.mmdit)))
    arrays = record_pass(pipeline, replay, sample, keys, list(keys), "")
    stored = sum(array.nbytes for array in arrays.values())
    separate = sum(arrays[key].nbytes for part in keys.values() for half in part for key in half)
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
            arrays = record_pass(pipeline, replay, sample, keys, list(keys), "")
            writer.submit(write_sample, BlockCachePaths(folder), index, 0, arrays)
    per_sample = (time.perf_counter() - start) / samples
    write = median(writes)
    if label == "sd3-emoji":
        record(f"stage 2W: a sample ÷ plain pass, {label}", per_sample / plain, 1.5)
    else:
        record(
            f"stage 2W: a sample ÷ (plain pass + 1.1 plain writes), {label}", per_sample / (plain + 1.1 * write), 1.0
        )
    record(f"stage 2W: bytes ÷ inputs and outputs stored apart, {label}", stored / separate, 0.53)
    click.echo(
        f"block cache: {format_bytes(stored)} a sample, {stored / separate:.3f} of inputs and outputs stored apart; "
        f"{per_sample * 1e3:.1f} ms a sample = {per_sample / plain:.2f} x plain; "
        f"plain write {write * 1e3:.1f} ms, plain pass + 1.1 writes {(plain + 1.1 * write) * 1e3:.1f} ms"
    )


@stage_command
@click.option("--size", type=click.Choice(["sd3-emoji", "sd3-medium"]), default="sd3-emoji", help="Which model.")
@click.option("--repeats", type=click.IntRange(min=3), default=30, help="Passes of each kind; medians are printed.")
@click.option(
    "--text-tokens",
    type=click.IntRange(min=1),
    default=154,
    help="Text tokens for sd3-medium: 154 without T5, 589 with.",
)
@click.option("--samples", type=click.IntRange(min=1), default=20, help="Samples of the block cache to write.")
@click.option("--twin", is_flag=True, help="Time the plain MLX twin of the statistics, too (slow).")
def main(size: str, repeats: int, text_tokens: int, samples: int, twin: bool) -> None:
    """Time activation statistics and the block cache beside a plain forward pass."""
    import diffusion

    pipeline, text, latent, timestep = load(size, text_tokens)
    click.echo(f"{size}, {latent.dtype}, {diffusion.mx.default_device()}, MLX {diffusion.mx.__version__}")
    replay, sample = diffusion.Replay(pipeline, text), {"x": latent, "timestep": timestep}
    with (
        diffusion.modulation_cache(pipeline, [text.pooled], timestep[None]),
        tempfile.TemporaryDirectory(dir=ROOT) as folder,
    ):
        plain = time_statistics(pipeline, replay, sample, Path(folder), repeats, twin, size)
        time_cache(pipeline, replay, sample, Path(folder), samples, plain, size)


if __name__ == "__main__":
    main()
