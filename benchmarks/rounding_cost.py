"""What stage 3W costs at SD3-Medium's size: one block with random weights and inputs, 512 px, guidance.

python benchmarks/rounding_cost.py                      # needs a GPU: about 50 TFLOP per iteration of 16
python benchmarks/rounding_cost.py --hidden 192 --tokens 64 --text-tokens 154     # sd3-emoji's size, for a CPU

Prints iterations per second, peak memory, where the time goes, and the projected time for 24 blocks.
"""

import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.figures import record
from w4a8.cli import format_bytes, format_seconds, stage_command

BLOCKS = 24


@stage_command
@click.option("--hidden", default=1536, help="Width of the block.")
@click.option("--tokens", default=1024, help="Image tokens.")
@click.option("--text-tokens", default=154, help="Text tokens.")
@click.option("--samples", default=64, help="Cached samples.")
@click.option("--batch-size", default=16, help="Samples per iteration.")
@click.option("--timed", default=10, help="Iterations that are timed, of each phase.")
def main(hidden: int, tokens: int, text_tokens: int, samples: int, batch_size: int, timed: int) -> None:
    """Cost of learned rounding for one block."""
    import mlx.core as mx

    from benchmarks.random_block import RandomSamples, profile
    from benchmarks.random_transformer import random_transformer
    from w4a8.backend.parallel import run_cpu_streams_side_by_side
    from w4a8.model.layers import model_blocks, model_layers
    from w4a8.rounding.settings import ITERS, TUNE_SHARE, Settings
    from w4a8.rounding.unit_training import UnitTraining
    from w4a8.rounding.units import BlockUnit

    run_cpu_streams_side_by_side()
    # of two blocks the first is measured: the last one has no text MLP
    mmdit = random_transformer(mx.float32, depth_multimodal=2, hidden_size_override=hidden, num_heads=hidden // 64)
    data = RandomSamples(model_blocks(mmdit)["mm0"], samples, tokens, text_tokens, hidden)
    settings = Settings(iters=1000, batch_size=batch_size, lr_alpha=3e-3, lr_activation_scale=1e-3, seed=0, activation_rule="static")
    spec = BlockUnit.specs(model_layers(mmdit), ["mm0"])[0]
    start = time.perf_counter()
    training = UnitTraining(BlockUnit.build(mmdit, spec, data, settings))
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
    parts = profile(training)
    block = set_up + ITERS * ((1 - TUNE_SHARE) * seconds["rounding"] + TUNE_SHARE * seconds["tuning"])
    click.echo(f"{mx.default_device()}: hidden {hidden}, {tokens} + {text_tokens} tokens, batches of {batch_size}")
    record("stage 3W: projected time for 24 blocks", BLOCKS * block / 60, 60, "min")
    for phase, value in seconds.items():
        click.echo(f"{phase:10} {1 / value:7.2f} iterations/s")
    click.echo(f"peak memory {format_bytes(mx.get_peak_memory())}, samples {format_bytes(data.num_bytes)}")
    click.echo("of a rounding iteration: " + ", ".join(f"{name} {value:.0%}" for name, value in parts.items()))
    click.echo(
        f"{ITERS} iterations: {format_seconds(block)} a block, {format_seconds(BLOCKS * block)} for {BLOCKS} blocks"
    )


if __name__ == "__main__":
    main()
