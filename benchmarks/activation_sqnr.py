"""What the configs of stages 3A and 3A' are worth on real activations of images that the calibration never saw.

python benchmarks/activation_sqnr.py --calib-dir calibration_data/demo

Per layer, over held-out images and the calibrated steps: SQNR of A8 as quant_config.json says, beside dynamic A8
(the absolute maximum of each tensor itself); fc2 with and without shift; and the SQNR that the histograms predict.
"""

import sys
from collections import defaultdict
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from w4a8.cli import calib_dir_option, progress_bar, stage_command


@stage_command
@calib_dir_option
@click.option("--num-images", type=click.IntRange(min=1), default=4, help="Held-out images.")
def main(calib_dir: Path, num_images: int) -> None:
    """SQNR of the configs on held-out activations."""
    from benchmarks.activation_tensors import activations, every_way, held_out_images, report
    from calibration_store.configs import read_config
    from calibration_store.layout import ActivationPaths
    from calibration_store.manifest import read_manifest
    from calibration_store.statistics import read_statistics
    from w4a8.model.parts import TEXT, TRANSFORMER
    from w4a8.model.runs import load_run_pipeline

    paths, manifest = ActivationPaths(calib_dir), read_manifest(calib_dir)
    config = read_config(paths.quant_config, multitier=False)
    statistics = read_statistics(paths.statistics)
    layers = {key: statistics.read_step(key) for key in statistics.step_keys}
    migrations = config.get("outlier_config") or {}
    dtype = manifest["activation_dtype"]
    pipeline = load_run_pipeline(manifest, {TRANSFORMER: dtype, TEXT: dtype})
    power, noise = defaultdict(float), defaultdict(float)
    with progress_bar(num_images, "images", "image") as bar:
        for image in held_out_images(manifest, num_images):
            for step, tensors in activations(pipeline, manifest, image, [int(key) for key in config["per_timestep"]]):
                for name, x in tensors.items():
                    entry = config["per_timestep"][str(step)][name]
                    ways = every_way(x, entry, migrations.get(name), layers[str(step)][name])
                    power[name] += (x * x).sum()
                    for way, rebuilt in ways.items():
                        noise[way, name] += ((x - rebuilt) ** 2).sum()
            bar.update()
    report(power, noise, layers, migrations)


if __name__ == "__main__":
    main()
