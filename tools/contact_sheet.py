"""Lay the images of a calibration run out on one sheet, each over its prompt.

python tools/contact_sheet.py --calib-dir calibration_data/demo --output sheet.png
"""

import textwrap
from pathlib import Path

import click
from PIL import Image, ImageDraw, ImageFont

from calibration_store.errors import StoreError
from calibration_store.files import atomic_file
from calibration_store.manifest import read_manifest
from calibration_store.pictures import opened_png
from w4a8.cli import calib_dir_option, stage_command


@stage_command
@calib_dir_option
@click.option(
    "--output", type=click.Path(path_type=Path), help="PNG to write.  [default: contact_sheet.png in --calib-dir]"
)
@click.option("--columns", type=click.IntRange(min=1), default=4, help="Images in a row.")
@click.option("--size", type=click.IntRange(min=32), default=192, help="Side of an image on the sheet, in pixels.")
def main(calib_dir: Path, output: Path | None, columns: int, size: int) -> None:
    """Lay the images of a calibration run out on one sheet."""
    images = [image for image in read_manifest(calib_dir)["images"] if image["filename"]]
    if not images:
        raise StoreError(f"{calib_dir}: no images; run generate_calibration_data.py without --no-images")
    margin, caption_height = 12, 40
    rows = -(-len(images) // columns)
    cell_height = size + caption_height
    sheet = Image.new("RGB", (columns * (size + margin) + margin, rows * (cell_height + margin) + margin), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, top = margin + column * (size + margin), margin + row * (cell_height + margin)
        with opened_png(calib_dir / image["filename"], "run generate_calibration_data.py with --resume") as picture:
            sheet.paste(picture.resize((size, size), Image.Resampling.LANCZOS), (left, top))
        caption = "\n".join(textwrap.wrap(image["prompt"], width=size // 7)[:2])
        draw.multiline_text((left, top + size + 4), caption, fill="black", font=font)
    output = output or calib_dir / "contact_sheet.png"
    with atomic_file(output) as file:
        sheet.save(file, "PNG")
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
