"""Stage 1's plan: the manifest of a run before its first image, its checks, and what is left of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibration_store.errors import OptionError, StoreError
from calibration_store.layout import CalibrationPaths, runs_nearby
from calibration_store.manifest import MANIFEST_FORMAT, prompts_digest, read_manifest
from calibration_store.samples import is_complete, sample_bytes
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.effort import SMALL_MODEL, effort_of
from w4a8.model.catalog import (
    ModelInfo,
    choose_dtype,
    describe_model,
    model_files,
    package_versions,
    refuse_080,
    with_guidance,
    with_shift,
    with_text_bits,
    without_own,
)
from w4a8.model.location import Lora
from w4a8.model.runs import run_schedule
from w4a8.model.sampling import check_seeds, choose_guidance, choose_steps
from w4a8.options import GenerationOptions

DEFAULT_MODEL = "argmaxinc/mlx-stable-diffusion-3-medium"
PNG_BYTES_PER_PIXEL = 3  # an upper bound for a compressed RGB image
MANIFEST_BYTES_PER_IMAGE = 400
SMALL_BATCH = 16  # images of a small model in one pass
HUB_WEIGHTS = 2_000_000_000  # of the smallest hub model, SD3-Medium
RUN_KEYS = {  # option -> key of the manifest: what --resume takes from the run where the option is not given
    "num_steps": "num_steps", "cfg_weight": "cfg_scale", "guidance": "guidance", "shift": "shift", "seed": "seed_base",
    "negative_prompt": "negative_prompt", "text_bits": "text_bits", "use_t5": "use_t5",
    "dtype": "activation_dtype", "stride": "stride", "batch_size": "batch_option", "save_images": "save_images",
}  # fmt: skip


def with_those_of_the_run(options: GenerationOptions) -> GenerationOptions:
    """Return the options, under --resume with the run's values in place of those that are not given.

    The model and its LoRAs are the run's where neither is given. The file of prompts is not noted, so it stays as it is.
    So does the latent size, since nothing else in the manifest would contradict a wrong one.
    Raises StoreError for a damaged manifest, and
    OptionError where there is no run and no model is named.
    """
    if not options.resume:
        return options
    if not CalibrationPaths(options.calib_dir).manifest.exists():
        if options.model is None and options.local_checkpoint is None:
            raise OptionError(
                f"--resume: no run in --calib-dir {options.calib_dir}{runs_nearby(options.calib_dir)}; "
                "give --model to begin one"
            )
        return options
    manifest = read_manifest(options.calib_dir)
    of_run = {key: manifest[noted] for key, noted in RUN_KEYS.items() if noted in manifest}
    of_run |= {"text_bits": str(manifest.get("text_bits", 16))}
    if not options.is_given("effort"):
        of_run["num_images"] = manifest["num_images"]
    if not (options.is_given("model") or options.is_given("local_checkpoint") or options.is_given("loras")):
        noted = manifest.get("local_checkpoint")
        of_run |= {"model": manifest["model_version"], "local_checkpoint": Path(noted) if noted else None}
        of_run["loras"] = tuple(Lora(Path(lora["file"]), lora["scale"]) for lora in manifest.get("loras", ()))
    return replace(options, **{key: value for key, value in of_run.items() if not options.is_given(key)})


def chosen_model(options: GenerationOptions) -> ModelInfo:
    """Describe the model that the options choose, with `--lora`, `--guidance` and `--text-bits`. Raises UserError.

    A checkpoint alone says itself which model it is.
    """
    model, checkpoint = options.model, options.local_checkpoint
    if model is None:
        model, checkpoint = (DEFAULT_MODEL, None) if checkpoint is None else (str(checkpoint), None)
    info = with_guidance(describe_model(model, options.loras, checkpoint), options.guidance)
    return with_shift(with_text_bits(info, options.text_bits), options.shift)


def with_amount(options: GenerationOptions, info: ModelInfo) -> GenerationOptions:
    """Return the options with numbers of images and of images at once: where they lack, the effort's for this model."""
    size = weights_of(info)
    images = effort_of(options.effort, size).num_images
    at_once = SMALL_BATCH if options.num_images is None and size <= SMALL_MODEL else 1
    return replace(options, num_images=options.num_images or images, batch_size=options.batch_size or at_once)


