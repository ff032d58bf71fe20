"""Measure how far a variant's images and latents are from the original's."""

import importlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from calibration_store.errors import OptionError
from w4a8.backend.lazy_imports import MissingPackage
from w4a8.backend.parallel import on_every_core
from w4a8.evaluation.paired import nearest_of
from w4a8.evaluation.perceptual import lpips_distances, measures_lpips

LOW_PSNR, HIGH_PSNR = 30.0, 40.0  # dB: metrics.json notes the shares of images below the first, and from the second on
FLIP_INSTALLED = importlib.util.find_spec("flip_evaluator") is not None  # no wheel for Linux on ARM
flip_evaluator = importlib.import_module("flip_evaluator") if FLIP_INSTALLED else None
BOOTSTRAP = 2000  # number of times that the images are drawn again for an interval


def image_metrics(reference: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return {"psnr", "ssim", "flip"} of each pair of images, (N,) float64 each, and "lpips" where it can be measured.

    reference and images: (N, H, W, 3) uint8. PSNR is in dB, infinite for equal images; FLIP is the mean of `flip_map`,
    NaN where its package is not installed.
    """

    def pair_metrics(pair: tuple[np.ndarray, np.ndarray]) -> tuple[float, float, float]:
        original, image = pair
        if np.array_equal(original, image):
            return np.inf, 1.0, 0.0 if FLIP_INSTALLED else np.nan
        psnr = peak_signal_noise_ratio(original, image, data_range=255)
        ssim = structural_similarity(original, image, channel_axis=2, data_range=255)
        return psnr, ssim, flip_map(original, image).mean(dtype=np.float64) if FLIP_INSTALLED else np.nan

    found = on_every_core(pair_metrics, zip(reference, images, strict=True))
    metrics = dict(zip(("psnr", "ssim", "flip"), np.array(list(found), np.float64).T, strict=True))
    return metrics | ({"lpips": lpips_distances(reference, images)} if measures_lpips(images) else {})


def flip_map(reference: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return FLIP (Andersson et al. 2020), (H, W) float32: the difference that a viewer sees at a pixel, from 0 to 1.

    The viewer flips between the images, at 67 pixels per degree. reference and image: (H, W, 3) uint8, sRGB. Raises
    MissingPackage without the package flip-evaluator (see FLIP_INSTALLED).
    """
    if flip_evaluator is None:
        raise MissingPackage(
            "flip-evaluator is not installed, and FLIP needs it (there is no wheel for Linux on ARM); "
            "leave --grid-map flip out"
        )
    pair = [np.ascontiguousarray(pixels, np.float32) / 255 for pixels in (reference, image)]
    found, _, _ = flip_evaluator.evaluate(*pair, "LDR", applyMagma=False, computeMeanError=False)
    return found[..., 0]


def step_errors(reference: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Return the relative error ‖x − x_fp‖ / ‖x_fp‖ of each image at each step, (N, steps + 1) float64.

    reference: x_fp, the original's latents; latents: x, the variant's; (N, steps + 1, h, w, 16) each.
    """
    axes = (2, 3, 4)
    difference = np.sqrt(np.square(latents.astype(np.float64) - reference).sum(axis=axes))
    return difference / np.sqrt(np.square(reference.astype(np.float64)).sum(axis=axes))


def effect_cosine(reference: np.ndarray, without: np.ndarray, latents: np.ndarray) -> float:
    """Return how much of a LoRA's effect a variant keeps: the mean cosine of x_fp − x_without and x − x_without.

    reference: x_fp, the original's finished latents; without: those of the original without its LoRAs; latents: x, the
    variant's; (N, h, w, 16) each. An image that the LoRAs do not change counts as 1 where the variant leaves it, else 0.
    """
    before, after = ((each.astype(np.float64) - without).reshape(len(without), -1) for each in (reference, latents))
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    same = (before == after).all(axis=1)
    cosines = np.where(lengths > 0, (before * after).sum(axis=1) / np.where(lengths > 0, lengths, 1), same)
    return float(cosines.mean())


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """Return the 95 % interval of the mean of values (n,), by drawing n of them with replacement BOOTSTRAP times."""
    picks = np.random.default_rng(seed).integers(values.size, size=(BOOTSTRAP, values.size))
    return np.quantile(values[picks].mean(axis=1), [0.025, 0.975]).tolist()


def add_gains(results: Mapping[str, dict[str, Any]]) -> None:
    """Add the entry `gain` to the metrics of every variant that `nearest_of` compares: the difference of PSNR in dB.

    It has the name `over`, the mean over images, its 95 % interval by drawing images again, and how many images gained
    of how many. An image that equals the original's in either variant has no PSNR, and is left out.
    """
    for name, row in results.items():
        over = nearest_of(name, results)
        if over is None:
            continue
        pairs = [(new["psnr"], old["psnr"]) for new, old in zip(row["images"], results[over]["images"], strict=True)]
        gains = np.array([new - old for new, old in pairs if new is not None and old is not None])
        if gains.size:
            row["gain"] = {
                "over": over,
                "mean": float(gains.mean()),
                "interval": bootstrap_interval(gains),
                "gained": int((gains > 0).sum()),
                "images": int(gains.size),
            }


def describe_variant(
    prompts: list[str], seed: int, reference: dict[str, np.ndarray], found: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Return a variant's entry in metrics.json.

    reference and found: {"images", "latents"} of the original and of the variant. The PSNR is that of the images that
    differ, and None where all images equal the original's. seed: image i was drawn with seed + i.
    """
    quality = image_metrics(reference["images"], found["images"])
    errors = step_errors(reference["latents"], found["latents"])
    psnr, ssim, flip = quality["psnr"], quality["ssim"], quality["flip"]
    order = np.argsort(psnr, kind="stable")
    different = psnr[~np.isinf(psnr)]  # equal images have no finite PSNR and are counted apart
    perceived = {"lpips": summary(-quality["lpips"], -1)} if "lpips" in quality else {}
    return perceived | {
        "psnr": summary(different) | {"interval": bootstrap_interval(different) if different.size else [None, None]},
        "ssim": summary(ssim) | {"interval": bootstrap_interval(ssim)},
        "flip": summary(-flip, -1) | {"interval": bootstrap_interval(flip) if FLIP_INSTALLED else [None, None]},
        "share_above_40_db": float((psnr >= HIGH_PSNR).mean()),
        "share_below_30_db": float((psnr < LOW_PSNR).mean()),
        "equal_images": int(np.isinf(psnr).sum()),
        "step_error": {"mean": errors.mean(axis=0).tolist(), "worst": errors.max(axis=0).tolist()},
        "max_step_error": finite_or_none(errors.mean(axis=0).max()),
        "worst_prompts": [
            {"prompt": prompts[i], "seed": seed + int(i), "psnr": finite_or_none(psnr[i])} for i in order[:3]
        ],
        "images": [
            {"prompt": p, "psnr": finite_or_none(a), "ssim": float(b), "flip": finite_or_none(c)}
            for p, a, b, c in zip(prompts, psnr, ssim, flip, strict=True)
        ],
        "worst_image": int(order[0]),
    }


def read_reference(folder: Path, count: int, sides: tuple[int, int]) -> np.ndarray:
    """Read the pictures 0000.png … of a folder, (count, height, width, 3) uint8. sides: (height, width).

    Raises OptionError where a picture is missing, cannot be read, or has another size.
    """
    found = np.empty((count, *sides, 3), np.uint8)
    for index in range(count):
        path = folder / f"{index:04d}.png"
        try:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise OptionError(f"--reference {path}: no picture that can be read ({error})") from None
        if pixels.shape[:2] != sides:
            given, wanted = (" x ".join(map(str, each[::-1])) for each in (pixels.shape[:2], sides))
            raise OptionError(f"--reference {path}: {given} pixels, and the variants have {wanted}")
        found[index] = pixels
    return found


def compare_with_reference(reference: np.ndarray, images: Mapping[str, np.ndarray], results: dict[str, dict]) -> None:
    """Add the entry `reference` to every variant's metrics: PSNR, SSIM and FLIP against other pictures.

    reference and images, {variant: images}: (N, H, W, 3) uint8.
    """
    for name, drawn in images.items():
        quality = image_metrics(reference, drawn)
        different = quality["psnr"][~np.isinf(quality["psnr"])]
        results[name]["reference"] = {
            "psnr": summary(different), "ssim": summary(quality["ssim"]), "flip": summary(-quality["flip"], -1),
        }  # fmt: skip


def summary(values: np.ndarray, sign: int = 1) -> dict[str, float | None]:
    """Return mean, median and worst of values (n,), times sign; None for each without values.

    The worst value is the smallest; sign −1 goes with negated values of which the largest is the worst.
    """
    if not values.size:
        return dict.fromkeys(("mean", "median", "worst"))
    found = {"mean": values.mean(), "median": np.median(values), "worst": values.min()}
    return {name: finite_or_none(sign * value) for name, value in found.items()}


def finite_or_none(value: float) -> float | None:
    """Return a number as JSON can hold it: None for infinity and NaN."""
    return float(value) if math.isfinite(value) else None
