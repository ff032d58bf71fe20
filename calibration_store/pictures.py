"""Stage 1's pictures: each says in text chunks what it is of, which makes it ours and tells it from another image's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

from calibration_store.files import TEMP_SUFFIX

# A picture says what it is of, in text chunks: that makes it ours, and tells one image's picture from another's.
OUR_CHUNK = "calibration_image"
DRAWN_CHUNK = "drawn_image"
VARIANT_CHUNK = "variant"  # of an image that stage 4 wrote
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for damaged files


def picture_chunks(image: Mapping[str, Any]) -> dict[str, str]:
    """The text chunks of an image's PNG."""
    return {OUR_CHUNK: str(image["image_id"]), "prompt": image["prompt"], "seed": str(image["seed"])}


def drawing_chunks(
    index: int,
    prompt: str,
    negative_prompt: str,
    seed: int,
    steps: int,
    cfg_weight: float,
    size: tuple[int, int],
    model: str,
) -> dict[str, str]:
    """The text chunks of a drawn PNG; `parameters` is what image programs read, in their own notation. size (width, height)."""
    settings = f"Steps: {steps}, Sampler: Euler, CFG scale: {cfg_weight:g}, Seed: {seed}, Size: {size[0]}x{size[1]}, Model: {model}"
    negative = f"Negative prompt: {negative_prompt}\n" if negative_prompt else ""
    return {
        DRAWN_CHUNK: str(index),
        "parameters": f"{prompt}\n{negative}{settings}",
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": str(seed),
        "model": model,
        "num_steps": str(steps),
        "cfg_weight": f"{cfg_weight:g}",
    }


def listed_pictures(manifest: Path) -> set[str]:
    """Names of the PNG files that a manifest of any version lists."""
    try:
        images = orjson.loads(manifest.read_bytes())["images"]
        return {Path(image["filename"]).name for image in images if image["filename"]}
    except (OSError, ValueError, TypeError, KeyError):  # none, or damaged: it lists nothing
        return set()


def is_our_picture(path: Path, chunk: str = OUR_CHUNK) -> bool:
    """Whether stage 1 (or whoever writes this chunk) wrote a file (temporary ones: by their name)."""
    if path.suffix == TEMP_SUFFIX:
        return True
    try:
        with Image.open(path) as picture:
            return chunk in picture.text if picture.format == "PNG" else False
    except PICTURE_ERRORS:
        return False


def is_picture(path: Path, image: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Whether a file is the whole PNG of this image, size (width, height)."""
    try:
        with Image.open(path) as picture:
            if picture.format != "PNG" or picture.size != size or picture.mode != "RGB":
                return False
            picture.load()
            chunks = picture_chunks(image)
            return {key: picture.text.get(key) for key in chunks} == chunks
    except PICTURE_ERRORS:
        return False
