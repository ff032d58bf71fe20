"""Stage 1's pictures: each says in text chunks what it is of, which makes it ours and tells it from another image's."""

import contextlib
import io
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

from calibration_store.errors import StoreError
from calibration_store.files import TEMP_SUFFIX, read_bytes

# A picture says what it is of, in text chunks: that makes it ours, and tells one image's picture from another's.
OUR_CHUNK = "calibration_image"
DRAWN_CHUNK = "drawn_image"
VARIANT_CHUNK = "variant"  # of an image that stage 4 wrote
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, struct.error, MemoryError)  # what PIL raises for damaged files
PNG_HEAD = struct.Struct(">8s4x4s2L")  # signature, IHDR, width, height
MOST_PIXELS = 2**26
PNG_SIGNATURE, PNG_CHUNK = b"\x89PNG\r\n\x1a\n", struct.Struct(">L4s")  # a chunk begins with the length of its data and its type


@contextlib.contextmanager
def opened_png(path: Path, remedy: str, most_pixels: int = MOST_PIXELS) -> Iterator[Image.Image]:
    """Open a PNG of at most `most_pixels` pixels, and no other format; PIL decodes it when it is used.

    Raises StoreError in one line: missing, no regular file, no PNG, larger, or damaged where the block finds it so.
    """
    content = read_bytes(path, remedy)
    try:
        signature, chunk, width, height = PNG_HEAD.unpack_from(content)
        if (signature, chunk) != (PNG_SIGNATURE, b"IHDR") or width * height > most_pixels:
            raise ValueError("no PNG of this size")
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            yield picture
    except PICTURE_ERRORS:
        raise StoreError(f"{path}: damaged, or no PNG of at most {most_pixels} pixels; {remedy}") from None


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
        images = orjson.loads(read_bytes(manifest, ""))["images"]
        return {Path(image["filename"]).name for image in images if image["filename"]}
    except (StoreError, ValueError, TypeError, KeyError, RecursionError):  # none, or damaged: it lists nothing
        return set()


def is_our_picture(path: Path, chunk: str = OUR_CHUNK) -> bool:
    """Whether stage 1 (or whoever writes this chunk) wrote a file (temporary ones: by their name)."""
    if path.suffix == TEMP_SUFFIX:
        return True
    try:
        return chunk in text_keywords(read_bytes(path, ""))
    except StoreError:
        return False


def text_keywords(png: bytes) -> set[str]:
    """Return the keywords of a PNG's text chunks, without decoding its pixels; the empty set for other files."""
    found, at = set(), len(PNG_SIGNATURE)
    while png.startswith(PNG_SIGNATURE) and at + PNG_CHUNK.size <= len(png):
        size, kind = PNG_CHUNK.unpack_from(png, at)
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            begin = at + PNG_CHUNK.size
            found.add(png[begin : begin + min(size, 80)].partition(b"\0")[0].decode("latin-1"))
        at += PNG_CHUNK.size + size + 4
    return found


def is_picture(path: Path, image: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Whether a file is the whole PNG of this image, size (width, height)."""
    try:
        with opened_png(path, "", size[0] * size[1]) as picture:
            if picture.size != size or picture.mode != "RGB":
                return False
            picture.load()
            return is_of(picture, image)
    except StoreError:
        return False


def is_of(picture: Image.Image, image: Mapping[str, Any]) -> bool:
    """Return whether a picture says that it is of this image, its entry in the manifest."""
    chunks = picture_chunks(image)
    return {key: picture.text.get(key) for key in chunks} == chunks
