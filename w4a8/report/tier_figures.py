"""The figure of stage 3A'."""

from pathlib import Path

from matplotlib.colors import BoundaryNorm, ListedColormap

from calibration_store.choices import TIER_BITS
from w4a8.analysis.tiers import Decision
from w4a8.report.figures import heat_map


def plot_bits(path: Path, steps: dict[str, dict[str, Decision]], sigmas: dict[str, float]) -> None:
    """Write the map of bits, layer × step, of the layers that every step has. sigmas: {step key: sigma}."""
    layers = [name for name in next(iter(steps.values())) if all(name in step for step in steps.values())]
    bits = {name: [step[name].bits for step in steps.values()] for name in layers}
    colours = ListedColormap(["#fde725", "#21918c", "#440154"])
    norm = BoundaryNorm([3, 5, 7, 9], colours.N)
    heat_map(
        path, bits, [sigmas[key] for key in steps], "Activation bits", "bits", norm=norm, cmap=colours, ticks=TIER_BITS
    )
