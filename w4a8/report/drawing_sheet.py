"""The sheet compare.png of draw_images.py: the original's pictures, the other model's, their differences and figures."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from calibration_store.files import write_png
from calibration_store.pictures import DRAWN_CHUNK
from w4a8.drawing import Drawing
from w4a8.report.evaluation_figures import difference

GAP, TITLE = 8, 26  # pixels between cells, and above them
SMALLEST_DRAWN, LARGEST_DRAWN = 192, 512  # pixels; limits of a cell's width, which else is that of the images


def draw_pairs(
    path: Path, prompts: Sequence[str], drawings: Sequence[Drawing], found: Mapping[str, np.ndarray], size: int = 14
) -> None:
    """Write the sheet: a row for each prompt; columns for the compared model, for the first, and for the difference times 4.

    drawings: of the first model, then of the one that it is compared with, usually the original, which stands left. found: {"psnr", "ssim"} of every pair, (N,) each; size: of the font, in pixels.
    """
    drawings = drawings[::-1]
    height, width = drawings[0].images.shape[1:3]
    scale = min(max(SMALLEST_DRAWN / width, 1), LARGEST_DRAWN / width)
    cell = (round(width * scale), round(height * scale))
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
    captions = [
        [*textwrap.wrap(prompt, max(20, 3 * cell[0] * 2 // size - 2))[:2], f"PSNR {psnr:.1f} dB, SSIM {ssim:.4f}"]
        for prompt, psnr, ssim in zip(prompts, found["psnr"], found["ssim"], strict=True)
    ]
    line = size + 5
    rows = [cell[1] + line * len(caption) + 2 * GAP for caption in captions]
    sheet = Image.new("RGB", (GAP + 3 * (cell[0] + GAP), TITLE + GAP + sum(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    names = [
        Path(each.model).name + ("" if each.simulated is None else f", {each.simulated} simulated") for each in drawings
    ]
    for column, name in enumerate([*names, "difference × 4"]):
        while len(name) > 4 and draw.textlength(name, font) > cell[0]:
            name = "…" + name.lstrip("…")[1:]
        draw.text((GAP + column * (cell[0] + GAP), GAP), name, "black", font)
    top = TITLE + GAP
    for row, caption in enumerate(captions):
        pixels = [drawing.images[row] for drawing in drawings]
        for column, content in enumerate([*pixels, difference(*pixels)]):
            picture = Image.fromarray(content).resize(cell, Image.Resampling.LANCZOS)
            sheet.paste(picture, (GAP + column * (cell[0] + GAP), top))
        for number, text in enumerate(caption):
            draw.text((GAP, top + cell[1] + 3 + number * line), text, "black", font)
        top += rows[row]
    write_png(path, sheet, {DRAWN_CHUNK: "all", "models": ", ".join(drawing.model for drawing in drawings)})
