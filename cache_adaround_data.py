"""Stage 2W: what every block saw and gave at the stored latents, for adaptive rounding.

Reads   manifest.json and samples/ of stage 1 (--calib-dir); the model and its precision come from the manifest.
Writes  adaround_cache/metadata.json and adaround_cache/samples/{image:04d}_{step:03d}.npz (float16, uncompressed).

    python cache_adaround_data.py --calib-dir calibration_data
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli_options import (
    Interrupted,
    calib_dir_option,
    few,
    format_bytes,
    format_seconds,
    model_place_options,
    progress_bar,
    resume_command,
    resume_options,
    stage_command,
)

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np


def boundary_keys(names: list[str]) -> dict[str, tuple[list[str], list[str]]]:
    """The NPZ keys of each block's (inputs, outputs): a block's input is its predecessor's output, stored once.

    names: all blocks of the model in order. mm0 and uni0 take what no block gives: their arguments are stored.
    """
    unified = any(name.startswith("uni") for name in names)
    last_mm = [name for name in names if name.startswith("mm")][-1]
    keys, previous = {}, None
    for name in names:
        if name.startswith("mm"):
            inputs = previous or [f"{name}__arg0", f"{name}__arg1"]
            outputs = [f"{name}__out0"] if name == last_mm and not unified else [f"{name}__out0", f"{name}__out1"]
        else:
            inputs = [f"{name}__arg0"] if name == "uni0" else previous
            outputs = [f"{name}__out0"]
        keys[name] = (inputs, outputs)
        previous = outputs
    return keys


class BlockRecorder:
    """Collects the boundaries between blocks in one pass, unevaluated; `finish` evaluates them all at once."""

    def __init__(self, keys: dict[str, tuple[list[str], list[str]]]):
        self._keys = keys
        self.boundaries: dict[str, mx.array] = {}

    def record(self, name: str, args: tuple, outputs: Any) -> None:
        input_keys, output_keys = self._keys[name]
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        for key, array in zip([*input_keys, *output_keys], [*args[: len(input_keys)], *given], strict=False):
            self.boundaries[key] = array

    def finish(self, output: "mx.array", modulation_input: "mx.array", where: str) -> dict[str, "mx.array"]:
        """One `mx.eval` for everything; float16 arrays by key. Raises StoreError that names the block when a value
        does not fit float16."""
        import mlx.core as mx

        from calibration_store import StoreError

        halves = {key: array.astype(mx.float16) for key, array in self.boundaries.items()}
        halves["modulation_input"] = modulation_input.astype(mx.float16)
        finite = mx.stack([mx.isfinite(array).all() for array in halves.values()])
        mx.eval(output, finite, halves)
        for key, fits in zip(halves, finite.tolist(), strict=True):
            if not fits:
                block = key.split("__")[0]
                raise StoreError(f"{block}: {key} does not fit float16 (above 65504 or not finite) at {where}")
        self.boundaries.clear()
        return halves


def write_sample(paths, image_id: int, step: int, arrays: dict[str, "mx.array"]) -> None:
    """Write one sample file; runs on the writer's thread while the next pass computes."""
    from calibration_store import write_npz

    write_npz(paths.sample(image_id, step), sample_file_arrays(image_id, step, arrays))


def sample_file_arrays(image_id: int, step: int, arrays: dict[str, "mx.array"]) -> dict[str, "np.ndarray"]:
    """What a sample file holds: the boundaries, and of which image and step they are."""
    import numpy as np

    where = {"image_id": np.int32(image_id), "step_index": np.int32(step)}
    return {key: np.asarray(array) for key, array in arrays.items()} | where


def record_pass(pipeline, replay, sample, keys: dict, blocks: list[str], where: str) -> dict[str, "mx.array"]:
    """One pass at a stored latent; returns the sample file's arrays."""
    from hooks import hooked_blocks

    recorder = BlockRecorder(keys)
    with hooked_blocks(pipeline.mmdit, recorder.record, blocks):
        output = replay.forward(sample["x"], sample["timestep"])
    return recorder.finish(output, replay.modulation_input(sample["timestep"]), where)


# --- the stage ----------------------------------------------------------------------------------------------


