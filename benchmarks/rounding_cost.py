"""Measure the cost of stage 3W at SD3-Medium's size, on one block with random weights and inputs, 512 px, guidance.

python benchmarks/rounding_cost.py                      # needs a GPU: about 50 TFLOP per iteration of 16
python benchmarks/rounding_cost.py --hidden 192 --tokens 64 --text-tokens 154     # sd3-emoji's size, for a CPU

It prints iterations per second, the peak memory, the share of each part of an iteration, and the projected time for 24 blocks.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import mlx.core as mx
import numpy as np

from benchmarks.figures import record
from benchmarks.pass_timing import random_transformer
from calibration_store.choices import PRODUCT_PRECISIONS
from w4a8.backend.parallel import run_cpu_streams_side_by_side
from w4a8.cli import format_bytes, format_seconds, stage_command
from w4a8.model.layers import Block, model_blocks, model_layers
from w4a8.rounding.quantized_forward import PRODUCT_DTYPES, QuantizedForward
from w4a8.rounding.settings import INPUTS_FROM, TUNE_SHARE, Indices, Settings
from w4a8.rounding.training_samples import SampleBatch
from w4a8.rounding.unit_training import UnitTraining
from w4a8.rounding.units import BlockUnit

BLOCKS = 24


@stage_command
@click.option("--hidden", type=click.IntRange(min=64), default=1536, help="Width of the block, a multiple of 64.")
@click.option("--tokens", type=click.IntRange(min=1), default=1024, help="Image tokens.")
@click.option("--text-tokens", type=click.IntRange(min=1), default=154, help="Text tokens.")
@click.option("--samples", type=click.IntRange(min=8), default=64, help="Cached samples.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Samples per iteration.")
@click.option("--precision", type=click.Choice(PRODUCT_PRECISIONS), default="bfloat16", help="Of products.")
@click.option("--micro-batch", type=click.IntRange(min=1), default=16, help="Samples at once.")
@click.option("--timed", type=click.IntRange(min=1), default=10, help="Iterations that are timed, of each phase.")
def main(
    hidden: int, tokens: int, text_tokens: int, samples: int, batch_size: int, precision: str, micro_batch: int, timed: int
) -> None:  # fmt: skip
    """Measure the cost of learned rounding for one block."""
    run_cpu_streams_side_by_side()
    # The first of two blocks is measured, because the last one has no text MLP.
    mmdit = random_transformer(mx.float32, depth_multimodal=2, hidden_size_override=hidden, num_heads=hidden // 64)
    data = RandomSamples(model_blocks(mmdit)["mm0"], samples, tokens, text_tokens, hidden)
    settings = Settings(batch_size=batch_size, micro_batch=min(micro_batch, batch_size), precision=precision)
    spec = BlockUnit.specs(model_layers(mmdit), ["mm0"])[0]
    start = time.perf_counter()
    training = UnitTraining(BlockUnit.build(mmdit, spec, data, settings))
    set_up = time.perf_counter() - start
    mx.reset_peak_memory()
    seconds = {}
    for phase, iteration in (
        ("rounding", 0),
        ("with inputs", settings.inputs_from),
        ("tuning", settings.rounding_iters),
    ):
        training.iteration = iteration
        for _ in range(2):
            training.step()
        start = time.perf_counter()
        for _ in range(timed):
            training.step()
        seconds[phase] = (time.perf_counter() - start) / timed
    parts = profile(training)
    iters = settings.iters
    shares = {"rounding": INPUTS_FROM, "with inputs": 1 - TUNE_SHARE - INPUTS_FROM, "tuning": TUNE_SHARE}
    block = set_up + iters * sum(share * seconds[phase] for phase, share in shares.items())
    click.echo(f"{mx.default_device()}: hidden {hidden}, {tokens} + {text_tokens} tokens, batches of {batch_size}")
    record("stage 3W: projected time for 24 blocks", BLOCKS * block / 60, 60, "min")
    for phase, value in seconds.items():
        click.echo(f"{phase:12} {1e3 * value:7.1f} ms an iteration")
    click.echo(f"peak memory {format_bytes(mx.get_peak_memory())}, samples {format_bytes(data.num_bytes)}")
    click.echo("of a rounding iteration: " + ", ".join(f"{name} {value:.0%}" for name, value in parts.items()))
    click.echo(
        f"{iters} iterations: {format_seconds(block)} a block, {format_seconds(BLOCKS * block)} for {BLOCKS} blocks"
    )


class RandomSamples:
    """A block's cached samples (TrainingSamples): normal tokens, and the outputs of the unquantized block for them, float16."""

    def __init__(self, block: Block, count: int, tokens: int, text_tokens: int, hidden: int):
        random = np.random.default_rng(0)
        shapes = [(2, tokens, 1, hidden), (2, text_tokens, 1, hidden), (2, 1, 1, hidden)]
        self.arrays = [random.standard_normal((count, *shape), np.float32).astype(np.float16) for shape in shapes]
        self.training: Sequence[int] = range(count // 8, count)
        self.held_out: Sequence[int] = range(count // 8)
        self.all_steps: Sequence[int] = range(1)
        self.holds_velocity, self.held_bytes = False, 0
        self.on_device = [mx.array(array) for array in self.arrays]
        outputs = []
        for index in range(count):
            batch = self.batch([index])
            found = block.run(batch.tokens, batch.modulation)
            outputs.append([np.array(array.astype(mx.float16)) for array in found])
        self.arrays += [np.stack(part) for part in zip(*outputs, strict=True)]
        self.on_device = [mx.array(array) for array in self.arrays]
        mx.eval(self.on_device)

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes of all samples."""
        return sum(array.nbytes for array in self.arrays)

    def steps(self, indices: Indices) -> np.ndarray:
        """Return the step of each sample: all are of the first one."""
        return np.zeros(len(indices), np.int64)

    def batch(self, indices: Indices) -> SampleBatch:
        """Return the rows of these samples in float32."""
        picked = (array[mx.array(np.asarray(indices))] for array in self.on_device)
        found = [array.reshape(-1, *array.shape[2:]).astype(mx.float32) for array in picked]
        return SampleBatch(found[:2], found[2], found[3:])

    def keep(self, indices: Indices) -> None:
        """Do nothing, since all samples are in memory."""


def profile(training: UnitTraining) -> dict[str, float]:
    """Return the share of a rounding iteration that each part takes, each evaluated on its own."""
    unit, marks = training.unit, {}
    training.iteration = 0
    indices = np.array(unit.samples.training[: training.settings.batch_size])

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        mx.eval(found)
        marks[name] = time.perf_counter() - start
        return found

    batch = timed("reading the batch", lambda: unit.samples.batch(indices))
    quantized = unit.quantized(training.state, unit.codes(training.state, hard=False), with_ranges=False)
    weights = timed("quantizing weights", lambda: quantized.weights)
    products = PRODUCT_DTYPES[training.settings.precision]
    forward = QuantizedForward(weights, quantized.biases, products=products)
    timed("forward", lambda: unit.loss_parts(forward, batch))
    gradients = timed("forward and backward", lambda: unit.gradients(quantized, indices, 0))[1]

    def move() -> Any:
        training.round(gradients["weights"])
        return training.state

    timed("rounding variables (Adam)", move)
    others = sum(marks[name] for name in ("reading the batch", "quantizing weights", "forward"))
    marks["backward"] = max(0.0, marks.pop("forward and backward") - others)
    total = sum(marks.values())
    return {name: value / total for name, value in marks.items()}


if __name__ == "__main__":
    main()
