"""Values of the report's page: figures of a few digits, and images as data URLs."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

DIGITS = 6  # significant digits of a figure, enough to look at


def picture(image: Image.Image, side: int | None = None) -> str:
    """Return an image as a data URL: WebP, lossless up to 256 pixels, so that differences of small images stay exact.

    side: the longer side that the image is scaled down to, in pixels.
    """
    if side is not None and max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=max(image.size) <= 256, quality=92, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def short(value: Any) -> Any:
    """Return a finite number rounded to DIGITS; an integer, a boolean or a text as it is; None for anything else."""
    if not isinstance(value, float | np.floating) or not math.isfinite(value):
        return value if isinstance(value, bool | int | str) else None
    return float(f"{float(value):.{DIGITS}g}")


def shorts(figure: Mapping[str, Any]) -> dict[str, Any]:
    """Return a figure of metrics.json with `short` numbers, also those in its lists."""
    return {
        key: [short(one) for one in value] if isinstance(value, Sequence) else short(value)
        for key, value in figure.items()
    }
