"""Stage 1: the plan of a run, its batches, and the samples of one batch."""

import os
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from calibration_store.errors import OptionError, StoreError
from calibration_store.files import BackgroundWriter, write_png
from calibration_store.layout import CalibrationPaths
from calibration_store.manifest import (
    MANIFEST_FORMAT,
    image_identity,
    prompts_digest,
    read_manifest,
    saved_steps,
    write_manifest,
)
from calibration_store.pictures import picture_chunks
from calibration_store.samples import is_complete, sample_arrays, sample_bytes, write_sample
from w4a8.backend.estimates import Estimate
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.backend.progress import ProgressBar, progress_bar
from w4a8.model.catalog import ModelInfo, choose_dtype, package_versions, without_own
from w4a8.model.memory_needs import needs_of, refuse_too_large
from w4a8.model.parts import DECODER, TRANSFORMER, Pipeline, to_numpy
from w4a8.model.prompt_encoder import PromptEncoder, check_prompts
from w4a8.model.runs import run_schedule
from w4a8.model.sampling import EulerStep, check_seeds, decode_latents, euler_steps, initial_noise
from w4a8.options import GenerationOptions

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


def model_of_run(calib_dir: Path) -> str | None:
    """What the run in a folder was begun with; None where there is none."""
    return read_manifest(calib_dir)["model_version"] if CalibrationPaths(calib_dir).manifest.exists() else None


