"""Stage 1's manifest, and what later stages derive from it: the run's identity, images and steps."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import orjson
from msgspec import Meta

from calibration_store.choices import Precision, TextBits
from calibration_store.errors import StoreError
from calibration_store.files import sync_folder, write_json
from calibration_store.layout import CalibrationPaths
from calibration_store.limits import MOST_LORA_SCALE
from calibration_store.schema import (
    Count,
    Digest,
    Guidance,
    Images,
    Index,
    JsonFormat,
    Name,
    Prompt,
    RelativePath,
    Seed,
    Shift,
    Side,
    Steps,
    seed_fault,
)

MANIFEST_FORMAT = "calibration_manifest_v1"
GENERATE = "generate_calibration_data.py"


class ImageEntry(TypedDict):
    """A finished image in `images`."""

    image_id: Index
    prompt: Prompt
    negative_prompt: str
    seed: Seed
    cfg_weight: Guidance
    num_steps: Steps
    filename: RelativePath | None


class _Manifest(TypedDict):
    format: Literal["calibration_manifest_v1"]
    model_version: Name
    num_steps: Steps
    cfg_scale: Guidance
    latent_size: tuple[Side, Side]
    use_t5: bool
    sampler_shift: Shift
    seed_base: Seed
    activation_dtype: Precision
    num_images: Images
    n_completed: Index
    package_versions: dict[str, str]
    images: list[ImageEntry]


class LoraEntry(TypedDict):
    """A LoRA in `loras`."""

    file: Name
    scale: Annotated[float, Meta(ge=-MOST_LORA_SCALE, le=MOST_LORA_SCALE)]


class Manifest(_Manifest, total=False):
    """The entries of manifest.json.

    Files of version 0.2.0 have no `weights_fingerprint`. `completed` adds the other entries that a file may lack.
    """

    negative_prompt: str
    stride: Steps
    batch_size: Count
    save_images: bool
    prompts_sha256: Digest
    local_checkpoint: Name | None
    architecture: Literal["sd3", "flux"]  # absent: sd3
    guidance: Guidance  # that FLUX.1-dev embeds; absent: the model embeds none
    shift: Shift  # that --shift gave; absent: the model's own
    text_bits: TextBits  # of T5's linear layers; absent: 16
    loras: list[LoraEntry]  # fused into the transformer's weights; absent: no LoRA
    weights_fingerprint: Digest
    batch_option: Count  # as --batch-size was given; a run of fewer images has fewer rows in a pass


SHARED_WITH_IMAGES = {"cfg_weight": "cfg_scale", "negative_prompt": "negative_prompt", "num_steps": "num_steps"}


def completed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with every key.

    Keys that other programs leave out are derived from the images, or get stage 1's defaults.
    """
    images = manifest["images"]
    usual = {
        "negative_prompt": images[0]["negative_prompt"] if images else "",
        "stride": 1,
        "batch_size": 1,
        "save_images": any(image["filename"] is not None for image in images),
        "prompts_sha256": manifest.get("prompts_sha256") or prompts_digest([image["prompt"] for image in images]),
    }
    return {**usual, "batch_option": manifest.get("batch_size", 1), **manifest}


def manifest_fault(content: Manifest) -> str | None:
    """Return the first contradiction between entries of a manifest, or None."""
    manifest = completed(content)
    images = manifest["images"]
    if seed_fault(manifest["seed_base"] + manifest["num_images"] - 1):
        return f"seeds of {manifest['num_images']} images from {manifest['seed_base']} are above 2^64 - 1"
    if not len(images) == manifest["n_completed"] <= manifest["num_images"]:
        return f"{len(images)} images, n_completed {manifest['n_completed']}, num_images {manifest['num_images']}"
    shared = {key: manifest[name] for key, name in SHARED_WITH_IMAGES.items()}
    for image in images:
        image_id = image["image_id"]
        own = shared | {"seed": manifest["seed_base"] + image_id}
        own["filename"] = f"images/{image_id:04d}.png" if manifest["save_images"] else None
        for key, expected in own.items():
            if image[key] != expected:
                return f"image {image_id}: {key} {image[key]!r}, expected {expected!r}"
    if manifest["batch_size"] > min(manifest["batch_option"], manifest["num_images"]):
        return f"batch_size {manifest['batch_size']} is above what was asked for, or the number of images"
    ids = [image["image_id"] for image in images]
    if ids != sorted(set(ids)) or (ids and ids[-1] >= manifest["num_images"]):
        return "image_ids are not distinct and ascending below num_images"
    if len(images) == manifest["num_images"]:
        digest = prompts_digest([image["prompt"] for image in images])
        if digest != manifest["prompts_sha256"]:
            return "prompts are not those of prompts_sha256"
    return None


MANIFEST = JsonFormat(MANIFEST_FORMAT, Manifest, GENERATE, manifest_fault, limit=2**30)


def stored_dtype(activation_dtype: str) -> str:
    """Return the dtype in which latents of a run's precision are stored.

    NumPy has no bfloat16; float32 holds its values exactly.
    """
    return "float32" if activation_dtype == "bfloat16" else activation_dtype


