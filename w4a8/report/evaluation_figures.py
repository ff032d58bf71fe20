"""The figures of stage 4: the grid of images, the plot of errors along the schedule, and the images themselves."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib import colormaps, font_manager, pyplot
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from calibration_store.files import remove_folder, write_png
from calibration_store.layout import EvaluationPaths
from calibration_store.pictures import VARIANT_CHUNK
from w4a8.evaluation.metrics import flip_map
from w4a8.report.figures import save_figure

GRID_ROWS = 8
DASHES = ("-", "--", ":", "-.")  # of curves, which may lie on each other
SMALLEST_CELL, LARGEST_CELL = 96, 256  # pixels; limits of a cell's longer side, which else is that of the images


def draw_grid(
    path: Path,
    prompts: list[str],
    reference: np.ndarray,
    found: dict[str, np.ndarray],
    results: dict,
    flip: bool = False,
) -> None:
    """Write the grid: a row for each prompt, a column for the original, and two for each variant.

    The two columns are the variant's image, and its difference ×4 or (flip) its FLIP map. Every variant's worst image
    is among the rows. reference: the original's images (N, H, W, 3) uint8; found: {variant: its images}; results:
    {variant: its entry in metrics.json}.
    """
    chosen = grid_rows(len(reference), [row["worst_image"] for row in results.values()])
    rows, gap, left, top = len(chosen), 6, 110, 44
    width, height = cell_size(*reference.shape[1:3])
    columns = 1 + 2 * len(found)
    sheet = Image.new("RGB", (left + columns * (width + gap), top + rows * (height + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 11)

    def put(row: int, column: int, pixels: np.ndarray) -> None:
        scaled = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(scaled, (left + column * (width + gap), top + row * (height + gap)))

    def title(column: int, text: str) -> None:
        draw.multiline_text((left + column * (width + gap), 6), text, fill="black", font=font)

    title(0, "original")
    draw.multiline_text((4, 6), f"{rows} of {len(reference)} shown,\nworst included", fill="black", font=font)
    for row, image in enumerate(chosen):
        put(row, 0, reference[image])
        caption = "\n".join(textwrap.wrap(f"{image}: {prompts[image]}", 17)[:5])
        draw.multiline_text((4, top + row * (height + gap) + 8), caption, fill="black", font=font)
    for position, (name, images) in enumerate(found.items()):
        mean = results[name]["psnr"]["mean"]
        title(1 + 2 * position, "\n".join(textwrap.wrap(name.replace("+", " + "), 15)[:2]))
        title(
            2 + 2 * position,
            f"{'FLIP' if flip else 'difference ×4'}\n{'inf' if mean is None else f'{mean:.1f}'} dB mean",
        )
        for row, image in enumerate(chosen):
            put(row, 1 + 2 * position, images[image])
            put(row, 2 + 2 * position, (flip_picture if flip else difference)(reference[image], images[image]))
    write_png(path, sheet)


def cell_size(height: int, width: int) -> tuple[int, int]:
    """Return (width, height) of a cell: those of the image, scaled where its longer side is outside the limits."""
    longer = max(height, width)
    scale = min(max(longer, SMALLEST_CELL), LARGEST_CELL) / longer
    return round(width * scale), round(height * scale)


def write_sheets(
    paths: EvaluationPaths, prompts: list[str], seed: int, original: np.ndarray, found: dict[str, np.ndarray]
) -> None:
    """Write every image at its full size, the original's in fp/, after removing the images of an earlier run.

    original: (N, H, W, 3) uint8; found: {variant: its images}; seed: image i was drawn with seed + i.
    """
    for folder, ours in paths.image_folders():
        remove_folder(folder, ours)
    for variant, images in {"fp": original, **found}.items():
        for index, pixels in enumerate(images):
            chunks = {"caption": prompts[index], "seed": str(seed + index), VARIANT_CHUNK: variant}
            write_png(paths.image(variant, index), Image.fromarray(pixels), chunks)


def grid_rows(count: int, worst: list[int]) -> list[int]:
    """Return the indices of the images that are shown: the worst of each variant, then the first ones."""
    shown = list(dict.fromkeys(worst))[:GRID_ROWS]
    shown += [image for image in range(count) if image not in shown][: GRID_ROWS - len(shown)]
    return sorted(shown)


def difference(reference: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return four times the absolute difference of two images, (H, W, 3) uint8."""
    return np.clip(np.abs(image.astype(int) - reference.astype(int)) * 4, 0, 255).astype(np.uint8)


def flip_picture(reference: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return the FLIP map in its authors' colours, (H, W, 3) uint8; black is a pixel without a visible difference."""
    return (colormaps["magma"](flip_map(reference, image))[..., :3] * 255).astype(np.uint8)


def plot_errors(path: Path, results: dict[str, dict]) -> None:
    """Write the plot of the latents' relative error along the schedule.

    results: {variant: its entry in metrics.json}.
    """
    figure, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    for number, (name, row) in enumerate(results.items()):
        if any(row["step_error"]["mean"]):
            errors, dash = row["step_error"]["mean"][1:], DASHES[number % len(DASHES)]  # all start from the same noise
            axes.plot(range(1, len(errors) + 1), errors, label=name, linestyle=dash, linewidth=2.2)
    axes.set(xlabel="step (noise on the left, image on the right)", ylabel="relative error of the latent", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    save_figure(figure, path)
