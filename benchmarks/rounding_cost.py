"""What stage 3W costs at SD3-Medium's size: one block with random weights and inputs, 512 px, guidance.

python benchmarks/rounding_cost.py                      # needs a GPU: about 50 TFLOP per iteration of 16
python benchmarks/rounding_cost.py --hidden 192 --tokens 64 --text-tokens 154     # sd3-emoji's size, for a CPU

Prints iterations per second, peak memory, where the time goes, and the projected time for 24 blocks.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.figures import record
from cli_options import format_bytes, format_seconds, stage_command

BLOCKS = 24


class RandomSamples:
    """Stands for a block's cached samples: normal tokens, float16."""

    def __init__(self, count: int, tokens: int, text_tokens: int, hidden: int):
        random = np.random.default_rng(0)
        shapes = [(2, tokens, 1, hidden), (2, text_tokens, 1, hidden), (2, 1, 1, hidden)]
        self.arrays = [random.standard_normal((count, *shape), np.float32).astype(np.float16) for shape in shapes]
        self.training, self.held_out = list(range(count // 8, count)), list(range(count // 8))

    def batch(self, indices):
        """As stage 3W's Samples."""
        import mlx.core as mx

        picked = (array[indices] for array in self.arrays)
        return [mx.array(array.reshape(-1, *array.shape[2:])).astype(mx.float32) for array in picked]


@stage_command
@click.option("--hidden", default=1536, help="Width of the block.")
@click.option("--tokens", default=1024, help="Image tokens.")
@click.option("--text-tokens", default=154, help="Text tokens.")
@click.option("--samples", default=64, help="Cached samples.")
@click.option("--batch-size", default=16, help="Samples per iteration.")
@click.option("--timed", default=10, help="Iterations that are timed, of each phase.")
def main(hidden: int, tokens: int, text_tokens: int, samples: int, batch_size: int, timed: int) -> None:
    """Cost of learned rounding for one block."""
    import diffusion
    import optimize_adaround as stage
    from hooks import block_slots, layer_slots

    mx = diffusion.mx
    diffusion.run_cpu_streams_side_by_side()
    config = diffusion.HUB_MMDIT_CONFIGS["argmaxinc/mlx-stable-diffusion-3-medium"]
    config.low_memory_mode, config.depth_multimodal = (
        False,
        2,
    )  # the last block has no text MLP: the first one is measured
    config.hidden_size_override, config.num_heads = hidden, hidden // 64
    mmdit = diffusion.MMDiT(config)
    mx.eval(mmdit.parameters())
    pipeline = SimpleNamespace(mmdit=mmdit)
    data = RandomSamples(samples, tokens, text_tokens, hidden)
    outputs = [[], []]
    for index in range(samples):  # what the unquantized block gives
        found = diffusion.run_block(block_slots(mmdit)["mm0"][0][0], data.batch([index])[:2], data.batch([index])[2])
        for part, array in zip(outputs, found, strict=True):
            part.append(np.array(array.astype(mx.float16)))
    data.arrays += [np.stack(part) for part in outputs]
    settings = stage.Settings(1000, batch_size, 4, 8, 64, "ste", 0.5, 3e-3, 1e-3, 0.01, 0)
    job = stage.plan_jobs(list(layer_slots(mmdit)), ["mm0"], "block")[0]
    start = time.perf_counter()
    training = stage.Training(stage.Unit(pipeline, job, job.stages[0], data, settings))
    set_up = time.perf_counter() - start
    mx.reset_peak_memory()
    seconds = {}
    for phase, iteration in (("rounding", 0), ("tuning", settings.rounding_iters)):
        training.iteration = iteration
        for _ in range(2):
            training.step()
        start = time.perf_counter()
        for _ in range(timed):
            training.step()
        seconds[phase] = (time.perf_counter() - start) / timed
    parts = profile(training, settings)
    share = stage.TUNE_SHARE
    block = set_up + stage.ITERS * ((1 - share) * seconds["rounding"] + share * seconds["tuning"])
    click.echo(
        f"{diffusion.mx.default_device()}: hidden {hidden}, {tokens} + {text_tokens} tokens, batches of {batch_size}"
    )
    record("stage 3W: projected time for 24 blocks", BLOCKS * block / 60, 60, "min")
    for phase, value in seconds.items():
        click.echo(f"{phase:10} {1 / value:7.2f} iterations/s")
    click.echo(
        f"peak memory {format_bytes(mx.get_peak_memory())}, samples {format_bytes(sum(a.nbytes for a in data.arrays))}"
    )
    click.echo("of a rounding iteration: " + ", ".join(f"{name} {value:.0%}" for name, value in parts.items()))
    click.echo(
        f"{stage.ITERS} iterations: {format_seconds(block)} a block, {format_seconds(BLOCKS * block)} for {BLOCKS} blocks"
    )


def profile(training, settings) -> dict[str, float]:
    """Share of a rounding iteration that each part takes, each evaluated on its own."""
    import mlx.core as mx

    unit, marks = training.unit, {}
    training.iteration = 0
    indices = np.array(unit.samples.training[: settings.batch_size])

    def timed(name, work):
        start = time.perf_counter()
        found = work()
        mx.eval(found)
        marks[name] = time.perf_counter() - start
        return found

    timed("reading the batch", lambda: unit.samples.batch(indices))
    codes = unit.codes(training.state, hard=False)
    quantized = unit.quantized(training.state, codes, with_ranges=False)
    timed("quantizing weights", lambda: quantized.weights)
    batch = unit.samples.batch(indices)
    timed("forward", lambda: unit.parts(quantized, batch))
    gradients = timed("forward and backward", lambda: unit.gradients(quantized, indices, 0))[1]
    timed("rounding variables (Adam)", lambda: (training.round(gradients["weights"]), training.state)[1])
    marks["backward"] = max(0.0, marks.pop("forward and backward") - marks["forward"] - marks["reading the batch"])
    total = sum(marks.values())
    return {name: value / total for name, value in marks.items()}


if __name__ == "__main__":
    main()
