"""Stage 3A: from activation statistics to a W4A8 configuration (TaQ-DiT).

Reads   activations/layer_statistics.json and activations/timestep_stats/ (stage 2A, or another tool's)
Writes  activations/quant_config.json, activations/layer_temporal_analysis.json, with --plot three PNG figures

python analyze_activations.py --plot

Every layer gets 8 bits at every step. `scale` is its average range, for post-GELU layers `shifted_scale` that of
x − shift. Where a few channels are far wider than the others, TaQ-DiT's migration divides them by small integers m
(`outlier_config`). What is quantized is (x − shift) / m, clipped at `clipping_range`: the widest that any image had, or
less where clipping costs less than coarser steps; the integer step is a 127th of it. Migration multiplies W by m: beside
weights that were rounded without it x − shift is quantized, clipped at `unmigrated_clipping_range`. The model is not
needed: NumPy only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli_options import analysis_options, calib_dir_option, heat_map, layers_by_kind, save_figure, stage_command

if TYPE_CHECKING:
    import numpy as np

    from calibration_store import ActivationStatistics, LayerStatistics

FIGURES = ("scale_over_sigma.png", "scale_map.png", "shift_map.png")
DEAD_SCALE = 1.0  # of a layer that saw nothing but zeros: any positive range is exact


@dataclass
class LayerStep:
    """One layer at one step: what the config says of it, and what that follows from."""

    scale: float
    shift: "np.ndarray | None"  # (channels,) float32
    shifted_scale: float | None
    reach: "np.ndarray"  # (channels,) float32: largest |x − shift| of all images
    power: "np.ndarray | None"  # (channels,) float32: E[(x − shift)²]
    unmigrated_range: float  # where x − shift is clipped


def describe_layer(layer: "LayerStatistics", use_hist_p999: bool) -> LayerStep:
    """The ranges of one layer at one step. Raises ValueError when a percentile is asked for and cannot be had."""
    import numpy as np

    from quantizers import unmigrated_clipping_ranges

    scale, shifted_scale, shift = layer.tensor_absmax(), None, None
    if layer.shift is not None:
        shifted_scale, shift = float(layer.reach().max()), np.array(layer.shift, np.float32)
    reach, power = layer.full_reach().astype(np.float32), layer.centred_power()
    unmigrated = float(unmigrated_clipping_ranges(layer.histogram, shift, reach, power, [8])[0]) or DEAD_SCALE
    if use_hist_p999:
        scale, shifted_scale = percentile_ranges(layer, shifted_scale)
    power = None if power is None else power.astype(np.float32)
    return LayerStep(scale or DEAD_SCALE, shift, shifted_scale, reach, power, unmigrated)


def percentile_ranges(layer: "LayerStatistics", shifted_absmax: float | None) -> tuple[float, float | None]:
    """The 99.9th percentiles of |x| and, after a shift, of |x − shift| (from the histogram of x and the shifts)."""
    import numpy as np

    from quantizers import absolute_histogram, centred_histogram, histogram_percentile

    known = layer.entry.get("hist_p999")
    if layer.counts is None and (known is None or layer.shift is not None):
        raise ValueError("--use-hist-p999 needs hist_counts and hist_edges, which the statistics lack; leave it out")
    scale = known if known is not None else histogram_percentile(*absolute_histogram(layer.counts, layer.edges), 0.999)
    if layer.shift is None:
        return float(scale), None
    centred = absolute_histogram(*centred_histogram(layer.counts, layer.edges, layer.shift))
    shifted = histogram_percentile(*centred, 0.999)
    if layer.moments is not None:  # where ordinary tokens lie must not be cut off, whatever the pooled histogram says
        shifted = max(shifted, float(np.abs(layer.moments[0] - layer.shift).max()))
    return float(scale), min(shifted_absmax, shifted)


def describe_steps(
    statistics: "ActivationStatistics", use_hist_p999: bool
) -> tuple[dict[str, dict[str, LayerStep]], dict[str, "np.ndarray"]]:
    """Every layer at every step, {step key: {layer: LayerStep}}, and each layer's widest average reach, (channels,).

    Raises StoreError that names file and layer.
    """
    import numpy as np

    from calibration_store import StoreError

    steps, widest = {}, {}
    for key in statistics.step_keys:
        layers = statistics.read_step(key)
        steps[key] = {}
        refuse_other_layers(statistics, key, layers, steps)
        for name, layer in layers.items():
            try:
                steps[key][name] = describe_layer(layer, use_hist_p999)
            except ValueError as error:
                raise StoreError(f"{statistics.timestep_dir}/step_{key}.npz: {name}: {error}") from None
            widest[name] = np.maximum(widest.get(name, 0), layer.reach())
    return steps, widest


def refuse_other_layers(statistics: "ActivationStatistics", key: str, layers: dict, steps: dict) -> None:
    """Raise StoreError when a layer has other channels, or no shift where it has one, at a step before this one."""
    from calibration_store import StoreError

    for name, layer in layers.items():
        before = next((step[name] for step in steps.values() if name in step), None)
        if before is None:
            continue
        if before.reach.shape != layer.avg_min.shape or (before.shift is None) != (layer.shift is None):
            raise StoreError(
                f"{statistics.timestep_dir}/step_{key}.npz: {name}: {layer.avg_min.size} channels, "
                f"{'no ' if layer.shift is None else 'a '}shift; not so at the steps before"
            )


def migrate_outliers(widest: dict[str, "np.ndarray"], threshold: float) -> dict[str, dict[str, Any]]:
    """TaQ-DiT's migration of outlier channels, for every layer that has any: `outlier_config`.

    widest: each layer's widest range per channel over all steps, as W·m has to be one matrix for all of them.
    """
    import numpy as np

    from quantizers import outlier_multipliers

    outlier_config = {}
    for name, reach in widest.items():
        multipliers, normal = outlier_multipliers(reach, threshold)
        if (multipliers > 1).any():
            outlier_config[name] = {
                "outlier_indices": np.flatnonzero(multipliers > 1),
                "multiplier_vector": multipliers,
                "scale_normal": normal,
                "scale_outlier": float(reach.max()),
            }
    return outlier_config


def config_steps(
    steps: dict[str, dict[str, LayerStep]], outlier_config: dict[str, dict], use_hist_p999: bool
) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """`per_timestep` of the config, a step at a time."""
    from quantizers import channel_clipping_range

    for key, layers in steps.items():
        entries = {}
        for name, layer in layers.items():
            entry = {"bits": 8, "scale": layer.scale}
            if layer.shift is not None:
                entry |= {"shift": layer.shift, "shifted_scale": layer.shifted_scale or DEAD_SCALE}
            if use_hist_p999:
                entry["clipping_range"] = entry.get("shifted_scale", layer.scale)
            else:
                entry["clipping_range"] = layer.unmigrated_range
                if name in outlier_config:
                    multipliers = outlier_config[name]["multiplier_vector"]
                    migrated = channel_clipping_range(layer.reach, layer.power, multipliers, [8])
                    entry |= {"unmigrated_clipping_range": layer.unmigrated_range, "clipping_range": float(migrated[0])}
            entries[name] = entry
        yield key, entries


def temporal_analysis(steps: dict[str, dict[str, LayerStep]], sigmas: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Per layer: mean, minimum and maximum over the steps of its scale and its largest shift, and its widest steps."""
    import numpy as np

    layers: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for step in steps.values() for name in step):
        keys = [key for key in steps if name in steps[key]]
        scales = np.array([steps[key][name].scale for key in keys])
        order = np.argsort(-scales, kind="stable")[:3]
        layers[name] = {
            "scale": summarize(scales),
            "widest_steps": [keys[i] for i in order],
            "widest_sigmas": [sigmas[keys[i]] for i in order],
        }
        if steps[keys[0]][name].shift is not None:
            shifts = np.array([np.abs(steps[key][name].shift).max() for key in keys], np.float64)
            layers[name]["shift_absmax"] = summarize(shifts)
    return layers


