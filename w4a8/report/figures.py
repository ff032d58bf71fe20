"""Draw a heat map of layers by step, and write a figure to the disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from calibration_store.files import atomic_file
from calibration_store.names import block_kind, block_of, layers_by_kind

NUMBERED_BLOCKS = 4  # the largest number of blocks whose numbers stand beside a kind of layer


def heat_map(
    path: Path, rows: Mapping[str, Sequence[float]], sigmas: Sequence[float], title: str, label: str, **style: Any
) -> None:
    """Draw one value per layer (rows, grouped by kind of layer) and step (columns) as a PNG.

    rows: {layer: a value for each of the sigmas}; label: names the colour bar; style: matplotlib's `norm` and `cmap`,
    and `ticks`, the values that the colour bar names.
    """
    ticks = style.pop("ticks", None)
    kinds = layers_by_kind(list(rows))
    matrix = np.array([rows[layer] for layers in kinds.values() for layer in layers], np.float64)
    figure, axes = pyplot.subplots(figsize=(9, 2 + max(0.045 * len(matrix), 0.2 * len(kinds))), layout="constrained")
    image = axes.imshow(matrix, aspect="auto", interpolation="nearest", **style)
    ends = np.cumsum([len(layers) for layers in kinds.values()])
    starts = ends - [len(layers) for layers in kinds.values()]
    axes.set_yticks((starts + ends - 1) / 2, [f"{kind} ({len(layers)})" for kind, layers in kinds.items()])
    every = [block_kind(block_of(layer)) for layers in kinds.values() for layer in layers]
    apart = max(1, -(-(1 + max(number for _, number in every)) // NUMBERED_BLOCKS))
    numbered = [(row, number) for row, (_, number) in enumerate(every) if number % apart == 0]
    blocks = axes.secondary_yaxis("right")
    blocks.set_yticks([row for row, _ in numbered], [str(number) for _, number in numbered], fontsize=5)
    blocks.set_ylabel("block", fontsize="small")
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1)
    columns = np.unique(np.linspace(0, len(sigmas) - 1, min(len(sigmas), 9)).round().astype(int))
    axes.set_xticks(columns, [f"{sigmas[column]:.2f}" for column in columns])
    axes.set(title=title, xlabel="sigma (noise on the left, image on the right)")
    figure.colorbar(image, label=label, ticks=ticks, aspect=40)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure as PNG, atomically, and close it."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
