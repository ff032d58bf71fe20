"""GPTQ (Frantar et al. 2022) on the block cache, for comparison with stage 3W.

python cache_adaround_data.py --calib-dir calibration_data/demo --boundaries all --force
python benchmarks/gptq.py --calib-dir calibration_data/demo --output /tmp/gptq
python evaluate_quantization.py --calib-dir /tmp/gptq --variants w4-rtn,w4-adaround     # the second row is GPTQ

Writes --output: links to the calibration run, and adaround_weights/ in the format of stage 3W.
"""

import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from w4a8.cli import calib_dir_option, progress_bar, stage_command


@stage_command
@calib_dir_option
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to make.")
@click.option("--bits", type=click.Choice(["2", "3", "4", "5", "6", "8"]), default="4", help="Bits of a weight.")
@click.option(
    "--group-size",
    type=click.Choice(["0", "32", "64", "128"]),
    default="64",
    help="Inputs that share a scale; 0: per output channel.",
)
def main(calib_dir: Path, output: Path, bits: str, group_size: str) -> None:
    """GPTQ on the block cache, in stage 3W's format."""
    run(calib_dir, output, int(bits), int(group_size))


def run(calib_dir: Path, output: Path, bits: int, group_size: int) -> None:
    """Codes of every cached block, and what stage 4 needs beside them."""
    from benchmarks.error_feedback import gptq_layer
    from calibration_store.block_cache import read_cache_metadata
    from calibration_store.files import write_json
    from calibration_store.layout import WeightPaths
    from calibration_store.manifest import read_manifest
    from calibration_store.weights import WEIGHTS_FORMAT, write_quantized_block
    from w4a8.model.layers import model_layers
    from w4a8.model.parts import TRANSFORMER
    from w4a8.model.runs import load_run_pipeline
    from w4a8.rounding.kinds import LayerUnit
    from w4a8.rounding.settings import Settings
    from w4a8.rounding.training_samples import Samples

    cache = read_cache_metadata(calib_dir)
    blocks = cache["block_names"]
    mmdit = load_run_pipeline(read_manifest(calib_dir), {TRANSFORMER: "float32"}).mmdit
    output.mkdir(parents=True, exist_ok=True)
    for name in ("manifest.json", "activations"):
        if (calib_dir / name).exists() and not (output / name).exists():
            (output / name).symlink_to((calib_dir / name).resolve())
    settings = Settings(10, 16, bits, 0, group_size, "ste", 0.0, 0.0, 0.0, 0.0, 0)  # of a training that never begins
    paths = WeightPaths(output)
    with progress_bar(len(blocks), "blocks", "block") as bar:
        for job in LayerUnit.jobs(model_layers(mmdit), blocks):
            samples = Samples.of_stretch(calib_dir, cache, job.blocks)
            unit = LayerUnit(mmdit, job, job.parts[0], samples, settings)
            grams = unit.grams(samples.training + samples.held_out)
            layers = {
                name: gptq_layer(unit.weights[name], grams[unit.input_of[name]], bits, group_size).fields()
                for name in unit.layers
            }
            write_quantized_block(paths, job.name, layers, {})
            bar.update()
    metadata = {"format": WEIGHTS_FORMAT, "block_names": blocks, "weight_bits": bits, "activation_bits": 0}
    made_from = {key: cache[key] for key in ("calibration_run", "weights_fingerprint", "model_version")}
    made_from |= {key: cache[key] for key in ("selected_image_ids", "key_timesteps")}
    metadata |= {"group_size": group_size, "method": "GPTQ", "num_samples": len(cache["samples"])}
    write_json(paths.metadata, metadata | made_from)
    click.echo(
        f"wrote {paths.root}; now: python evaluate_quantization.py --calib-dir {output} --variants w4-rtn,w4-adaround"
    )


if __name__ == "__main__":
    main()
