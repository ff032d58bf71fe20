"""PNG files that the stages write.

Each names its image in text chunks, which tell it from files of other programs and from pictures of other images.
"""

import contextlib
import io
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import orjson
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from calibration_store.errors import StoreError
from calibration_store.files import TEMP_SUFFIX, read_bytes

OUR_CHUNK = "calibration_image"  # keyword in the pictures of stage 1
DRAWN_CHUNK = "drawn_image"  # keyword in the pictures of draw_images.py
VARIANT_CHUNK = "variant"  # keyword in the pictures of stage 4
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, struct.error, MemoryError)  # PIL raises these for damaged files
PNG_HEAD = struct.Struct(">8s4x4s2L")  # signature, IHDR, width, height
MOST_PIXELS = 2**26
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNK = struct.Struct(">L4s")  # the beginning of a chunk: length of its data, type


@contextlib.contextmanager
def opened_png(path: Path, remedy: str, most_pixels: int = MOST_PIXELS) -> Iterator[PngImageFile]:
    """Open a PNG of at most `most_pixels` pixels, and no other format; PIL decodes it when the block uses it.

    Raises StoreError in one line: the file is missing, not a regular file, not a PNG, larger, or found damaged by the
    block.
    """
    content = read_bytes(path, remedy)
    try:
        signature, chunk, width, height = PNG_HEAD.unpack_from(content)
        if (signature, chunk) != (PNG_SIGNATURE, b"IHDR") or width * height > most_pixels:
            raise ValueError("no PNG of this size")
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            assert isinstance(picture, PngImageFile)  # the only class of this format
            yield picture
    except PICTURE_ERRORS:
        raise StoreError(f"{path}: damaged, or no PNG of at most {most_pixels} pixels; {remedy}") from None


def picture_chunks(image: Mapping[str, Any]) -> dict[str, str]:
    """Return the text chunks of the PNG of an image, its entry in the manifest."""
    return {OUR_CHUNK: str(image["image_id"]), "caption": image["prompt"], "seed": str(image["seed"])}


def quoted(name: str) -> str:
    """Return a name as readers of `parameters` take it: as a JSON text where it holds a comma, a colon or a quote."""
    return orjson.dumps(name).decode() if set(name) & set(',:"\n') else name


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
    """Return the text chunks of a PNG that draw_images.py writes.

    `parameters` is what programs for generated images read, in their notation. No chunk is called `prompt`, because
    node editors read a graph in JSON there. size: (width, height). model: a folder is named without its parents, which
    would tell of the maker's machine. Without guidance `parameters` has 1, which turns it off in other programs.
    """
    model = quoted(PurePath(model).name if PurePath(model).is_absolute() else model)
    settings = f"Steps: {steps}, Sampler: Euler, CFG scale: {cfg_weight or 1:g}, Seed: {seed}, "
    settings += f"Size: {size[0]}x{size[1]}, Model: {model}"
    negative = f"Negative prompt: {negative_prompt}\n" if negative_prompt else ""
    return {
        DRAWN_CHUNK: str(index),
        "parameters": f"{prompt}\n{negative}{settings}",
        "caption": prompt,
        "negative_prompt": negative_prompt,
        "seed": str(seed),
        "model": model,
        "num_steps": str(steps),
        "cfg_weight": f"{cfg_weight:g}",
    }


def listed_pictures(manifest: Path) -> set[str]:
    """Return the names of the PNG files that a manifest of any version lists."""
    try:
        images = orjson.loads(read_bytes(manifest, ""))["images"]
        return {Path(image["filename"]).name for image in images if image["filename"]}
    except (StoreError, ValueError, TypeError, KeyError, RecursionError):  # absent or damaged: it lists no picture
        return set()


def is_our_picture(path: Path, chunk: str = OUR_CHUNK) -> bool:
    """Return whether the stage that writes this chunk wrote a file; the name decides for a temporary one."""
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
    """Return whether a file is the whole PNG of this image, its entry in the manifest. size: (width, height)."""
    try:
        with opened_png(path, "", size[0] * size[1]) as picture:
            if picture.size != size or picture.mode != "RGB":
                return False
            picture.load()
            return is_of(picture, image)
    except StoreError:
        return False


def is_of(picture: PngImageFile, image: Mapping[str, Any]) -> bool:
    """Return whether the text chunks of a picture are those of this image, its entry in the manifest."""
    chunks = picture_chunks(image)
    return {key: picture.text.get(key) for key in chunks} == chunks
