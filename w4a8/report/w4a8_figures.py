"""The figures of stage 3A."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.colors import LogNorm

from calibration_store.names import layers_by_kind
from w4a8.analysis.w4a8_config import LayerStep
from w4a8.report.figures import heat_map, save_figure


def plot(
    paths: list[Path], steps: dict[str, dict[str, LayerStep]], sigmas: dict[str, float], config: dict[str, Any]
) -> None:
    """Write the figures of `figure_names`: the clipping range over sigma, and maps of clipping range and shift.

    A map is layer × step. Only layers that every step has are drawn. paths: one for each figure; sigmas: {step key:
    sigma}; config: quant_config.json, which the clipping ranges are taken from.
    """
    keys = list(steps)
    common = [name for name in steps[keys[0]] if all(name in layers for layers in steps.values())]
    used = config["per_timestep"]
    scales = {
        name: [used[key][name].get("clipping_range", used[key][name]["scale"]) for key in keys] for name in common
    }
    shifts = {
        name: [steps[key][name].largest_shift() for key in keys]
        for name in common
        if steps[keys[0]][name].shift is not None
    }
    columns = [sigmas[key] for key in keys]
    plot_bands(paths[0], scales, columns)
    heat_map(
        paths[1],
        scales,
        columns,
        "Clipping range of every layer's input",
        "clipping range",
        norm=LogNorm(),
        cmap="viridis",
    )
    if len(paths) > 2:
        heat_map(paths[2], shifts, columns, "Largest shift of the post-GELU layers", "max |shift|", cmap="magma")


def plot_bands(path: Path, scales: dict[str, list[float]], sigmas: list[float]) -> None:
    """Draw the clipping range over sigma: a panel for each kind of layer, with its blocks' median, quartiles, extremes.

    scales: {layer: its clipping range at each of the sigmas}.
    """
    kinds = layers_by_kind(list(scales))
    columns = min(4, len(kinds))
    figure, panels = pyplot.subplots(
        -(-len(kinds) // columns), columns, figsize=(3.2 * columns, 2.6 * -(-len(kinds) // columns)),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, (kind, layers) in zip(panels.flat, kinds.items(), strict=False):
        bands = np.quantile([scales[layer] for layer in layers], [0, 0.25, 0.5, 0.75, 1], axis=0)
        panel.fill_between(sigmas, bands[0], bands[4], color="tab:blue", alpha=0.15, linewidth=0, label="all blocks")
        panel.fill_between(sigmas, bands[1], bands[3], color="tab:blue", alpha=0.35, linewidth=0, label="middle half")
        panel.plot(sigmas, bands[2], color="tab:blue", label="median")
        panel.set(title=kind, yscale="log")
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(kinds) :]:
        panel.set_axis_off()
    panels[0, 0].invert_xaxis()  # the sampler goes from noise to image; all panels share the axis
    panels[0, 0].legend(fontsize="small")
    figure.supxlabel("sigma (noise on the left, image on the right)")
    figure.supylabel("clipping range")
    save_figure(figure, path)
