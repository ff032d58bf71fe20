"""Stage 1: sample images from prompts and keep the latents of the denoising steps.

Reads   a model (--model) and prompts (a built-in list, or --prompts FILE).
Writes  manifest.json, samples/{image:04d}_{step:03d}.npz and images/{image:04d}.png below --calib-dir.

    python generate_calibration_data.py --model sd3-emoji --num-images 8
"""

import os
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli_options import (
    Interrupted,
    calib_dir_option,
    draw_builtin_prompts,
    format_bytes,
    format_seconds,
    progress_bar,
    read_prompt_file,
    resume_command,
    resume_options,
    stage_command,
)

if TYPE_CHECKING:
    from calibration_store import CalibrationPaths
    from diffusion import EulerStep, ModelInfo

DEFAULT_MODEL = "argmaxinc/mlx-stable-diffusion-3-medium"
PNG_BYTES_PER_PIXEL = 3  # what an image takes at most
MANIFEST_BYTES_PER_IMAGE = 400

# manifest key -> the option that sets it: what --resume compares
RUN_OPTIONS = {
    "activation_dtype": "--dtype",
    "use_t5": "--t5/--no-t5",
    "num_steps": "--num-steps",
    "cfg_scale": "--cfg-weight",
    "negative_prompt": "--negative-prompt",
    "latent_size": "--latent-size",
    "sampler_shift": "--model",
    "seed_base": "--seed",
    "stride": "--stride",
    "save_images": "--images/--no-images",
}


# --- plan ---------------------------------------------------------------------------------------------------


