"""Draw docs/quality.png: images of an evaluation in rows, the original, rounded to nearest, and learned, with heads in words.

python tools/quality_picture.py calibration_data/good docs/quality.png
"""

from pathlib import Path

import click
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from calibration_store.evaluation import METRICS
from calibration_store.files import write_png
from calibration_store.layout import EvaluationPaths
from w4a8.cli import stage_command

ROWS = (("fp", "original"), ("w4-rtn", "4 bits, nearest"), ("w4-adaround", "4 bits, learned"))
ALIKE = 1  # pictures whose prompts begin with the same word
COLUMNS, CELL, GAP, HEAD = 6, 108, 4, 124  # pictures in a row; pixels of a picture, between them, and of a row's head


@stage_command
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
def main(folder: Path, output: Path) -> None:
    """Draw the images that rounding to nearest damages most among those that learning repairs, with their PSNR."""
    paths = EvaluationPaths(folder / "evaluation")
    metrics = METRICS.read(paths.metrics)
    variants, prompts = metrics["variants"], metrics["prompts"]
    psnr = {name: [image["psnr"] or 99.0 for image in variants[name]["images"]] for name, _ in ROWS[1:]}
    gains = [learned - nearest for nearest, learned in zip(psnr["w4-rtn"], psnr["w4-adaround"], strict=True)]
    worst = sorted(range(len(gains)), key=lambda index: psnr["w4-rtn"][index])[: len(gains) // 2]
    chosen: list[int] = []
    for index in sorted(worst, key=lambda index: -gains[index]):
        alike = [other for other in chosen if prompts[other].split()[0] == prompts[index].split()[0]]
        chosen += [index] if len(chosen) < COLUMNS and len(alike) < ALIKE else []
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 13)
    line = 17
    sheet = Image.new("RGB", (HEAD + COLUMNS * (CELL + GAP), len(ROWS) * (CELL + line + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (variant, words) in enumerate(ROWS):
        top = row * (CELL + line + GAP)
        draw.text((2, top + CELL // 2 - 8), words, "black", font)
        for column, index in enumerate(chosen):
            left = HEAD + column * (CELL + GAP)
            with Image.open(paths.image(variant, index)) as picture:
                sheet.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
            said = f"{psnr[variant][index]:.1f} dB" if variant in psnr else ""
            draw.text((left + CELL // 2, top + CELL + 1), said, "black", font, anchor="ma")
    write_png(output, sheet, {})
    click.echo(f"wrote {output}: images {', '.join(map(str, chosen))}")


if __name__ == "__main__":
    main()
