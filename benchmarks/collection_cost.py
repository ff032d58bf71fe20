"""What stages 2A and 2W cost beside a plain forward pass, taking turns in one process.

python benchmarks/collection_cost.py                       # the bundled model
python benchmarks/collection_cost.py --size sd3-medium     # 24 blocks, random weights, 512 px: for a GPU
"""

import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from w4a8.cli import stage_command


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
    import mlx.core as mx

    from benchmarks.pass_timing import one_pass, time_cache, time_statistics

    with one_pass(size, text_tokens) as one, tempfile.TemporaryDirectory(dir=ROOT) as folder:
        click.echo(f"{size}, {one.pipeline.activation_dtype}, {mx.default_device()}, MLX {mx.__version__}")
        plain = time_statistics(one, Path(folder), repeats, twin, size)
        time_cache(one, Path(folder), samples, plain, size)


if __name__ == "__main__":
    main()