def prompts_digest(prompts: Sequence[str]) -> str:
    """Return the SHA-256 of the prompts in order, joined by line feeds; --resume recognizes another list by it."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def read_manifest(calib_dir: Path) -> dict[str, Any]:
    """Read the manifest of a calibration folder, with every key (`completed`).

    Raises StoreError when the file is missing or damaged, of another format, or of version 0.2.0 or older.
    """
    path = CalibrationPaths(calib_dir).manifest
    remedy = f"copy it back from where it is whole; {GENERATE} --force starts over"
    manifest = MANIFEST.read(path, remedy if os.path.lexists(path) else None)
    if "weights_fingerprint" not in manifest:
        raise StoreError(
            f"{path}: of version 0.2.0 or older, which did not note the model's weights (and padded sd3-emoji's "
            f"prompts wrongly); run {GENERATE} with --force to make the run anew"
        )
    return completed(manifest)


IDENTITY_KEYS = (
    "weights_fingerprint", "num_steps", "cfg_scale", "negative_prompt", "latent_size", "use_t5", "sampler_shift",
    "seed_base", "activation_dtype", "batch_size",
)  # fmt: skip


def run_identity(manifest: Mapping[str, Any], image_ids: Iterable[int]) -> str:
    """Return the SHA-256 over everything that the samples of these images follow from.

    The values of IDENTITY_KEYS and the images' prompts decide, and neither the model's folder nor the size of the run.
    Raises StoreError when the run lacks one of the images.
    """
    prompts = {image["image_id"]: image["prompt"] for image in manifest["images"]}
    used = sorted(image_ids)
    missing = [image_id for image_id in used if image_id not in prompts]
    if missing:
        raise StoreError(f"the calibration run has no image {missing[0]}; finish it with {GENERATE} --resume")
    return _identity(manifest, [[image_id, prompts[image_id]] for image_id in used])


def image_identity(manifest: Mapping[str, Any], image_id: int) -> str | None:
    """Return `run_identity` of one image, or None where the run lacks it. A run that grows does not change it."""
    images = manifest["images"]
    at_its_place = image_id < len(images) and images[image_id]["image_id"] == image_id
    found = images[image_id : image_id + 1] if at_its_place else [i for i in images if i["image_id"] == image_id]
    return _identity(manifest, [[image_id, found[0]["prompt"]]]) if found else None


def _identity(manifest: Mapping[str, Any], prompts: Sequence[Sequence[int | str]]) -> str:
    keys = [list(v) if isinstance(v := manifest.get(key), tuple) else v for key in IDENTITY_KEYS]
    embedded = [manifest["guidance"]] if "guidance" in manifest else []
    if "text_bits" in manifest:
        embedded.append(["text_bits", manifest["text_bits"]])
    return hashlib.sha256(orjson.dumps([keys, prompts, *embedded])).hexdigest()


def same_run(manifest: Mapping[str, Any], made_from: Mapping[str, Any]) -> bool:
    """Return whether a file that notes its `calibration_run` and `selected_image_ids` comes from this run.

    A file that notes no run (another tool's) is believed.
    """
    noted, used = made_from.get("calibration_run"), made_from.get("selected_image_ids")
    if noted is None:
        return True
    if not used:
        return False
    known = {image["image_id"] for image in manifest["images"]}
    return set(used) <= known and noted == run_identity(manifest, used)


def refuse_other_run(calib_dir: Path, path: Path, made_from: Mapping[str, Any], remedy: str) -> None:
    """Raise StoreError where a file comes from another run than the calibration folder's (`same_run`).

    path: the file that the message names, made_from: its metadata. A folder without a manifest refuses nothing.
    """
    manifest = CalibrationPaths(calib_dir).manifest
    if manifest.exists() and not same_run(read_manifest(calib_dir), made_from):
        raise StoreError(f"{path}: made from another calibration run than {manifest}; {remedy}")


def select_images(
    manifest: Mapping[str, Any], num_images: int, before: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Return `num_images` entries of a finished run's images, evenly over the whole run, without repeats.

    before: the image_ids that a stage under way has chosen; they stay when the run has grown since. Raises StoreError
    when the run is unfinished or has fewer images.
    """
    images = manifest["images"]
    if before is not None:
        kept = [image for image in images if image["image_id"] in set(before)]
        if len(kept) == len(before) == num_images:
            return kept
    if len(images) < manifest["num_images"]:
        raise StoreError(
            f"the calibration run has {len(images)} of {manifest['num_images']} images; "
            f"finish it with {GENERATE} --resume and the same --calib-dir, --prompts and --latent-size "
            "(Issue 9)"
        )
    if num_images > len(images):
        raise StoreError(
            f"--num-images {num_images}: the calibration run has {len(images)} images; "
            f"give --num-images {len(images)} or fewer"
        )
    return [images[round(i)] for i in np.linspace(0, len(images) - 1, num_images)]


def saved_steps(num_steps: int, stride: int) -> list[int]:
    """Return the step indices that stage 1 stores: every stride-th, and num_steps for the finished latent."""
    return [*range(0, num_steps, stride), num_steps]


def select_steps(manifest: Mapping[str, Any], stride: int) -> list[int]:
    """Return the step indices of every stride-th model input that stage 1 stored."""
    return saved_steps(manifest["num_steps"], manifest["stride"])[:-1][::stride]


def write_manifest(paths: CalibrationPaths, plan: Mapping[str, Any], complete: Mapping[int, Mapping]) -> None:
    """Write manifest.json with a run's plan and its complete images, {image_id: entry}.

    The images' files survive a power loss from here on. Raises WriteError.
    """
    for folder in (paths.samples, paths.images):
        if folder.is_dir():
            sync_folder(folder)
    images = [complete[image_id] for image_id in sorted(complete)]
    write_json(paths.manifest, {**plan, "n_completed": len(images), "images": images})
    sync_folder(paths.root)
