"""LPIPS (Zhang et al. 2018) with AlexNet, where the package lpips and AlexNet's weights are on the machine."""

import importlib.util
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from w4a8.backend.lazy_imports import deferred

with deferred("lpips", "torch"):
    import lpips
    import torch

ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's file of AlexNet's weights, in the folder of torch.hub
SMALLEST_SIDE = 32  # pixels that AlexNet's layers need
PAIRS_AT_ONCE = 16  # pairs of images in a pass


def measures_lpips(images: np.ndarray) -> bool:
    """Return whether LPIPS can be measured of images (N, H, W, 3): nothing is downloaded for it."""
    return min(images.shape[1:3]) >= SMALLEST_SIDE and installed()


@cache
def installed() -> bool:
    """Return whether the package lpips, and the weights that it would otherwise download, are on the machine."""
    if any(importlib.util.find_spec(name) is None for name in ("lpips", "torch", "torchvision")):
        return False
    return os.path.isfile(Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET)


@cache
def _network() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips 0.1.4 calls torchvision by names that it warns of
        return lpips.LPIPS(net="alex", verbose=False).eval()


def lpips_distances(reference: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return LPIPS of each pair of images, (N,) float64; 0 for equal images. Both: (N, H, W, 3) uint8, sRGB."""

    def tensor(pixels: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / 127.5 - 1)

    found = []
    with torch.no_grad():
        for start in range(0, len(images), PAIRS_AT_ONCE):
            part = slice(start, start + PAIRS_AT_ONCE)
            found += _network()(tensor(reference[part]), tensor(images[part])).flatten().tolist()
    return np.array(found, np.float64)