def plan_cache(
    manifest: dict, num_images: int, stride: int, blocks: str | None, before: dict[str, Any] | None
) -> tuple[dict[str, Any], list[dict]]:
    """What this cache is (plan.json), and the images that it uses; before: the plan that --resume goes on with."""
    from calibration_store import CACHE_FORMAT, run_identity, select_images, select_steps

    images = select_images(manifest, num_images, before and before["selected_image_ids"])
    image_ids = [image["image_id"] for image in images]
    return {
        "format": CACHE_FORMAT,
        "calibration_run": run_identity(manifest, image_ids),
        "num_images": num_images,
        "stride": stride,
        "blocks": ",".join(sorted(set(blocks.replace(" ", "").split(",")))) if blocks is not None else None,
        "selected_image_ids": image_ids,
        "key_timesteps": select_steps(manifest, stride),
    }, images


def choose_blocks(pipeline, blocks: str | None) -> tuple[dict[str, tuple[list[str], list[str]]], list[str]]:
    """The keys of all blocks of the model, and the names of those to cache."""
    from hooks import block_slots

    names = list(block_slots(pipeline.mmdit))
    chosen = [name.strip() for name in blocks.split(",")] if blocks is not None else names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise click.UsageError(
            f"--blocks: no block {', '.join(map(repr, unknown))}; the model has {names[0]} to {names[-1]}"
        )
    return boundary_keys(names), [name for name in names if name in chosen]


def stored_keys(keys: dict, blocks: list[str]) -> list[str]:
    """Keys of a sample file, each boundary once."""
    return [*dict.fromkeys(key for block in blocks for part in keys[block] for key in part), "modulation_input"]


def cache(
    pipeline, paths, manifest: dict, images: list[dict], keys: dict, blocks: list[str], todo: dict[int, list[int]], bar
) -> None:
    """Run the model at every sample of todo {image_id: steps}; a thread writes while the next pass runs."""
    from calibration_store import BackgroundWriter, CalibrationPaths, read_sample
    from diffusion import replaying, run_schedule

    schedule, calibration = run_schedule(manifest), CalibrationPaths(paths.calib_dir)
    with bar, BackgroundWriter(pending=0) as writer:  # one sample being written, one being made
        for image in images:
            image_id = image["image_id"]
            steps = todo[image_id]
            if not steps:
                continue
            samples = [read_sample(calibration, manifest, image_id, step, schedule) for step in steps]
            with replaying(pipeline, image, [sample["timestep"] for sample in samples]) as replay:
                for step, sample in zip(steps, samples, strict=True):
                    arrays = record_pass(pipeline, replay, sample, keys, blocks, f"step {step} of image {image_id}")
                    writer.submit(write_sample, paths, image_id, step, arrays)
                    bar.update()


def samples_to_do(paths, plan: dict, shapes: dict, everything: bool) -> dict[int, list[int]]:
    """{image_id: steps} of the samples that are not on the disk, whole (checksums included) and of this model's shapes."""
    from calibration_store import is_cached

    return {
        image_id: [s for s in plan["key_timesteps"] if everything or not is_cached(paths, image_id, s, shapes)]
        for image_id in plan["selected_image_ids"]
    }


def write_metadata(paths, manifest: dict, plan: dict, keys: dict, blocks: list[str], of_key: dict) -> None:
    """Describe the finished cache; written last, so a cache with metadata.json is complete."""
    from calibration_store import write_json

    samples = [
        {"image_id": image_id, "step_index": step, "file": str(paths.sample(image_id, step).relative_to(paths.root))}
        for image_id in plan["selected_image_ids"]
        for step in plan["key_timesteps"]
    ]

    def shapes(names: list[str]) -> list[list[int]]:
        return [list(of_key[name]) for name in names]

    block_shapes = {
        block: {
            "input_keys": keys[block][0],
            "input_shapes": shapes(keys[block][0]),
            "output_keys": keys[block][1],
            "output_shapes": shapes(keys[block][1]),
        }
        for block in blocks
    }
    metadata = {
        **plan,
        "block_names": blocks,
        "block_shapes": block_shapes,
        "samples": samples,
        "cfg_weight": manifest["cfg_scale"],
        "num_steps": manifest["num_steps"],
        "model_version": manifest["model_version"],
        "weights_fingerprint": manifest["weights_fingerprint"],
        "dtype": "float16",
    }
    write_json(paths.metadata, metadata)


