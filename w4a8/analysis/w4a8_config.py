"""Stage 3A: scales, shifts, outlier migration and clipping ranges from statistics (TaQ-DiT). NumPy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibration_store.errors import StoreError
from calibration_store.statistics import ActivationStatistics, LayerStatistics
from w4a8.analysis.clipping_ranges import (
    absolute_histogram,
    centred_histogram,
    channel_clipping_range,
    histogram_percentile,
    outlier_multipliers,
    unmigrated_clipping_ranges,
)

DEAD_SCALE = 1.0  # of a layer that saw nothing but zeros: any positive range is exact


@dataclass
class LayerStep:
    """One layer at one step: what the config says of it, and what that follows from."""

    scale: float
    shift: np.ndarray | None  # (channels,) float32
    shifted_scale: float | None
    reach: np.ndarray  # (channels,) float32: largest |x − shift| of all images
    power: np.ndarray | None  # (channels,) float32: E[(x − shift)²]
    unmigrated_range: float  # where x − shift is clipped


def describe_layer(layer: LayerStatistics, use_hist_p999: bool) -> LayerStep:
    """The ranges of one layer at one step. Raises ValueError when a percentile is asked for and cannot be had."""
    scale, shifted_scale, shift = layer.tensor_absmax(), None, None
    if layer.shift is not None:
        shifted_scale, shift = float(layer.reach().max()), np.array(layer.shift, np.float32)
    reach, power = layer.full_reach().astype(np.float32), layer.centred_power()
    unmigrated = float(unmigrated_clipping_ranges(layer.histogram, shift, reach, power, [8])[0]) or DEAD_SCALE
    if use_hist_p999:
        scale, shifted_scale = percentile_ranges(layer, shifted_scale)
    power = None if power is None else power.astype(np.float32)
    return LayerStep(scale or DEAD_SCALE, shift, shifted_scale, reach, power, unmigrated)


def percentile_ranges(layer: LayerStatistics, shifted_absmax: float | None) -> tuple[float, float | None]:
    """The 99.9th percentiles of |x| and, after a shift, of |x − shift| (from the histogram of x and the shifts)."""
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
    statistics: ActivationStatistics, use_hist_p999: bool
) -> tuple[dict[str, dict[str, LayerStep]], dict[str, np.ndarray]]:
    """Every layer at every step, {step key: {layer: LayerStep}}, and each layer's widest average reach, (channels,).

    Raises StoreError that names file and layer.
    """
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


def refuse_other_layers(statistics: ActivationStatistics, key: str, layers: dict, steps: dict) -> None:
    """Raise StoreError when a layer has other channels, or no shift where it has one, at a step before this one."""
    for name, layer in layers.items():
        before = next((step[name] for step in steps.values() if name in step), None)
        if before is None:
            continue
        if before.reach.shape != layer.avg_min.shape or (before.shift is None) != (layer.shift is None):
            raise StoreError(
                f"{statistics.timestep_dir}/step_{key}.npz: {name}: {layer.avg_min.size} channels, "
                f"{'no ' if layer.shift is None else 'a '}shift; not so at the steps before"
            )


def migrate_outliers(widest: dict[str, np.ndarray], threshold: float) -> dict[str, dict[str, Any]]:
    """TaQ-DiT's migration of outlier channels, for every layer that has any: `outlier_config`.

    widest: each layer's widest range per channel over all steps, as W·m has to be one matrix for all of them.
    """
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


def summarize(values: np.ndarray) -> dict[str, float]:
    """Mean, minimum and maximum."""
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


def summarize_config(
    steps: dict[str, dict[str, LayerStep]], temporal: dict[str, dict], outlier_config: dict[str, dict]
) -> dict[str, Any]:
    """The config's `summary`: counts, scales over all layers and steps, what shift and migration gain."""
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


FIGURES = ("scale_over_sigma.png", "scale_map.png", "shift_map.png")


def figure_names(steps: dict[str, dict[str, LayerStep]]) -> tuple[str, ...]:
    """The figures of `--plot`; the last one where layers that every step has are shifted."""
    first, *others = steps.values()
    shifted = any(layer.shift is not None for name, layer in first.items() if all(name in step for step in others))
    return FIGURES if shifted else FIGURES[:2]