def summarize(values: "np.ndarray") -> dict[str, float]:
    """Mean, minimum and maximum."""
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


def summarize_config(
    steps: dict[str, dict[str, LayerStep]], temporal: dict[str, dict], outlier_config: dict[str, dict]
) -> dict[str, Any]:
    """The config's `summary`: counts, scales over all layers and steps, what shift and migration gain."""
    import numpy as np

    entries = [layer for layers in steps.values() for layer in layers.values()]
    scales = np.array([layer.scale for layer in entries])
    shifted = np.array([layer.shifted_scale / layer.scale for layer in entries if layer.shift is not None])
    widest = max(temporal, key=lambda name: temporal[name]["scale"]["max"])
    return {
        "num_steps": len(steps),
        "num_layers": len(temporal),
        "bits": 8,
        "scale": summarize(scales) | {"median": float(np.median(scales))},
        "widest_layer": widest,
        "num_shifted_layers": sum("shift_absmax" in layer for layer in temporal.values()),
        "median_shifted_over_plain_scale": float(np.median(shifted)) if shifted.size else None,
        "num_outlier_layers": len(outlier_config),
        "num_outlier_channels": sum(len(layer["outlier_indices"]) for layer in outlier_config.values()),
        "num_dead_layers": sum(not layer.reach.any() for layer in next(iter(steps.values())).values()),
    }


