"""How far a variant's images are from the original's."""

import math
from typing import Any

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

LOW_PSNR = 30.0  # dB: images below are counted
BOOTSTRAP = 2000


def image_metrics(reference: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
    """PSNR in dB (infinite for equal images) and SSIM of each pair, (N,) float64."""
    psnr, ssim = [], []
    for original, image in zip(reference, images, strict=True):
        equal = np.array_equal(original, image)
        psnr.append(np.inf if equal else peak_signal_noise_ratio(original, image, data_range=255))
        ssim.append(structural_similarity(original, image, channel_axis=2, data_range=255))
    return {"psnr": np.array(psnr), "ssim": np.array(ssim)}


def step_errors(reference: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Relative error ‖x − x_fp‖ / ‖x_fp‖ of each image at each step: (N, steps + 1)."""
    axes = (2, 3, 4)
    difference = np.sqrt(np.square(latents.astype(np.float64) - reference).sum(axis=axes))
    return difference / np.sqrt(np.square(reference.astype(np.float64)).sum(axis=axes))


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """95 % interval of the mean over images, by resampling them."""
    picks = np.random.default_rng(seed).integers(values.size, size=(BOOTSTRAP, values.size))
    return np.quantile(values[picks].mean(axis=1), [0.025, 0.975]).tolist()


def describe_variant(
    prompts: list[str], seed: int, reference: dict[str, np.ndarray], found: dict[str, np.ndarray]
) -> dict[str, Any]:
    """A variant's entry in metrics.json. PSNR is that of the images that differ; null when all equal the original."""
    quality = image_metrics(reference["images"], found["images"])
    errors = step_errors(reference["latents"], found["latents"])
    psnr, ssim = quality["psnr"], quality["ssim"]
    order = np.argsort(psnr, kind="stable")
    different = psnr[~np.isinf(psnr)]  # images that equal the original have no finite PSNR: they are counted apart
    return {
        "psnr": summary(different) | {"interval": bootstrap_interval(different) if different.size else [None, None]},
        "ssim": summary(ssim) | {"interval": bootstrap_interval(ssim)},
        "share_below_30_db": float((psnr < LOW_PSNR).mean()),
        "equal_images": int(np.isinf(psnr).sum()),
        "step_error": {"mean": errors.mean(axis=0).tolist(), "worst": errors.max(axis=0).tolist()},
        "max_step_error": finite(errors.mean(axis=0).max()),
        "worst_prompts": [{"prompt": prompts[i], "seed": seed + int(i), "psnr": finite(psnr[i])} for i in order[:3]],
        "images": [
            {"prompt": p, "psnr": finite(a), "ssim": float(b)} for p, a, b in zip(prompts, psnr, ssim, strict=True)
        ],
    }


def summary(values: np.ndarray) -> dict[str, float | None]:
    """Mean, median and worst; None without values."""
    if not values.size:
        return dict.fromkeys(("mean", "median", "worst"))
    return {"mean": finite(values.mean()), "median": finite(np.median(values)), "worst": finite(values.min())}


def finite(value: float) -> float | None:
    """JSON has no infinity: None."""
    return float(value) if math.isfinite(value) else None