def plan_run(
    info: "ModelInfo", prompts: Sequence[str], num_images: int, num_steps: int, cfg_weight: float | None,
    negative_prompt: str, seed: int, latent_size: tuple[int, int] | None, stride: int, batch_size: int,
    use_t5: bool | None, dtype: str, local_checkpoint: Path | None, save_images: bool,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a run before its first image. A list shorter than num_images starts again with new seeds."""
    from calibration_store import MANIFEST_FORMAT, prompts_digest
    from diffusion import package_versions

    cfg_weight = info.cfg_weight if cfg_weight is None else cfg_weight
    latent_size = info.latent_size if latent_size is None else latent_size
    for side in latent_size:
        if side % info.patch_size or not 0 < side <= info.max_latent_size:
            raise click.UsageError(
                f"--latent-size {latent_size[0]} {latent_size[1]}: both sides must be multiples of {info.patch_size} "
                f"from {info.patch_size} to {info.max_latent_size} for {info.version}"
            )
    if negative_prompt and cfg_weight <= 1:
        raise click.UsageError("--negative-prompt needs --cfg-weight above 1: DiffusionKit ignores it otherwise")
    if seed + num_images > 2**32:
        raise click.UsageError(f"--seed {seed}: seed + image must stay below 2^32")
    chosen = [prompts[image_id % len(prompts)] for image_id in range(num_images)]
    return {
        "format": MANIFEST_FORMAT,
        "model_version": info.version,
        "local_checkpoint": str(local_checkpoint.resolve()) if local_checkpoint else None,
        "num_steps": num_steps,
        "cfg_scale": cfg_weight,
        "negative_prompt": negative_prompt,
        "latent_size": list(latent_size),
        "weights_fingerprint": None,  # known once the files are there
        "use_t5": info.use_t5 if use_t5 is None else use_t5,
        "sampler_shift": info.sampler_shift,
        "seed_base": seed,
        "activation_dtype": dtype,
        "stride": stride,
        "batch_option": batch_size,
        "batch_size": min(batch_size, num_images),
        "save_images": save_images,
        "num_images": num_images,
        "n_completed": 0,
        "prompts_sha256": prompts_digest(chosen),
        "package_versions": package_versions(),
        "images": [
            {
                "image_id": image_id,
                "prompt": prompt,
                "negative_prompt": negative_prompt,
                "seed": seed + image_id,
                "cfg_weight": cfg_weight,
                "num_steps": num_steps,
                "filename": f"images/{image_id:04d}.png" if save_images else None,
            }
            for image_id, prompt in enumerate(chosen)
        ],
    }


def check_same_run(plan: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Refuse to resume a run with other parameters, by the option's name."""
    from calibration_store import prompts_digest, shown

    for key, option in RUN_OPTIONS.items():
        before = list(manifest[key]) if isinstance(manifest[key], tuple) else manifest[key]
        if plan[key] != before:
            raise click.UsageError(
                f"--resume: the run in this folder has {option} {shown(before)}, not {shown(plan[key])}; "
                "give the same value, use --force to start over, or another --calib-dir"
            )
    if plan["batch_option"] != manifest["batch_option"] and plan["batch_size"] != manifest["batch_size"]:
        raise click.UsageError(
            f"--resume: the run in this folder has --batch-size {manifest['batch_option']}, not {plan['batch_option']}; "
            "give the same value, use --force to start over, or another --calib-dir"
        )
    started_with = manifest["num_images"]
    if plan["num_images"] < started_with:
        raise click.UsageError(f"--resume: the run has --num-images {started_with}; it can grow, not shrink")
    if prompts_digest([image["prompt"] for image in plan["images"][:started_with]]) != manifest["prompts_sha256"]:
        raise click.UsageError("--resume: the run was started with other --prompts; give the same list or use --force")
    if plan["package_versions"] != manifest["package_versions"]:
        click.echo(
            f"Warning: the run was started with {manifest['package_versions']}, now {plan['package_versions']}: "
            "arrays may differ in their last bits.",
            err=True,
        )


def check_same_model(plan: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Refuse to resume a run with other weights; the same ones may have moved."""
    if plan["weights_fingerprint"] == manifest["weights_fingerprint"]:
        return
    given = plan["local_checkpoint"] or plan["model_version"]
    raise click.UsageError(
        f"--resume: the run in this folder has --model {manifest.get('local_checkpoint') or manifest['model_version']}, and the "
        f"weights of {given} are not its; use --force to start over, or another --calib-dir"
    )


def refuse_hub_options(info: "ModelInfo", plan: dict[str, Any]) -> None:
    """Options that a model folder has no use for."""
    if info.folder is not None and plan["local_checkpoint"]:
        raise click.UsageError("--local-checkpoint goes with a hub model; a model folder brings its own weights")
    if info.folder is not None and plan["use_t5"]:
        raise click.UsageError(f"--t5: {info.version} has no T5 text encoder; use --no-t5")


def read_own_run(paths: "CalibrationPaths", resume: bool, force: bool) -> dict[str, Any] | None:
    """The manifest of the run that --resume goes on with; None where there is none yet."""
    from calibration_store import TEMP_SUFFIX, StoreError, read_manifest

    occupied = paths.owned_files()
    if force or not occupied:
        return None
    if not resume:
        raise click.UsageError(
            f"{paths.root} holds a run already: --resume goes on with it, --force starts over, or use another --calib-dir"
        )
    if not paths.manifest.exists() and any(path.suffix != TEMP_SUFFIX for path in occupied):
        raise StoreError(f"{paths.root}: samples without manifest.json; use --force to start over")
    return read_manifest(paths.root) if paths.manifest.exists() else None


def continue_run(plan: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Check that the run in the folder is the planned one; rows of a pass and package versions stay what they were."""
    check_same_run(plan, manifest)
    where = ("model_version", "local_checkpoint")
    if plan["weights_fingerprint"] is not None or any(plan[key] != manifest.get(key) for key in where):
        check_same_model(plan, manifest)
    plan |= {key: manifest[key] for key in ("batch_option", "batch_size", "package_versions")}


def complete_images(paths: "CalibrationPaths", plan: dict[str, Any], info: "ModelInfo") -> dict[int, dict]:
    """The images whose files are all on the disk and what they should be."""
    from calibration_store import is_complete
    from diffusion import run_schedule

    height, width = plan["latent_size"]
    size, schedule = (width * info.vae_downscale, height * info.vae_downscale), run_schedule(plan)
    return {image["image_id"]: image for image in plan["images"] if is_complete(paths, plan, image, schedule, size)}


def refuse_foreign_pictures(paths: "CalibrationPaths", plan: dict[str, Any], complete: dict[int, dict]) -> None:
    """Raise StoreError where an image would take the place of a file that is not this stage's."""
    from calibration_store import StoreError

    ours = set(paths.owned_files())
    for image in plan["images"]:
        path = paths.image(image["image_id"])
        if plan["save_images"] and image["image_id"] not in complete and os.path.lexists(path) and path not in ours:
            raise StoreError(f"{path}: not written by this stage; move it, or use another --calib-dir")


def warn_of_old_results(paths: "CalibrationPaths") -> None:
    """After --force: what later stages made from the run that is gone."""
    old = [name for name in ("adaround_cache", "activations") if (paths.root / name).is_dir()]
    if old:
        click.echo(
            f"Note: {' and '.join(old)} in {paths.root} belong to the run that is gone; make them anew with --force."
        )


def batches_to_do(plan: dict[str, Any], complete: dict[int, dict]) -> list[list[dict]]:
    """Batches at fixed places in the list, so that a resumed run samples an image beside the same neighbours."""
    size = plan["batch_size"]
    batches = [plan["images"][start : start + size] for start in range(0, plan["num_images"], size)]
    return [batch for batch in batches if any(image["image_id"] not in complete for image in batch)]


def say_how_many_prompts(prompts: Sequence[str], num_images: int, prompt_file: Path | None) -> None:
    """A list that is not used as a whole, or more than once."""
    if len(prompts) < num_images:
        click.echo(f"{len(prompts)} prompts for {num_images} images: the list is used again with other seeds.")
    elif prompt_file is not None and len(prompts) > num_images:
        click.echo(f"{num_images} of {len(prompts)} prompts used: raise --num-images for more.")


def bytes_per_image(plan: dict[str, Any]) -> int:
    """Bytes on disk of one image's samples: exact, from one sample's real layout."""
    import numpy as np

    from calibration_store import npz_bytes, sample_arrays, saved_steps

    x = np.zeros((1, *plan["latent_size"], 16), plan["activation_dtype"])
    return npz_bytes(sample_arrays(x, np.zeros(()), 0.0, 0, 0, False)) * len(
        saved_steps(plan["num_steps"], plan["stride"])
    )


def image_pixels(plan: dict[str, Any], info: "ModelInfo") -> int:
    return plan["latent_size"][0] * plan["latent_size"][1] * info.vae_downscale**2


# --- sampling -----------------------------------------------------------------------------------------------


def sample_batch(pipeline, plan: dict[str, Any], batch: list[dict], num_steps: int):
    """The Euler steps of one batch of images, as a generator.

    A short last batch is filled up with its last image: an image's bytes then depend on its place in a batch of
    the run's size and on nothing else, also when the run grows later.
    """
    import mlx.core as mx

    from diffusion import encode_prompts, euler_steps, initial_noise

    cfg_weight = plan["cfg_scale"]
    batch = batch + batch[-1:] * (plan["batch_size"] - len(batch))
    text = encode_prompts(pipeline, [image["prompt"] for image in batch], cfg_weight, plan["negative_prompt"])
    noise = mx.concatenate([initial_noise(image["seed"], tuple(plan["latent_size"])) for image in batch])
    return euler_steps(pipeline, text, noise, num_steps, cfg_weight)


def write_step(writer, paths: "CalibrationPaths", batch: list[dict], step: "EulerStep", complete, dtype: str) -> None:
    """Hand the samples of one step to the writer, in the dtype that the model is given."""
    import mlx.core as mx
    import numpy as np

    from calibration_store import StoreError, sample_arrays, write_npz

    x = np.array(step.x.astype(getattr(mx, dtype)))
    finite = np.isfinite(x).all(axis=(1, 2, 3))
    if not finite[: len(batch)].all():
        image = batch[int(np.argmin(finite))]["image_id"]
        way = (
            "a smaller --cfg-weight or another copy of the model"
            if dtype == "float32"
            else "--dtype float32 or a smaller --cfg-weight"
        )
        raise StoreError(f"step {step.step_index} of image {image} holds NaN or infinity; try {way}")
    timestep, sigma = np.array(step.timestep), float(step.sigma)
    for row, image in enumerate(batch):
        if image["image_id"] not in complete:
            arrays = sample_arrays(x[row : row + 1], timestep, sigma, step.step_index, image["image_id"], step.is_final)
            writer.submit(write_npz, paths.sample(image["image_id"], step.step_index), arrays)


def write_images(writer, paths: "CalibrationPaths", pipeline, batch: list[dict], x, complete) -> None:
    """Decode finished latents and hand the PNG files to the writer."""
    from calibration_store import picture_chunks, write_png
    from diffusion import decode_latents

    for row, image in enumerate(batch):
        if image["image_id"] not in complete:
            picture = decode_latents(pipeline, x[row : row + 1], [image["image_id"]])[0]
            writer.submit(write_png, paths.image(image["image_id"]), picture, picture_chunks(image))


def write_manifest(paths: "CalibrationPaths", plan: dict[str, Any], complete: dict[int, dict]) -> None:
    from calibration_store import sync_folder, write_json

    for folder in (paths.samples, paths.images):
        if folder.is_dir():
            sync_folder(folder)
    images = [complete[image_id] for image_id in sorted(complete)]
    write_json(paths.manifest, {**plan, "n_completed": len(images), "images": images})
    sync_folder(paths.root)


def generate(pipeline, paths: "CalibrationPaths", plan: dict[str, Any], complete: dict[int, dict]) -> None:
    """Sample every incomplete batch; the manifest lists an image once its files are on the disk."""
    from calibration_store import BackgroundWriter, saved_steps

    kept = set(saved_steps(plan["num_steps"], plan["stride"]))
    write_manifest(paths, plan, complete)
    images_bar = progress_bar(plan["num_images"], "images", "image", initial=len(complete))
    with images_bar, BackgroundWriter(pending=2 * plan["batch_size"]) as writer:
        for batch in batches_to_do(plan, complete):
            steps_bar = progress_bar(plan["num_steps"], "steps", "step", leave=False)
            with steps_bar, closing(sample_batch(pipeline, plan, batch, plan["num_steps"])) as steps:
                for step in steps:
                    if step.step_index in kept:
                        write_step(writer, paths, batch, step, complete, plan["activation_dtype"])
                    steps_bar.update(step.step_index > 0)
            if plan["save_images"]:
                write_images(writer, paths, pipeline, batch, step.x, complete)
            writer.drain()
            new = {image["image_id"]: image for image in batch if image["image_id"] not in complete}
            complete.update(new)
            write_manifest(paths, plan, complete)
            images_bar.update(len(new))


def probe_seconds(pipeline, plan: dict[str, Any], batches: list[list[dict]]) -> float:
    """Seconds that `batches` will take, from a short run of the first one: set-up, two steps, one decoded image."""
    from diffusion import decode_latents

    if not batches:
        return 0.0
    with closing(sample_batch(pipeline, plan, batches[0], 1)) as steps:
        next(steps)  # warm-up: weights are in memory, the adaLN kernels compiled
    marks = [time.perf_counter()]
    with closing(sample_batch(pipeline, plan, batches[0], 2)) as steps:
        for step in steps:
            marks.append(time.perf_counter())
    setup_seconds, step_seconds = marks[1] - marks[0], marks[-1] - marks[-2]
    cached_timesteps = 3
    per_batch = setup_seconds * (plan["num_steps"] + 1) / cached_timesteps + step_seconds * plan["num_steps"]
    decode_seconds = 0.0
    if plan["save_images"]:
        start = time.perf_counter()
        decode_latents(pipeline, step.x[:1])
        decode_seconds = time.perf_counter() - start
    return len(batches) * per_batch + sum(map(len, batches)) * decode_seconds


# --- command line -------------------------------------------------------------------------------------------


def print_plan(plan: dict[str, Any], info: "ModelInfo", paths: "CalibrationPaths", complete: dict[int, dict]) -> int:
    """Say what the run is; returns the bytes that it still has to write."""
    from calibration_store import saved_steps

    height, width = plan["latent_size"]
    guidance = f"guidance {plan['cfg_scale']:g}" if plan["cfg_scale"] > 0 else "no guidance"
    guidance += f", negative prompt {plan['negative_prompt']!r}" if plan["negative_prompt"] else ""
    click.echo(
        f"{plan['model_version']}: {plan['num_images']} images, {plan['num_steps']} steps, {guidance}, "
        f"latents {height} x {width}, {plan['activation_dtype']}, T5 {'on' if plan['use_t5'] else 'off'}, "
        f"seed {plan['seed_base']}, batch {plan['batch_size']}"
    )
    batches, missing = batches_to_do(plan, complete), plan["num_images"] - len(complete)
    if complete:
        click.echo(f"complete in {paths.root}: {len(complete)} of {plan['num_images']} images")
    samples = missing * len(saved_steps(plan["num_steps"], plan["stride"]))
    sample_bytes = missing * bytes_per_image(plan)
    png_bytes = missing * image_pixels(plan, info) * PNG_BYTES_PER_PIXEL if plan["save_images"] else 0
    total = sample_bytes + png_bytes + plan["num_images"] * MANIFEST_BYTES_PER_IMAGE
    click.echo(
        f"to do: {len(batches) * plan['num_steps']} forward passes; {samples} samples ({format_bytes(sample_bytes)})"
        + (f", {missing} images (at most {format_bytes(png_bytes)})" if png_bytes else "")
    )
    return total


@stage_command
@click.option(
    "--model", default=DEFAULT_MODEL, help="sd3-emoji, a folder in its layout, or a hub id that DiffusionKit knows."
)
@click.option(
    "--local-checkpoint",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Safetensors file with a hub model's transformer and VAE.",
)
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text file, one prompt a line, or CSV or TSV with a column 'prompt' or 'caption'.  [default: built-in list, drawn by --seed]",
)
@click.option("--num-images", type=click.IntRange(min=1), default=10, help="Images to sample.")
@click.option("--num-steps", type=click.IntRange(min=1), default=50, help="Euler steps per image.")
@click.option("--cfg-weight", type=click.FloatRange(min=0), help="Guidance; 0 turns it off.  [default: the model's]")
@click.option("--negative-prompt", default="", help="What guidance steers away from.")
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**31),
    default=42,
    help="Image i is drawn with seed + i; also orders the built-in prompts.",
)
@click.option(
    "--latent-size", type=int, nargs=2, metavar="H W", help="Latent height and width.  [default: the model's]"
)
@click.option(
    "--stride", type=click.IntRange(min=1), default=1, help="Save every Nth step; the finished latent always."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, help="Images in one forward pass.")
