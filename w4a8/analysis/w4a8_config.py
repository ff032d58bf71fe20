"""Stage 3A: compute scales, shifts, outlier migration and clipping ranges from statistics (TaQ-DiT). NumPy."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
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
from w4a8.analysis.steps import each_step

DEAD_SCALE = 1.0  # the scale of a layer that saw nothing but zeros, for which any positive range is exact


@dataclass
class LayerStep:
    """One layer at one step: the values that the config notes, and the figures that they follow from."""

    scale: float  # range of x
    shift: np.ndarray | None  # (channels,) float32, post-GELU layers
    shifted_scale: float | None  # range of x − shift
    reach: np.ndarray  # (channels,) float32: largest |x − shift| of all images
    power: np.ndarray | None  # (channels,) float32: E[(x − shift)²]
    unmigrated_range: float  # clipping range of x − shift

    def largest_shift(self) -> float:
        """Return max |shift| over the channels of a layer that has a shift."""
        assert self.shift is not None
        return float(np.abs(self.shift).max())


def describe_layer(layer: LayerStatistics, use_hist_p999: bool) -> LayerStep:
    """Return the ranges of one layer at one step.

    use_hist_p999: take 99.9th percentiles instead of extremes. Raises ValueError where the statistics do not give them.
    """
    shift = None if layer.shift is None else np.array(layer.shift, np.float32)
    reach, power = layer.full_reach().astype(np.float32), layer.centred_power()
    unmigrated = float(unmigrated_clipping_ranges(layer.histogram, shift, reach, power, [8])[0]) or DEAD_SCALE
    scale, shifted_scale = percentile_ranges(layer) if use_hist_p999 else absolute_ranges(layer)
    power = None if power is None else power.astype(np.float32)
    return LayerStep(scale or DEAD_SCALE, shift, shifted_scale, reach, power, unmigrated)


def absolute_ranges(layer: LayerStatistics) -> tuple[float, float | None]:
    """Return the largest |x| and, for a layer with a shift, the largest |x − shift|."""
    return layer.tensor_absmax(), None if layer.shift is None else float(layer.reach().max())


def percentile_ranges(layer: LayerStatistics) -> tuple[float, float | None]:
    """Return the 99.9th percentile of |x| and, for a layer with a shift, that of |x − shift|.

    The percentile of |x − shift| follows from the histogram of x and the shifts. Raises ValueError without a histogram.
    """
    known = layer.entry.get("hist_p999")
    if known is not None and layer.shift is None:
        return float(known), None
    if layer.histogram is None:
        raise ValueError("--use-hist-p999 needs hist_counts and hist_edges, which the statistics lack; leave it out")
    scale = known if known is not None else histogram_percentile(*absolute_histogram(*layer.histogram), 0.999)
    if layer.shift is None:
        return float(scale), None
    centred = absolute_histogram(*centred_histogram(*layer.histogram, layer.shift))
    shifted = histogram_percentile(*centred, 0.999)
    if layer.moments is not None:  # the mean of a channel must not be cut off, whatever the pooled histogram says
        shifted = max(shifted, float(np.abs(layer.moments[0] - layer.shift).max()))
    return float(scale), min(float(layer.reach().max()), shifted)


def describe_step(
    statistics: ActivationStatistics, use_hist_p999: bool, key: str
) -> dict[str, tuple[LayerStep, np.ndarray]]:
    """Describe every layer at one step: return {layer: (LayerStep, average reach)}.

    The average reach (channels,) float64 is max |x − shift| between the average minimum and maximum. Raises StoreError
    that names file and layer.
    """
    described: dict[int, tuple[LayerStep, np.ndarray]] = {}  # by identity: q, k and v share their statistics
    layers = statistics.read_step(key)
    for name, layer in layers.items():
        try:
            if id(layer) not in described:
                described[id(layer)] = describe_layer(layer, use_hist_p999), layer.reach()
        except ValueError as error:
            raise StoreError(f"{statistics.step_path(key)}: {name}: {error}") from None
    return {name: described[id(layer)] for name, layer in layers.items()}


def describe_steps(
    statistics: ActivationStatistics, use_hist_p999: bool
) -> tuple[dict[str, dict[str, LayerStep]], dict[str, np.ndarray]]:
    """Describe every layer at every step: return {step key: {layer: LayerStep}} and {layer: widest average reach}.

    The widest average reach (channels,) float64 is the largest of `describe_step` over the steps. Raises StoreError that
    names file and layer.
    """
    steps: dict[str, dict[str, LayerStep]] = {}
    widest: dict[str, np.ndarray] = {}
    for key, described in each_step(partial(describe_step, statistics, use_hist_p999), statistics):
        layers = {name: layer for name, (layer, _) in described.items()}
        refuse_other_layers(statistics, key, layers, steps)
        steps[key] = layers
        for name, (_, reach) in described.items():
            widest[name] = np.maximum(widest.get(name, 0), reach)
    return steps, widest


def refuse_other_layers(
    statistics: ActivationStatistics, key: str, layers: dict[str, LayerStep], steps: dict[str, dict[str, LayerStep]]
) -> None:
    """Raise StoreError for a layer that has other channels than at a step before, or a shift at only one of both."""
    for name, layer in layers.items():
        before = next((step[name] for step in steps.values() if name in step), None)
        if before is None:
            continue
        if before.reach.shape != layer.reach.shape or (before.shift is None) != (layer.shift is None):
            raise StoreError(
                f"{statistics.step_path(key)}: {name}: {layer.reach.size} channels, "
                f"{'no ' if layer.shift is None else 'a '}shift; not so at the steps before"
            )


def migrate_outliers(widest: dict[str, np.ndarray], threshold: float) -> dict[str, dict[str, Any]]:
    """Return the config's `outlier_config`: TaQ-DiT's migration for every layer that has outlier channels.

    widest: each layer's widest range per channel over all steps, since W·m has to be one matrix for all steps.
    threshold: a channel above threshold × the median range is an outlier.
    """
    outlier_config: dict[str, dict[str, Any]] = {}
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
    """Yield the config's `per_timestep`, one (step key, {layer: entry}) at a time."""
    for key, layers in steps.items():
        entries = {}
        migrated: dict[tuple[int, bytes], float] = {}  # by a layer's step and its multipliers, which q, k and v share
        for name, layer in layers.items():
            entry: dict[str, Any] = {"bits": 8, "scale": layer.scale}
            if layer.shift is not None:
                entry |= {"shift": layer.shift, "shifted_scale": layer.shifted_scale or DEAD_SCALE}
            if use_hist_p999:
                entry["clipping_range"] = entry.get("shifted_scale", layer.scale)
            else:
                entry["clipping_range"] = layer.unmigrated_range
                if name in outlier_config:
                    multipliers = outlier_config[name]["multiplier_vector"]
                    same = (id(layer), multipliers.tobytes())
                    if same not in migrated:
                        ranges = channel_clipping_range(layer.reach, layer.power, multipliers, [8])
                        migrated[same] = float(ranges[0])
                    entry |= {"unmigrated_clipping_range": layer.unmigrated_range, "clipping_range": migrated[same]}
            entries[name] = entry
        yield key, entries


