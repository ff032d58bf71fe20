"""What stage 4 leaves: images and latents of each variant, and the metrics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration_store.errors import StoreError
from calibration_store.files import write_json
from calibration_store.layout import EvaluationPaths
from calibration_store.npz import read_npz, write_npz
from calibration_store.schema import FINITE, Member, Record

EVALUATION_FORMAT = "evaluation_v1"
EVALUATION_RUN = Record(
    {
        "images": Member(("uint8",), ("images", "height", "width", 3)),
        "latents": Member(("float32",), ("images", "states", "latent height", "latent width", 16), (FINITE,)),
        "identity": Member(("str2048",), ()),
    }
)


def read_variant(path: Path, identity: str, images: int, states: int, latent_size: tuple[int, int]) -> dict | None:
    """The images and latents of a variant, {"images", "latents"}; None unless the file is whole and what is asked for.

    identity: what they follow from (a digest); states: of a trajectory, its start included.
    """
    try:
        arrays = read_npz(path, "")
    except StoreError:  # damaged: made anew
        return None
    height, width = latent_size
    sizes = {"images": images, "states": states, "latent height": height, "latent width": width}
    if EVALUATION_RUN.fault(arrays, **sizes) or arrays["identity"].item() != identity:
        return None
    pictures = arrays["images"].shape[1:3]
    whole = pictures[0] % height == pictures[1] % width == 0 and pictures[0] // height == pictures[1] // width
    return arrays if whole else None


def write_variant(path: Path, identity: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the images and latents of a variant, and what they follow from."""
    write_npz(path, arrays | {"identity": np.array(identity)})


def write_metrics(
    paths: EvaluationPaths, parameters: Mapping[str, Any], low_psnr: float, variants: Mapping[str, Mapping]
) -> None:
    """Write metrics.json: the run's parameters, and every variant's figures."""
    content = {"format": EVALUATION_FORMAT, **parameters, "low_psnr": low_psnr, "variants": variants}
    write_json(paths.metrics, content)