@click.option("--t5/--no-t5", "use_t5", default=None, help="Use the T5 text encoder.  [default: the model's]")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    help="Weights and activations.  [default: float16 on Metal and CUDA, float32 on a CPU]",
)
@click.option("--images/--no-images", "save_images", default=True, help="Decode the finished latents to PNG.")
@calib_dir_option
@resume_options
def main(
    model, local_checkpoint, prompt_file, num_images, num_steps, cfg_weight, negative_prompt, seed, latent_size,
    stride, batch_size, use_t5, dtype, save_images, calib_dir, resume, force, dry_run,
):  # fmt: skip
    """Stage 1: sample images and keep the latents of their denoising steps as calibration data."""
    from calibration_store import CalibrationPaths, clear_files, locked_folder, require_space

    given_prompts = read_prompt_file(prompt_file) if prompt_file else None
    from diffusion import check_prompts, default_dtype, describe_model, load_pipeline, model_fingerprint

    info = describe_model(model)
    prompts = given_prompts or draw_builtin_prompts(info.captions, seed)
    plan = plan_run(
        info, prompts, num_images, num_steps, cfg_weight, negative_prompt, seed, latent_size, stride, batch_size,
        use_t5, dtype or default_dtype(), local_checkpoint, save_images,
    )  # fmt: skip
    refuse_hub_options(info, plan)
    plan["weights_fingerprint"] = model_fingerprint(info, plan["use_t5"], local_checkpoint)
    say_how_many_prompts(prompts, num_images, prompt_file)
    paths = CalibrationPaths(calib_dir)
    with nullcontext() if dry_run else locked_folder(paths.root):
        manifest, complete = read_own_run(paths, resume, force), {}
        if manifest is not None:
            continue_run(plan, manifest)
            complete = complete_images(paths, plan, info)
        require_space(paths.root, print_plan(plan, info, paths, complete))
        if len(complete) == num_images:
            click.echo(f"nothing to do: all {num_images} images are complete in {paths.root}")
            plan["weights_fingerprint"] = manifest["weights_fingerprint"]
            if not dry_run:
                clear_files(paths.owned_files(), paths.manifest, everything=False)
                write_manifest(paths, plan, complete)
            return
        refuse_foreign_pictures(paths, plan, complete)
        pipeline = load_pipeline(info, plan["activation_dtype"], plan["use_t5"], local_checkpoint)
        plan["weights_fingerprint"] = model_fingerprint(info, plan["use_t5"], local_checkpoint)
        if manifest is not None:
            check_same_model(plan, manifest)
        cut = check_prompts(pipeline, [image["prompt"] for image in plan["images"]])
        cut_negative = check_prompts(pipeline, [negative_prompt], "--negative-prompt")
        if cut:
            click.echo(f"{cut} prompts are longer than the text encoder's positions: their ends are ignored.")
        if cut_negative:
            click.echo("The negative prompt is longer than the text encoder's positions: its end is ignored.")
        if dry_run:
            seconds = probe_seconds(pipeline, plan, batches_to_do(plan, complete))
            click.echo(f"time: about {format_seconds(seconds)} on this machine")
            return
        clear_files(paths.owned_files(), paths.manifest, everything=force)
        if force:
            warn_of_old_results(paths)
        try:
            generate(pipeline, paths, plan, complete)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: {len(complete)} of {num_images} images are complete in {paths.root}; "
                f"go on with: {resume_command()}"
            ) from None
    click.echo(f"wrote {paths.manifest}, {paths.samples}/" + (f" and {paths.images}/" if save_images else ""))


if __name__ == "__main__":
    main()