def temporal_analysis(steps: dict[str, dict[str, LayerStep]], sigmas: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return how each layer's scale and shift move along the schedule: {layer: entry of layer_temporal_analysis.json}.

    An entry has mean, minimum and maximum of the scale over the steps, the three steps with the largest scale, and for
    a layer with a shift mean, minimum and maximum of the largest |shift|. sigmas: {step key: sigma}.
    """
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
            shifts = np.array([steps[key][name].largest_shift() for key in keys], np.float64)
            layers[name]["shift_absmax"] = summarize(shifts)
    return layers


def summarize(values: np.ndarray) -> dict[str, float]:
    """Return mean, minimum and maximum of values (n,)."""
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


def summarize_config(
    steps: dict[str, dict[str, LayerStep]], temporal: dict[str, dict], outlier_config: dict[str, dict]
) -> dict[str, Any]:
    """Return the config's `summary`: counts, the scales over all layers and steps, and gains by shift and migration.

    temporal: the result of `temporal_analysis`; outlier_config: the result of `migrate_outliers`.
    """
    entries = [layer for layers in steps.values() for layer in layers.values()]
    scales = np.array([layer.scale for layer in entries])
    shifted = np.array([layer.shifted_scale / layer.scale for layer in entries if layer.shifted_scale is not None])
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
    """Return the file names of the figures of `--plot`; the last one is for layers with a shift that every step has."""
    first, *others = steps.values()
    shifted = any(layer.shift is not None for name, layer in first.items() if all(name in step for step in others))
    return FIGURES if shifted else FIGURES[:2]
