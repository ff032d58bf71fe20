"""What collection_cost.py times: a pass, plain and with the work of stages 2A and 2W."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median

import click
import mlx.core as mx
import numpy as np

from benchmarks.figures import record
from benchmarks.hub_cache import SD3_MEDIUM
from benchmarks.random_transformer import random_transformer
from calibration_store.block_cache import write_cached_sample
from calibration_store.files import BackgroundWriter, atomic_file
from calibration_store.layout import ActivationPaths, BlockCachePaths
from w4a8.block_recording import Boundaries
from w4a8.cli import format_bytes
from w4a8.model.catalog import default_dtype, describe_model
from w4a8.model.hooks import hooked_layers
from w4a8.model.loading import TEXT, TRANSFORMER, Pipeline, load_pipeline
from w4a8.model.modulation import modulation_cache
from w4a8.model.prompt_encoder import TextConditioning, encode_prompts
from w4a8.model.replay import Replay
from w4a8.model.sampling import initial_noise, sigma_schedule
from w4a8.passes import Pass
from w4a8.statistics.kernels import choose_statistics
from w4a8.statistics.recorders import collect_pass, write_pass

BOUNDS = {
    ("statistics", "cpu"): 1.25,
    ("statistics", "cuda"): 1.2,
    ("statistics", "metal"): 1.2,
    ("statistics", "memory"): 0.25,
}


class RandomPipeline(Pipeline):
    """SD3-Medium's transformer with random weights."""

    def read(self, part: str) -> None:
        self.mmdit = random_transformer(self.activation_dtype)

    def explained(self) -> AbstractContextManager[None]:
        return nullcontext()


@contextmanager
def one_pass(size: str, text_tokens: int, latent_size: int = 64, alone: bool = False) -> Iterator[Pass]:
    """A pass of sd3-emoji, or of SD3-Medium with random weights and inputs. alone: without the text encoders in memory."""
    dtype = default_dtype()
    if size == "sd3-emoji":
        pipeline = load_pipeline(describe_model(size), {TRANSFORMER: dtype, TEXT: dtype})
        text = encode_prompts(pipeline, ["rocket"], 4.0)
        if alone:
            pipeline.drop(TEXT)
            mx.reset_peak_memory()
        latent = initial_noise(0, (16, 16)).astype(pipeline.activation_dtype)
        timestep = sigma_schedule(pipeline, 50)[1][10]
    else:
        pipeline = RandomPipeline(describe_model(SD3_MEDIUM), {TRANSFORMER: dtype}, use_t5=False)
        shapes = ((2, text_tokens, 4096), (2, 2048), (1, latent_size, latent_size, 16))
        tokens, pooled, latent = (
            mx.random.normal(shape, key=mx.random.key(seed)).astype(pipeline.activation_dtype)
            for seed, shape in enumerate(shapes)
        )
        text, timestep = TextConditioning(tokens, pooled), mx.array(700.0).astype(pipeline.activation_dtype)
    sample = {"x": np.array(latent), "timestep": np.array(timestep)}
    with modulation_cache(pipeline, [text.pooled], timestep[None]):
        yield Pass(pipeline, 0, 0, sample, Replay(pipeline, text))


def compare(ways: dict[str, Callable[[], None]], repeats: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds, and median peak bytes above what was in use before, of each way, measured in turns."""
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


def time_statistics(one: Pass, folder: Path, repeats: int, twin: bool, label: str) -> float:
    """Print what hooks and statistics cost; returns the seconds of a plain pass."""

    def hooks_only() -> None:
        with hooked_layers(one.pipeline.mmdit, None):
            mx.eval(one.forward())

    def with_statistics(implementation: str) -> None:
        """A pass as stage 2A runs it: its results are written while the next pass computes."""
        writer.submit(write_pass, ActivationPaths(folder), collect_pass(one, implementation), 0, 0, "float32")

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


def time_cache(one: Pass, folder: Path, samples: int, plain: float, label: str) -> None:
    """Print what a sample of the block cache costs beside a plain pass and a plain write of the same bytes."""
    boundaries = Boundaries(one.pipeline.mmdit, None)
    arrays = boundaries.record(one)
    stored = sum(array.nbytes for array in arrays.values())
    separate = sum(arrays[key].nbytes for part in boundaries.keys.values() for half in part for key in half)
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
            writer.submit(write_cached_sample, BlockCachePaths(folder), index, 0, boundaries.record(one))
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