def print_summary(summary: dict[str, Any], temporal: dict[str, dict], outlier_config: dict[str, dict]) -> None:
    """The terminal's summary: a line per finding, and the layers whose range moves most."""
    scale, widest = summary["scale"], summary["widest_layer"]
    click.echo(
        f"{summary['num_layers']} layers × {summary['num_steps']} steps, 8 bits (simulated: MLX has no A8 kernel)"
    )
    click.echo(
        f"range     median {scale['median']:.3g}, from {scale['min']:.3g} to {scale['max']:.3g} "
        f"({widest} at sigma {temporal[widest]['widest_sigmas'][0]:.2f})"
    )
    if summary["num_shifted_layers"]:
        click.echo(
            f"shift     {summary['num_shifted_layers']} post-GELU layers; it makes their range "
            f"{summary['median_shifted_over_plain_scale']:.2f} × as wide (median)"
        )
    click.echo(
        f"outliers  {summary['num_outlier_channels']} channels in {summary['num_outlier_layers']} layers"
        + ("".join(f", {name} ×{max(outlier_config[name]['multiplier_vector'])}" for name in list(outlier_config)[:3]))
    )
    if summary["num_dead_layers"]:
        click.echo(f"dead      {summary['num_dead_layers']} layers saw only zeros; their range is set to {DEAD_SCALE}")
    click.echo("range that moves most along the schedule:")
    moving = sorted(temporal, key=lambda name: temporal[name]["scale"]["min"] / temporal[name]["scale"]["max"])[:5]
    for name in moving:
        layer = temporal[name]
        click.echo(
            f"  {name:24} {layer['scale']['min']:8.3g} – {layer['scale']['max']:<8.3g} "
            f"widest at sigma {layer['widest_sigmas'][0]:.2f}"
        )


def written_with(temporal_analysis: str, with_plot: bool, steps: dict[str, dict[str, LayerStep]]) -> list[str]:
    """Names of the files that belong to the config, beside it."""
    shifted = any(layer.shift is not None for layer in next(iter(steps.values())).values())
    return [temporal_analysis, *(FIGURES[: 3 if shifted else 2] if with_plot else [])]


# --- figures ------------------------------------------------------------------------------------------------