def plan_run(options: GenerationOptions, info: ModelInfo, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the manifest of a run before its first image. A list shorter than num_images starts again with new seeds.

    Raises OptionError for options that cannot be with this model.
    """
    num_images, seed, negative_prompt = options.num_images, options.seed, options.negative_prompt
    num_steps = options.num_steps or info.num_steps
    cfg_weight = info.cfg_weight if options.cfg_weight is None else options.cfg_weight
    latent_size = options.latent_size or info.latent_size
    check_latent_size(info, latent_size)
    check_guidance(info, cfg_weight)
    if negative_prompt and cfg_weight <= 1:
        raise OptionError("--negative-prompt needs --cfg-weight above 1: DiffusionKit ignores it otherwise")
    check_seeds(seed, num_images)
    chosen = [prompts[image_id % len(prompts)] for image_id in range(num_images)]
    return {
        "format": MANIFEST_FORMAT,
        "model_version": info.version,
        "architecture": info.family.name,
        "local_checkpoint": str(options.local_checkpoint.resolve()) if options.local_checkpoint else None,
        **({"loras": [{"file": str(lora.file), "scale": lora.scale} for lora in info.loras]} if info.loras else {}),
        "num_steps": num_steps,
        "cfg_scale": cfg_weight,
        "negative_prompt": negative_prompt,
        "latent_size": list(latent_size),
        "weights_fingerprint": None,  # known once the files are there
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
    """Return the manifest of the finished run, without the entries that need the model's files."""
    known = {key: value for key, value in plan.items() if key != "weights_fingerprint" or value is not None}
    return known | {"n_completed": plan["num_images"]}


def check_guidance(info: ModelInfo, cfg_weight: float) -> None:
    """Raise OptionError for guidance where DiffusionKit runs no rows of a negative prompt."""
    if cfg_weight > 0 and not info.family.guided:
        raise OptionError(
            f"--cfg-weight {cfg_weight:g}: {info.version} is run without guidance; leave it out, or give 0"
        )


def check_latent_size(info: ModelInfo, latent_size: tuple[int, int]) -> None:
    """Raise OptionError for a size that the model cannot draw."""
    for side in latent_size:
        if side % info.patch_size or not 0 < side <= info.max_latent_size:
            raise OptionError(
                f"--latent-size {latent_size[0]} {latent_size[1]}: both sides must be multiples of {info.patch_size} "
                f"from {info.patch_size} to {info.max_latent_size} for {info.version}"
            )


def continue_run(plan: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Check what StageFolder does not: batches, growth, prompts, weights; rows of a pass and package versions stay as they were.

    Returns a line that warns where the packages are others than the run was started with, else an empty text.
    """
    if plan["batch_option"] != manifest["batch_option"] and plan["batch_size"] != manifest["batch_size"]:
        raise OptionError(
            f"--resume: the run in this folder has --batch-size {manifest['batch_option']}, not {plan['batch_option']}; "
            "give the same value, use --force to start over, or another --calib-dir"
        )
    started_with = manifest["num_images"]
    if plan["num_images"] < started_with:
        raise OptionError(f"--resume: the run has --num-images {started_with}; it can grow, not shrink")
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
    """Refuse to resume a run with other weights; the same ones may have moved."""
    if plan["weights_fingerprint"] == manifest["weights_fingerprint"]:
        return
    raise OptionError(
        f"--resume: the run in this folder has {place_of(manifest)}, and the weights of {place_of(plan)} are not its; "
        "give the same, use --force to start over, or another --calib-dir"
    )


def place_of(run: Mapping[str, Any]) -> str:
    """The options that a run's weights came by."""
    words = [f"--model {run['model_version']}"]
    words += [f"--local-checkpoint {run['local_checkpoint']}"] if run.get("local_checkpoint") else []
    return " ".join(words + [f"--lora {lora['file']}:{lora['scale']:g}" for lora in run.get("loras", ())])


def warn_of_long_prompts(pipeline: Pipeline, plan: Mapping[str, Any]) -> list[str]:
    """Return a sentence for prompts that the text encoders cut, and one for the negative prompt.

    Raises ModelError for a character that the tokenizer does not know.
    """
    cut = check_prompts(pipeline, [image["prompt"] for image in plan["images"]])
    negative = check_prompts(pipeline, [plan["negative_prompt"]], "--negative-prompt")
    return [f"{cut} prompts are longer than the text encoder's positions: their ends are ignored."] * bool(cut) + [
        "The negative prompt is longer than the text encoder's positions: its end is ignored."
    ] * bool(negative)


def refuse_hub_options(info: ModelInfo, plan: dict[str, Any]) -> None:
    """Options that a model folder has no use for."""
    if info.folder is not None and plan["local_checkpoint"]:
        raise OptionError("--local-checkpoint goes with a hub model; a model folder brings its own weights")
    if info.hub_id is None and plan["use_t5"]:
        raise OptionError(f"--t5: {info.version} has no T5 text encoder; use --no-t5")
    if info.family.needs_t5 and not plan["use_t5"]:
        raise OptionError(f"--no-t5: {info.version} reads its prompts with T5; leave it out")


def complete_images(paths: CalibrationPaths, plan: dict[str, Any], info: ModelInfo) -> dict[int, dict]:
    """The images whose files are all on the disk and what they should be."""
    height, width = plan["latent_size"]
    size, schedule = (width * info.vae_downscale, height * info.vae_downscale), run_schedule(plan)
    return {image["image_id"]: image for image in plan["images"] if is_complete(paths, plan, image, schedule, size)}


def refuse_foreign_pictures(paths: CalibrationPaths, plan: dict[str, Any], complete: dict[int, dict]) -> None:
    """Raise StoreError where an image would take the place of a file that is not this stage's."""
    ours = set(paths.owned_files())
    for image in plan["images"]:
        path = paths.image(image["image_id"])
        if plan["save_images"] and image["image_id"] not in complete and os.path.lexists(path) and path not in ours:
            raise StoreError(f"{path}: not written by this stage; move it, or use another --calib-dir")


def batches_to_do(plan: dict[str, Any], complete: dict[int, dict], ranks: SingleProcess = SINGLE_PROCESS) -> list[list[dict]]:
    """This rank's batches at fixed places in the list: a resumed run samples an image beside the same neighbours."""
    size = plan["batch_size"]
    batches = [plan["images"][start : start + size] for start in range(0, plan["num_images"], size)]
    mine = [batch for number, batch in enumerate(batches) if ranks.owns(number)]
    return [batch for batch in mine if any(image["image_id"] not in complete for image in batch)]


def generate(
    pipeline: Pipeline, texts: PromptEncoder, paths: CalibrationPaths, plan: dict[str, Any], complete: dict[int, dict],
    together: bool, bar: ProgressBar, ranks: SingleProcess = SINGLE_PROCESS,
) -> None:  # fmt: skip
    """Sample every incomplete batch; the manifest lists an image, and `complete` has it, once its files are on the disk.

    Each rank its own batches; rank 0 writes the manifest, and lists the others' images when all are done.
    """
    kept = set(saved_steps(plan["num_steps"], plan["stride"]))
    if ranks.rank == 0:
        write_manifest(paths, plan, complete)
    with BackgroundWriter(pending=2 * plan["batch_size"]) as writer:
        for batch in batches_to_do(plan, complete, ranks):
            steps_bar = progress_bar(plan["num_steps"], "steps", "step", leave=False)
            with steps_bar, closing(sample_batch(pipeline, texts, plan, batch, plan["num_steps"])) as steps:
                for step in steps:
                    if step.step_index in kept:
                        write_latents(writer, paths, plan, batch, step, complete)
                    steps_bar.update(step.step_index > 0)
            if plan["save_images"]:
                with decoding(pipeline, together):
                    write_images(writer, paths, pipeline, batch, step.x, complete)
            writer.drain()
            new = {image["image_id"]: image for image in batch if image["image_id"] not in complete}
            complete.update(new)
            if ranks.rank == 0:
                write_manifest(paths, plan, complete)
            ranks.advance(bar, len(new))
    if ranks.size > 1:
        ranks.complete(bar)
        complete.update({image["image_id"]: image for image in plan["images"]})
        if ranks.rank == 0:
            write_manifest(paths, plan, complete)


def prepare(
    pipeline: Pipeline, plan: Mapping[str, Any], batches: Sequence[Sequence[dict]], text_group: int | None
) -> tuple[PromptEncoder, bool]:
    """Read every part once, the first prompts encoded; whether transformer and decoder fit into memory together.

    Before anything is deleted or written: what cannot fit, and damaged weights, raise a UserError here.
    """
    guidance, size = plan["cfg_scale"], plan["batch_size"]
    needs = needs_of(pipeline, plan["latent_size"], size, guidance > 0, plan["num_steps"] + 1)
    together = refuse_too_large(pipeline, needs, size, what_takes_less(plan))
    texts = PromptEncoder(pipeline, prompts_of(batches), guidance, plan["negative_prompt"], text_group)
    texts.of(prompts_of(batches[:1]))
    if plan["save_images"]:
        pipeline.load(DECODER)
        pipeline.drop(*(() if together else (DECODER,)))
    pipeline.load(TRANSFORMER)
    return texts, together


@contextmanager
def decoding(pipeline: Pipeline, together: bool) -> Iterator[None]:
    """Where decoder and transformer do not fit into memory together, each makes room for the other."""
    pipeline.drop(*(() if together else (TRANSFORMER,)))
    yield
    pipeline.drop(*(() if together else (DECODER,)))


def what_takes_less(plan: Mapping[str, Any]) -> list[str]:
    """The options of stage 1 that would make this run smaller."""
    can = {
        "--no-t5": plan["use_t5"],
        "--dtype": plan["activation_dtype"] == "float32",
        "--no-images": plan["save_images"],
    }
    return ["--batch-size", "--latent-size", *(option for option, possible in can.items() if possible)]


def picture_bytes(plan: Mapping[str, Any], info: ModelInfo, images: int) -> int:
    """Return the number of bytes that the PNG files of this many images take at most."""
    pixels = plan["latent_size"][0] * plan["latent_size"][1] * info.vae_downscale**2
    return images * pixels * PNG_BYTES_PER_PIXEL if plan["save_images"] else 0


def bytes_to_do(plan: Mapping[str, Any], info: ModelInfo, missing: int) -> int:
    """Return the number of bytes that are written at most while this many images are missing."""
    manifest = plan["num_images"] * MANIFEST_BYTES_PER_IMAGE
    return missing * sample_bytes(plan) + picture_bytes(plan, info, missing) + manifest


def sample_batch(
    pipeline: Pipeline, texts: PromptEncoder, plan: dict[str, Any], batch: list[dict], num_steps: int
) -> Iterator[EulerStep]:
    """The Euler steps of one batch of images, as a generator.

    A short last batch is filled up with its last image: an image's bytes then depend on its place in a batch of
    the run's size and on nothing else, also when the run grows later.
    """
    cfg_weight = plan["cfg_scale"]
    batch = batch + batch[-1:] * (plan["batch_size"] - len(batch))
    text = texts.of([image["prompt"] for image in batch])
    noise = mx.concatenate([initial_noise(image["seed"], tuple(plan["latent_size"])) for image in batch])
    return euler_steps(pipeline, text, noise, num_steps, cfg_weight)


def write_latents(
    writer: BackgroundWriter, paths: CalibrationPaths, plan: Mapping[str, Any], batch: list[dict], step: EulerStep,
    complete: Container[int],
) -> None:  # fmt: skip
    """Hand the samples of one step to the writer, in the dtype that the model is given."""
    dtype = plan["activation_dtype"]
    x = to_numpy(step.x.astype(getattr(mx, dtype)))
    finite = np.isfinite(x).all(axis=(1, 2, 3))
    if not finite[: len(batch)].all():
        image = batch[int(np.argmin(finite))]["image_id"]
        way = (
            "a smaller --cfg-weight or another copy of the model"
            if dtype == "float32"
            else "--dtype float32 or a smaller --cfg-weight"
        )
        raise StoreError(f"step {step.step_index} of image {image} holds NaN or infinity; try {way}")
    timestep, sigma = to_numpy(step.timestep), float(step.sigma)
    for row, image in enumerate(batch):
        if image["image_id"] not in complete:
            arrays = sample_arrays(x[row : row + 1], timestep, sigma, step.step_index, image["image_id"], step.is_final)
            writer.submit(write_sample, paths, arrays, image_identity(plan, image["image_id"]))


def write_images(
    writer: BackgroundWriter,
    paths: CalibrationPaths,
    pipeline: Pipeline,
    batch: list[dict],
    x: mx.array,
    complete: Container[int],
) -> None:
    """Decode finished latents and hand the PNG files to the writer."""
    for row, image in enumerate(batch):
        if image["image_id"] not in complete:
            picture = decode_latents(pipeline, x[row : row + 1], [image["image_id"]])[0]
            writer.submit(write_png, paths.image(image["image_id"]), picture, picture_chunks(image))


def prompts_of(batches: Sequence[Sequence[dict]]) -> list[str]:
    return [image["prompt"] for batch in batches for image in batch]


def estimate_generation(
    pipeline: Pipeline, texts: PromptEncoder, paths: CalibrationPaths, plan: dict[str, Any], complete: dict[int, dict],
    together: bool, ranks: SingleProcess,
) -> Estimate:  # fmt: skip
    """Estimate what is left from a short run of this process's first batch: set-up, two steps, one decoded image."""
    batches = batches_to_do(plan, complete, ranks)
    missing = plan["num_images"] - len(complete)
    return Estimate(
        work=f"{missing} of {plan['num_images']} images",
        seconds=_probe_seconds(pipeline, texts, plan, batches, together) if batches else 0.0,
        bytes_written=bytes_to_do(plan, pipeline.info, missing),
        folder=paths.root,
        peak_bytes=mx.get_peak_memory(),
    )


def _probe_seconds(
    pipeline: Pipeline, texts: PromptEncoder, plan: dict[str, Any], batches: list[list[dict]], together: bool
) -> float:
    with closing(sample_batch(pipeline, texts, plan, batches[0], 1)) as steps:
        next(steps)  # warm-up: weights are in memory, the adaLN kernels compiled
    marks = [time.perf_counter()]
    with closing(sample_batch(pipeline, texts, plan, batches[0], 2)) as steps:
        for step in steps:
            marks.append(time.perf_counter())
    setup_seconds, step_seconds = marks[1] - marks[0], marks[-1] - marks[-2]
    cached_timesteps = 3
    per_batch = setup_seconds * (plan["num_steps"] + 1) / cached_timesteps + step_seconds * plan["num_steps"]
    decode_seconds = 0.0
    if plan["save_images"]:
        start = time.perf_counter()
        with decoding(pipeline, together):
            decode_latents(pipeline, step.x[:1])
        decode_seconds = time.perf_counter() - start
    return len(batches) * per_batch + sum(map(len, batches)) * decode_seconds
