"""Files of stage 4: images and latents of each variant, and the metrics."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from msgspec import Meta

from calibration_store.errors import StoreError
from calibration_store.files import write_json
from calibration_store.layout import EvaluationPaths
from calibration_store.npz import LARGEST_NPZ, map_npz, read_npz, write_npz
from calibration_store.schema import (
    FINITE,
    Count,
    Digest,
    Index,
    JsonFormat,
    Member,
    Name,
    NotNegative,
    Record,
    Seed,
    Share,
    Steps,
    seed_fault,
)

EVALUATION_FORMAT = "evaluation_v1"
EVALUATION_RUN = Record(
    {
        "images": Member(("uint8",), ("images", "height", "width", 3)),
        "latents": Member(("float32",), ("images", "states", "latent height", "latent width", 16), (FINITE,)),
        "identity": Member(("str2048",), ()),
    }
)


class Figure(TypedDict):
    """A metric over all images. None: no image has a value (PSNR of equal images; FLIP where it is not installed)."""

    mean: float | None
    median: float | None
    worst: float | None
    interval: tuple[float | None, float | None]


class ImageMetrics(TypedDict):
    """The metrics of one image against the original's."""

    prompt: str
    psnr: float | None  # None: the image equals the original
    ssim: float
    flip: float | None


class Gain(TypedDict):
    """The gain of a variant over round-to-nearest, image by image, in dB."""

    over: Name
    mean: float
    interval: tuple[float, float]
    gained: Index
    images: Index


class _VariantMetrics(TypedDict):
    psnr: Figure
    ssim: Figure
    flip: Figure
    share_above_40_db: Share
    share_below_30_db: Share
    images: Annotated[list[ImageMetrics], Meta(min_length=1)]
    worst_image: Index


class VariantMetrics(_VariantMetrics, total=False):
    """The metrics of one variant."""

    gain: Gain  # absent where no round-to-nearest was measured beside it, and before 0.9.0


class StepEffect(TypedDict):
    """The effect of an error at one step, relative to the lengths of the velocity and of the finished latent."""

    step: Index
    sigma: NotNegative
    velocity_error: NotNegative
    moves: NotNegative  # the finished latent
    left: NotNegative  # of the error that the step put in, at the end


class StepEffects(TypedDict):
    """The effects of single steps that are computed with a variant's weights."""

    variant: Name
    images: Count
    steps: Annotated[list[StepEffect], Meta(min_length=1)]


class _Metrics(TypedDict):
    format: str
    prompts: list[str]
    num_steps: Steps
    seed: Seed
    variants: dict[Name, VariantMetrics]


class Metrics(_Metrics, total=False):
    """The entries of metrics.json that the toolkit reads; the file has more."""

    step_effects: StepEffects
    calibration_run: Digest  # identity of the run with selected_image_ids; files of 0.8.0 have neither key
    selected_image_ids: list[Index]
    weights_fingerprint: Digest | None
    model_version: Name
    w4a8_version: Name
    config: Name  # name of the file of ranges that --config gave


def metrics_fault(metrics: Metrics) -> str | None:
    """Return the first contradiction between entries of metrics.json, or None."""
    count = len(metrics["prompts"])
    for name, variant in metrics["variants"].items():
        if len(variant["images"]) != count or variant["worst_image"] >= count:
            return f"variants: {name} has figures of {len(variant['images'])} images, and there are {count}"
        for key in ("psnr", "ssim", "flip"):
            known = [variant[key][part] is None for part in ("mean", "median", "worst")]
            if any(known) and not all(known):
                return f"variants: {name}: {key} has some of mean, median and worst, and not all"
    return seed_fault(metrics["seed"])


METRICS = JsonFormat(EVALUATION_FORMAT, Metrics, "evaluate_quantization.py", metrics_fault, flag="")


def refuse_to_replace(
    paths: EvaluationPaths, prompts: Sequence[str], steps: int, seed: int, variants: Iterable[str]
) -> None:
    """Raise StoreError where a new evaluation would lose rows or images of the one in its folder.

    Nothing is lost where it has all of that one's variants, and its prompts first, with the same steps and seed. prompts,
    steps, seed, variants: of the new one. A file that cannot be read holds nothing that could be lost.
    """
    try:
        old = METRICS.read(paths.metrics)
    except StoreError:
        return
    count, lost = len(old["prompts"]), old["variants"].keys() - set(variants)
    same = (old["prompts"], old["num_steps"], old["seed"]) == (list(prompts[:count]), steps, seed)
    if lost or not same:
        raise StoreError(
            f"{paths.root}: holds an evaluation already, {count} images of {old['num_steps']} steps of "
            f"{', '.join(old['variants'])}; --output FOLDER leaves it alone, --force replaces it"
        )


def read_images(paths: EvaluationPaths, variant: str, count: int) -> np.ndarray | None:
    """Return the images (count, height, width, 3) uint8 that a variant drew, or None where it has no file.

    Raises StoreError for a damaged file, or one with another number of images.
    """
    remedy = "run evaluate_quantization.py again to make it anew"
    for path in paths.runs_of(variant):
        arrays = map_npz(path, ["images"], remedy, checked=True)
        fault = Record({"images": EVALUATION_RUN.members["images"]}).fault(arrays, images=count)
        if fault:
            raise StoreError(f"{path}: not what a variant drew ({fault}); {remedy}")
        return arrays["images"]
    return None


def read_variant(
    path: Path, identity: str, images: int, states: int, latent_size: tuple[int, int]
) -> dict[str, np.ndarray] | None:  # fmt: skip
    """Return the images and latents of a variant, or None unless the file is whole and of this identity and size.

    "images" are (images, height, width, 3) uint8, "latents" (images, states, h, w, 16) float32. identity: digest of
    everything that they follow from. states: of a trajectory, its start included. latent_size: (h, w).
    """
    height, width = latent_size
    latents = 4 * 16 * images * states * height * width  # bytes
    try:
        arrays = read_npz(path, "", EVALUATION_RUN.names, max(LARGEST_NPZ, 2 * latents))
    except StoreError:  # absent or damaged: the caller makes it anew
        return None
    sizes = {"images": images, "states": states, "latent height": height, "latent width": width}
    if EVALUATION_RUN.fault(arrays, **sizes) or arrays["identity"].item() != identity:
        return None
    pictures = arrays["images"].shape[1:3]
    whole = pictures[0] % height == pictures[1] % width == 0 and pictures[0] // height == pictures[1] // width
    return arrays if whole else None


def write_variant(path: Path, identity: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the images and latents of a variant. identity: digest of what they follow from. Raises WriteError."""
    write_npz(path, {**arrays, "identity": np.array(identity)})


def write_metrics(
    paths: EvaluationPaths, parameters: Mapping[str, Any], low_psnr: float, variants: Mapping[str, Mapping],
    effects: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write metrics.json: the run's parameters and every variant's metrics.

    low_psnr: in dB; effects: what an error at each step does, where it was measured. Raises WriteError.
    """
    content = {"format": EVALUATION_FORMAT, **parameters, "low_psnr": low_psnr, "variants": variants}
    content |= {} if effects is None else {"step_effects": effects}
    write_json(paths.metrics, content)
