"""GPTQ (Frantar et al. 2022) on the block cache, for comparison with stage 3W.

python benchmarks/gptq.py --calib-dir calibration_data/demo --output /tmp/gptq
python evaluate_quantization.py --calib-dir /tmp/gptq --variants w4-rtn,w4-adaround     # the second row is GPTQ

Writes --output: links to the calibration run, and adaround_weights/ in the format of stage 3W.
"""

import sys
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cli_options import calib_dir_option, progress_bar, stage_command
from quantizers import searched_grid

DAMPING = 0.01  # of the mean diagonal, as in the published code


def gptq_codes(
    weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bits: int
) -> np.ndarray:
    """Codes (out, in) uint8: columns rounded in order of their activations' energy, each error spread over the rest.

    weight (out, in), gram XXᵀ (in, in), grid (out, groups).
    """
    width = weight.shape[1]
    order = np.argsort(-np.diag(gram), kind="stable")
    damped = gram[np.ix_(order, order)] + np.eye(width) * DAMPING * np.trace(gram) / width
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    remaining = weight.astype(np.float64)[:, order]
    per_column = (
        np.repeat(array.astype(np.float64), width // scale.shape[1], axis=1)[:, order] for array in (scale, zero_point)
    )
    scales, zero_points = per_column
    codes = np.empty((len(weight), width), np.uint8)
    for position, column in enumerate(order):
        s, z = scales[:, position], zero_points[:, position]
        code = np.clip(np.rint(remaining[:, position] / s + z), 0, 2**bits - 1)
        error = (remaining[:, position] - (code - z) * s) / factor[position, position]
        remaining[:, position + 1 :] -= np.outer(error, factor[position, position + 1 :])
        codes[:, column] = code
    return codes


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
    write_gptq(calib_dir, output, int(bits), int(group_size))


def write_gptq(calib_dir: Path, output: Path, bits: int, group_size: int) -> None:
    """Codes of every cached block, and what stage 4 needs beside them."""
    import optimize_adaround as stage
    from calibration_store import WEIGHTS_FORMAT, WeightPaths, read_cache_metadata, read_manifest, write_json, write_npz
    from diffusion import load_run_pipeline
    from hooks import layer_slots

    cache = read_cache_metadata(calib_dir)
    blocks = cache["block_names"]
    pipeline = load_run_pipeline(read_manifest(calib_dir), "float32")
    slots = layer_slots(pipeline.mmdit)
    output.mkdir(parents=True, exist_ok=True)
    for name in ("manifest.json", "activations"):
        if (calib_dir / name).exists() and not (output / name).exists():
            (output / name).symlink_to((calib_dir / name).resolve())
    settings = stage.Settings(10, 16, bits, 0, group_size, "ste", 0.0, 0.0, 0.0, 0.0, 0)
    paths = WeightPaths(output)
    bar = progress_bar(len(blocks), "blocks", "block")
    for job in stage.plan_jobs(list(slots), blocks, "layer"):
        samples = stage.Samples(calib_dir, job)
        unit = stage.LayerUnit(pipeline, job, job.stages[0], samples, settings)
        grams = unit.grams(samples.training + samples.held_out)
        arrays = {}
        for name in unit.layers:
            weight = np.array(unit.weights[name])
            grid = searched_grid(weight, bits, group_size)
            prefix = name.replace(".", "_")
            gram = np.array(grams[unit.input_of[name]], np.float64)
            arrays |= {f"{prefix}__q": gptq_codes(weight, gram, *grid, bits)}
            arrays |= {f"{prefix}__scale": grid[0], f"{prefix}__zero_point": grid[1]}
        write_npz(paths.block(job.name), arrays)
        bar.update()
    bar.close()
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
