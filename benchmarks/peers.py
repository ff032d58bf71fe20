"""Other people's ways to 4 bits beside stage 3W's, on the same cached samples: PSNR of the same unseen captions and seeds.

    python benchmarks/peers.py --calib-dir calibration_data/demo --iters 400

Reads stages 1 and 2W (--boundaries ends or all); writes nothing. Each learned way gets the same iterations of the same batches.
Small models (the whole of them is trained at once). Biases and what is not a block's linear layer stay as they are, but for DWQ and ours.
"""

import sys
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from w4a8.cli import calib_dir_option, stage_command


@stage_command
@calib_dir_option
@click.option("--iters", type=click.IntRange(min=10), default=400, help="Iterations of the ways that learn.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, help="Samples per iteration.")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), default="64", help="Inputs that share a scale.")
@click.option("--num-images", type=click.IntRange(min=1), default=64, help="Unseen captions to draw.")
def main(calib_dir: Path, iters: int, batch_size: int, group_size: str, num_images: int) -> None:
    """Nearest, mx.quantize, AWQ, GPTQ, DWQ and stage 3W on the same data."""
    run(calib_dir, iters, batch_size, int(group_size), num_images)


def run(calib_dir: Path, iters: int, batch_size: int, group_size: int, num_images: int) -> None:
    """Quantize in every way, draw with each, print the table."""
    import mlx.core as mx

    from benchmarks.peer_methods import BITS, WAYS, drawn, input_grams
    from calibration_store.block_cache import read_cache_metadata
    from calibration_store.layout import WeightPaths
    from calibration_store.manifest import read_manifest
    from w4a8.backend.parallel import run_cpu_streams_side_by_side
    from w4a8.model.layers import model_blocks
    from w4a8.model.runs import run_schedule, run_transformer
    from w4a8.rounding.phases import jobs_of
    from w4a8.rounding.run import RoundingRun
    from w4a8.rounding.settings import Settings
    from w4a8.rounding.training_samples import Samples

    run_cpu_streams_side_by_side()
    manifest, cache = read_manifest(calib_dir), read_cache_metadata(calib_dir)
    opened, (schedule, _) = run_transformer(manifest), run_schedule(manifest)
    mmdit = opened()
    at_once = min(batch_size, 8)
    settings = Settings(iters=iters, batch_size=batch_size, weight_bits=BITS, activation_bits=0, group_size=group_size, qdrop=0.0, lr_activation_scale=5e-3, seed=0, micro_batch=at_once, activation_rule="static")
    rounding = RoundingRun(
        opened, mmdit, WeightPaths(calib_dir), cache, schedule, settings, "model", list(model_blocks(mmdit))
    )
    unit = rounding.unit_class.build(mmdit, jobs_of(rounding)[0].spec, Samples.of_cache(calib_dir, cache, mmdit, rounding.blocks), settings)
    grams, ways, seconds = input_grams(unit), {}, {}
    for name, make in WAYS.items():
        start = time.perf_counter()
        ways[name] = make(unit, grams)
        mx.eval([array for pair in ways[name].values() for array in pair if array is not None])
        seconds[name] = time.perf_counter() - start
    click.echo(f"{'':18} {'seconds':>8} {'PSNR':>8} {'worst':>7} {'FLIP':>7}")
    for name, row in drawn(manifest, ways, num_images).items():
        flip = "–" if row["flip"]["mean"] is None else f"{row['flip']['mean']:.4f}"
        click.echo(f"{name:18} {seconds[name]:8.1f} {row['psnr']['mean']:6.1f}dB {row['psnr']['worst']:7.1f} {flip:>7}")


if __name__ == "__main__":
    main()
