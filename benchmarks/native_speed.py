"""Packed weights beside dense ones: every way to multiply them, by rows and in a whole pass; and the memory.

python benchmarks/native_speed.py                          # the bundled model, on a CPU too
python benchmarks/native_speed.py --size sd3-medium        # random weights, latents of 64 and 128: for a GPU
"""

import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from w4a8.cli import stage_command


@stage_command
@click.option("--size", type=click.Choice(["sd3-emoji", "sd3-medium"]), default="sd3-emoji", help="Which model.")
@click.option("--repeats", type=click.IntRange(min=3), default=15, help="Passes of each kind; medians are printed.")
@click.option("--rows/--no-rows", default=True, help="Also time single layers by their number of rows.")
def main(size: str, repeats: int, rows: bool) -> None:
    """Time packed weights beside dense ones."""
    import mlx.core as mx

    from benchmarks.native_timing import time_layers, time_passes

    click.echo(f"{size}, {mx.default_device()}, MLX {mx.__version__}")
    for latent in (16,) if size == "sd3-emoji" else (64, 128):
        time_passes(size, latent, repeats)
    if rows:
        time_layers(size, repeats)


if __name__ == "__main__":
    main()