def plot(folder: Path, steps: dict[str, dict[str, LayerStep]], sigmas: dict[str, float]) -> list[Path]:
    """Write the stage's figures: scale over sigma per kind, scale and shift as layer × step maps."""
    import numpy as np
    from matplotlib.colors import LogNorm

    keys = list(steps)
    common = [name for name in steps[keys[0]] if all(name in layers for layers in steps.values())]
    scales = {name: [steps[key][name].scale for key in keys] for name in common}
    shifts = {
        name: [float(np.abs(steps[key][name].shift).max()) for key in keys]
        for name in common
        if steps[keys[0]][name].shift is not None
    }
    columns = [sigmas[key] for key in keys]
    paths = [folder / name for name in FIGURES[: 3 if shifts else 2]]
    plot_bands(paths[0], scales, columns)
    heat_map(
        paths[1], scales, columns, "Clipping range of every layer's input", "scale", norm=LogNorm(), cmap="viridis"
    )
    if shifts:
        heat_map(paths[2], shifts, columns, "Largest shift of the post-GELU layers", "max |shift|", cmap="magma")
    return paths


def plot_bands(path: Path, scales: dict[str, list[float]], sigmas: list[float]) -> None:
    """Scale over sigma, one panel a kind of layer: median, quartiles, extremes over the blocks."""
    import numpy as np
    from matplotlib import pyplot

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
    panels[0, 0].invert_xaxis()  # as the sampler goes: from noise to image; shared by all
    panels[0, 0].legend(fontsize="small")
    figure.supxlabel("sigma (noise on the left, image on the right)")
    figure.supylabel("clipping range")
    save_figure(figure, path)


@stage_command
@calib_dir_option
@analysis_options("quant_config.json")
@click.option(
    "--use-hist-p999", is_flag=True, help="Clip at the 99.9th percentile instead of the average maximum; no migration."
)
@click.option(
    "--outlier-threshold",
    type=click.FloatRange(min=1),
    default=2.5,
    help="A channel this many times wider than the median one is an outlier.",
)
def main(
    calib_dir: Path,
    stats: Path | None,
    output: Path | None,
    use_hist_p999: bool,
    outlier_threshold: float,
    with_plot: bool,
) -> None:
    """Stage 3A: a W4A8 configuration from activation statistics."""
    from calibration_store import (
        TEMPORAL_FORMAT,
        W4A8_FORMAT,
        ActivationPaths,
        read_statistics,
        refuse_other_format,
        write_json,
        write_quant_config,
    )

    stats = stats or ActivationPaths(calib_dir).statistics
    output = output or stats.parent / ActivationPaths(calib_dir).quant_config.name
    refuse_other_format(output, W4A8_FORMAT, "--output")
    statistics = read_statistics(stats)
    steps, widest = describe_steps(statistics, use_hist_p999)
    outlier_config = {} if use_hist_p999 else migrate_outliers(widest, outlier_threshold)
    temporal = temporal_analysis(steps, statistics.sigma_map)
    summary = summarize_config(steps, temporal, outlier_config)
    metadata = statistics.metadata | {
        "statistics": str(stats.name),
        "scale_from": "hist_p999" if use_hist_p999 else "tensor_absmax",
        "scale_meaning": "range",
        "outlier_threshold": outlier_threshold,
        "written_with": written_with(ActivationPaths(calib_dir).temporal_analysis.name, with_plot, steps),
    }
    head = {"format": W4A8_FORMAT, "summary": summary, "metadata": metadata, "sigma_map": statistics.sigma_map}
    temporal_file = output.parent / ActivationPaths(calib_dir).temporal_analysis.name
    write_json(temporal_file, {"format": TEMPORAL_FORMAT, "sigma_map": statistics.sigma_map, "layers": temporal})
    write_quant_config(
        output, head | {"outlier_config": outlier_config}, config_steps(steps, outlier_config, use_hist_p999)
    )
    print_summary(summary, temporal, outlier_config)
    figures = plot(output.parent, steps, statistics.sigma_map) if with_plot else []
    click.echo("wrote " + ", ".join(map(str, [output, temporal_file, *figures])))


if __name__ == "__main__":
    main()