def probe(
    pipeline, paths, manifest: dict, plan: dict, image: dict, keys: dict, blocks: list[str]
) -> tuple[float, int, dict[str, tuple[int, ...]]]:
    """Seconds of one pass (the second of two), the bytes of its sample file, and the shape of every array in it."""
    from calibration_store import CalibrationPaths, npz_bytes, read_sample
    from diffusion import replaying, run_schedule

    step = plan["key_timesteps"][0]
    sample = read_sample(CalibrationPaths(paths.calib_dir), manifest, image["image_id"], step, run_schedule(manifest))
    with replaying(pipeline, image, [sample["timestep"]]) as replay:
        for _ in range(2):
            start = time.perf_counter()
            arrays = record_pass(pipeline, replay, sample, keys, blocks, f"step {step} of image {image['image_id']}")
            seconds = time.perf_counter() - start
    size = npz_bytes(sample_file_arrays(image["image_id"], step, arrays))
    return seconds, size, {key: array.shape for key, array in arrays.items()}


@stage_command
@calib_dir_option
@model_place_options
@click.option(
    "--num-images", type=click.IntRange(min=1), default=5, help="Images to use, evenly over the whole calibration run."
)
@click.option("--stride", type=click.IntRange(min=1), default=5, help="Use every Nth saved step.")
@click.option("--blocks", help="Blocks to cache, such as mm0,mm5.  [default: all]")
@resume_options
def main(
    calib_dir: Path, model: str | None, local_checkpoint: Path | None, num_images: int, stride: int, blocks: str | None,
    resume: bool, force: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Stage 2W: cache the inputs and outputs of every block."""
    from calibration_store import (
        CACHE_PLAN,
        BlockCachePaths,
        check_stage,
        locked_folder,
        open_stage,
        plan_before,
        read_manifest,
        require_space,
    )

    manifest, paths = read_manifest(calib_dir), BlockCachePaths(calib_dir)
    before = plan_before(paths.plan, CACHE_PLAN, resume, num_images=num_images)
    plan, images = plan_cache(manifest, num_images, stride, blocks, before)
    passes = len(images) * len(plan["key_timesteps"])
    click.echo(
        f"{manifest['model_version']}: images {few(plan['selected_image_ids'])}, {len(plan['key_timesteps'])} steps each, "
        f"{passes} samples"
    )
    options = {"num_images": "--num-images", "stride": "--stride", "blocks": "--blocks"}
    check_stage(paths, paths.plan, CACHE_PLAN, plan, options, resume, force)
    from diffusion import load_run_pipeline

    pipeline = load_run_pipeline(manifest, None, model, local_checkpoint)
    keys, chosen = choose_blocks(pipeline, blocks)
    seconds, sample_bytes, shapes = probe(pipeline, paths, manifest, plan, images[0], keys, chosen)
    todo = samples_to_do(paths, plan, shapes, everything=force)
    left = sum(map(len, todo.values()))
    click.echo(
        f"to do: {left} of {passes} samples, {format_bytes(sample_bytes * left)} in {paths.root} "
        f"({format_bytes(sample_bytes)} a sample), about {format_seconds(seconds * left)}"
    )
    require_space(paths.root, sample_bytes * left)
    if dry_run:
        return
    with locked_folder(paths.root):
        check_stage(paths, paths.plan, CACHE_PLAN, plan, options, resume, force)
        open_stage(paths, paths.plan, plan, force)
        bar = progress_bar(passes, "samples", "sample", initial=passes - left)
        try:
            cache(pipeline, paths, manifest, images, keys, chosen, todo, bar)
            write_metadata(paths, manifest, plan, keys, chosen, shapes)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: finished samples are kept in {paths.samples}; go on with: {resume_command()}"
            ) from None
    click.echo(f"wrote {paths.metadata} and {paths.samples}/")


if __name__ == "__main__":
    main()