def weights_of(info: ModelInfo) -> int:
    """Return about how many weights a transformer has, by the bytes of its file; hub models are all large."""
    if info.folder is None:
        return HUB_WEIGHTS
    found = (model_files(info, False) or {}).get("mmdit")
    return HUB_WEIGHTS if found is None else os.path.getsize(found) // 2


def plan_run(options: GenerationOptions, info: ModelInfo, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the manifest of a run before its first image.

    A list of prompts that is shorter than num_images starts again, with new seeds. Raises OptionError for options that
    contradict each other or the model.
    """
    num_images, seed, negative_prompt = options.num_images, options.seed, options.negative_prompt
    assert num_images is not None and options.batch_size is not None  # `with_amount` has chosen
    num_steps = choose_steps(info, options.num_steps)
    cfg_weight = choose_guidance(info, options.cfg_weight)
    latent_size = options.latent_size or info.latent_size
    check_latent_size(info, latent_size)
    if negative_prompt and cfg_weight <= 1:
        raise OptionError("--negative-prompt needs --cfg-weight above 1: DiffusionKit ignores it otherwise")
    check_seeds(seed, num_images)
    chosen = [prompts[image_id % len(prompts)] for image_id in range(num_images)]
    return {
        "format": MANIFEST_FORMAT,
        "model_version": info.version,
        "architecture": info.family.architecture,
        "local_checkpoint": str(info.checkpoint) if info.checkpoint else None,
        **({"loras": [{"file": str(lora.file), "scale": lora.scale} for lora in info.loras]} if info.loras else {}),
        **({"guidance": info.guidance} if info.guidance is not None else {}),
        **({"shift": options.shift} if options.shift is not None else {}),
        **({"text_bits": info.text_bits} if info.text_bits != 16 else {}),
        "num_steps": num_steps,
        "cfg_scale": cfg_weight,
        "negative_prompt": negative_prompt,
        "latent_size": list(latent_size),
        "weights_fingerprint": None,  # the script fills it in once the model's files are there
        "use_t5": info.use_t5 if options.use_t5 is None else options.use_t5,
        "sampler_shift": info.sampler_shift,
        "seed_base": seed,
        "activation_dtype": choose_dtype(info, options.dtype),
        "stride": options.stride,
        "batch_option": options.batch_size,
        "batch_size": min(options.batch_size, num_images),
        "save_images": options.save_images,
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
                "filename": f"images/{image_id:04d}.png" if options.save_images else None,
            }
            for image_id, prompt in enumerate(chosen)
        ],
    }


def begun(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of a run that has no image yet."""
    return {**plan, "n_completed": 0, "images": []}


def finished(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of the finished run, without a weights_fingerprint that is not known yet."""
    known = {key: value for key, value in plan.items() if key != "weights_fingerprint" or value is not None}
    return known | {"n_completed": plan["num_images"]}


def check_latent_size(info: ModelInfo, latent_size: tuple[int, int]) -> None:
    """Raise OptionError for a latent size (height, width) that the model cannot draw."""
    for side in latent_size:
        if side % info.patch_size or not 0 < side <= info.max_latent_size:
            raise OptionError(
                f"--latent-size {latent_size[0]} {latent_size[1]}: both sides must be multiples of {info.patch_size} "
                f"from {info.patch_size} to {info.max_latent_size} for {info.version}"
            )


def refuse_hub_options(info: ModelInfo, plan: dict[str, Any]) -> None:
    """Raise OptionError for --t5 or --no-t5 with a model that the option does not fit."""
    if not info.use_t5 and plan["use_t5"]:
        raise OptionError(f"--t5: {info.version} has no T5 text encoder; use --no-t5")
    if info.text_bits != 16 and not plan["use_t5"]:
        raise OptionError(f"--text-bits {info.text_bits}: T5 is off; leave it out, or give --t5")
    if info.family.needs_t5 and not plan["use_t5"]:
        raise OptionError(f"--no-t5: {info.version} reads its prompts with T5; leave it out")


def continue_run(plan: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Check that a plan goes on with the run in a folder, and take over rows of a pass and package versions.

    StageFolder has compared RUN_OPTIONS already. This function compares batches, growth, prompts and weights with the
    `manifest` in the folder, and changes `plan`. Returns a line that warns where the installed packages are others than
    those the run was started with, else an empty text. Raises OptionError where the plan is that of another run.
    """
    if plan["batch_option"] != manifest["batch_option"] and plan["batch_size"] != manifest["batch_size"]:
        raise OptionError(
            f"--resume: the run in this folder has --batch-size {manifest['batch_option']}, "
            f"not {plan['batch_option']}; give the same value, use --force to start over, or another --calib-dir"
        )
    started_with = manifest["num_images"]
    if plan["num_images"] < started_with:
        raise OptionError(
            f"--resume: the run has --num-images {started_with}; it can grow, not shrink: "
            "give the run's --effort or --num-images, or leave both out"
        )
    if prompts_digest([image["prompt"] for image in plan["images"][:started_with]]) != manifest["prompts_sha256"]:
        raise OptionError("--resume: the run was started with other --prompts; give the same list or use --force")
    where = ("model_version", "local_checkpoint", "loras")
    if plan["weights_fingerprint"] is not None or any(plan.get(key) != manifest.get(key) for key in where):
        check_same_model(plan, manifest)
    now, began = (without_own(one["package_versions"]) for one in (plan, manifest))
    plan |= {key: manifest[key] for key in ("batch_option", "batch_size", "package_versions")}
    plan["weights_fingerprint"] = manifest["weights_fingerprint"]  # not known before the files are here, or the same
    if now == began:
        return ""
    return f"Warning: the run was started with {began}, now {now}: arrays may differ in their last bits.\n"


def check_same_model(plan: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise OptionError where a run would go on with other weights; the same weights may lie elsewhere."""
    if plan["weights_fingerprint"] == manifest["weights_fingerprint"]:
        return
    refuse_080(manifest["weights_fingerprint"], plan["weights_fingerprint"])
    raise OptionError(
        f"--resume: the run in this folder has {place_of(manifest)}, and the weights of {place_of(plan)} are not its; "
        "give the same, use --force to start over, or another --calib-dir"
    )


def place_of(run: Mapping[str, Any]) -> str:
    """Return the options that name the weights of a run, as a command line has them."""
    words = [f"--model {run['model_version']}"]
    words += [f"--local-checkpoint {run['local_checkpoint']}"] if run.get("local_checkpoint") else []
    return " ".join(words + [f"--lora {lora['file']}:{lora['scale']:g}" for lora in run.get("loras", ())])


def complete_images(paths: CalibrationPaths, plan: dict[str, Any], info: ModelInfo) -> dict[int, dict]:
    """Return {image_id: entry} of the images whose files are all on the disk and hold what the plan asks for."""
    height, width = plan["latent_size"]
    size, schedule = (width * info.vae_downscale, height * info.vae_downscale), run_schedule(plan)
    return {image["image_id"]: image for image in plan["images"] if is_complete(paths, plan, image, schedule, size)}


def refuse_foreign_pictures(paths: CalibrationPaths, plan: dict[str, Any], complete: dict[int, dict]) -> None:
    """Raise StoreError where an image would take the place of a file that another program wrote."""
    ours = set(paths.owned_files())
    for image in plan["images"]:
        path = paths.image(image["image_id"])
        if plan["save_images"] and image["image_id"] not in complete and os.path.lexists(path) and path not in ours:
            raise StoreError(f"{path}: not written by this stage; move it, or use another --calib-dir")


def batches_to_do(
    plan: dict[str, Any], complete: dict[int, dict], ranks: SingleProcess = SINGLE_PROCESS
) -> list[list[dict]]:
    """Return the incomplete batches that a rank owns, each a list of the manifest's image entries.

    Batches have fixed places in the list of images, so a resumed run samples an image beside the same neighbours.
    """
    size = plan["batch_size"]
    batches = [plan["images"][start : start + size] for start in range(0, plan["num_images"], size)]
    mine = [batch for number, batch in enumerate(batches) if ranks.owns(number)]
    return [batch for batch in mine if any(image["image_id"] not in complete for image in batch)]


def picture_bytes(plan: Mapping[str, Any], info: ModelInfo, images: int) -> int:
    """Return an upper bound of the bytes that the PNG files of this number of images take."""
    pixels = plan["latent_size"][0] * plan["latent_size"][1] * info.vae_downscale**2
    return images * pixels * PNG_BYTES_PER_PIXEL if plan["save_images"] else 0


def bytes_to_do(plan: Mapping[str, Any], info: ModelInfo, missing: int) -> int:
    """Return an upper bound of the bytes that a run still writes. missing: the number of incomplete images."""
    manifest = plan["num_images"] * MANIFEST_BYTES_PER_IMAGE
    return missing * sample_bytes(plan) + picture_bytes(plan, info, missing) + manifest
