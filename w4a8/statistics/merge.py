"""Merge the partial results of single passes (2A) into the statistics of a step."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np

from calibration_store.histograms import histogram_edges, histogram_grid, regrid_histogram
from calibration_store.layout import ActivationPaths
from calibration_store.names import is_post_gelu
from calibration_store.partials import read_partial
from calibration_store.statistics import write_statistics, write_step
from w4a8.analysis.clipping_ranges import absolute_histogram, histogram_percentile

SHIFT_MOMENTUM = 0.95


class StepPartials(Sequence[dict[str, np.ndarray]]):
    """The partial results of one step, in the order of image_ids; each is read from the disk when it is asked for."""

    def __init__(self, paths: ActivationPaths, run: str, step: int, image_ids: Sequence[int]):
        self._paths, self._run, self._step, self._image_ids = paths, run, step, image_ids

    def __len__(self) -> int:
        return len(self._image_ids)

    @overload
    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...

    @overload
    def __getitem__(self, index: slice) -> "StepPartials": ...

    def __getitem__(self, index: int | slice) -> "dict[str, np.ndarray] | StepPartials":
        if isinstance(index, slice):
            return StepPartials(self._paths, self._run, self._step, self._image_ids[index])
        return read_partial(self._paths, self._run, self._image_ids[index], self._step)


def merge_partials(partials: Sequence[dict[str, np.ndarray]]) -> dict[str, tuple[dict[str, np.ndarray], dict]]:
    """Merge one step's partial results: return {layer: (arrays by field, its entry in the index)}.

    avg_min and avg_max (channels,) are plain means over images; min and max are the extremes of all images; mean and
    mean_square are E[x] and E[x²] over all values. shift is TaQ-DiT's centre (min + max) / 2 of each channel of a
    post-GELU input, averaged over images with momentum 0.95; the first image sets the average. Arrays are float32.
    hist_counts (256,) int64 adds the histograms up on the finest grid that holds them all; hist_edges (257,) float64 is
    that grid.

    partials: in ascending order of image_id, because the moving average depends on the order. The function reads them
    twice, and holds one partial in memory at a time.
    """
    first = partials[0]
    starts = np.concatenate([[0], np.cumsum(first["channels"])])
    post_gelu = {int(i) for name, i in zip(first["layers"], first["inputs"], strict=True) if is_post_gelu(str(name))}
    total_min, total_max, total, total_square = (np.zeros(starts[-1], np.float64) for _ in range(4))
    lowest, highest = np.full(starts[-1], np.inf), np.full(starts[-1], -np.inf)
    shift: np.ndarray | None = None
    for partial in partials:
        low, high = partial["limits"].astype(np.float64)
        lowest, highest = np.minimum(lowest, low), np.maximum(highest, high)
        total_min += low
        total_max += high
        total += partial["moments"][0]
        total_square += partial["moments"][1]
        centre = (low + high) / 2
        shift = centre if shift is None else SHIFT_MOMENTUM * shift + (1 - SHIFT_MOMENTUM) * centre
    assert shift is not None  # there is a first partial
    avg_min, avg_max, mean, mean_square = (sums / len(partials) for sums in (total_min, total_max, total, total_square))
    parts = [slice(start, end) for start, end in pairwise(starts)]
    grids = [histogram_grid(float(lowest[part].min()), float(highest[part].max())) for part in parts]
    counts = np.zeros((len(parts), 256), np.int64)
    for partial in partials:
        for index, histogram in enumerate(partial["histograms"]):
            counts[index] += regrid_histogram(histogram[:256], histogram[256:258].tolist(), grids[index])
    inputs = [
        _describe_input(
            avg_min[part],
            avg_max[part],
            {"min": lowest[part], "max": highest[part], "mean": mean[part], "mean_square": mean_square[part]},
            shift[part] if index in post_gelu else None,
            counts[index],
            histogram_edges(*grids[index]),
        )
        for index, part in enumerate(parts)
    ]
    layers: dict[str, tuple[dict[str, np.ndarray], dict]] = {}
    for name, index in zip(first["layers"], first["inputs"], strict=True):
        fields, entry = inputs[index]
        layers[str(name)] = (fields, {"n_batches": len(partials), **entry})
    return layers


def _describe_input(
    avg_min: np.ndarray,
    avg_max: np.ndarray,
    others: dict[str, np.ndarray],
    shift: np.ndarray | None,
    counts: np.ndarray,
    edges: np.ndarray,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return one input's arrays in the step file, and its entry in the index, which lacks n_batches."""
    fields = {"avg_min": avg_min, "avg_max": avg_max, **others}
    fields = {name: array.astype(np.float32) for name, array in fields.items()}
    magnitudes = absolute_histogram(counts, edges)
    entry = {
        "tensor_absmax": float(np.maximum(np.abs(avg_min), np.abs(avg_max)).max()),
        "tensor_min": float(avg_min.min()),
        "tensor_max": float(avg_max.max()),
        "has_shift": shift is not None,
        "has_hist": True,
        "hist_p999": histogram_percentile(*magnitudes, 0.999),
        "hist_p99": histogram_percentile(*magnitudes, 0.99),
        "hist_p01": histogram_percentile(counts, edges, 0.01),
        "hist_p001": histogram_percentile(counts, edges, 0.001),
    }
    if shift is not None:
        fields["shift"] = shift.astype(np.float32)
        entry["shift_absmax"] = float(np.abs(shift).max())
        entry["shifted_absmax"] = float(np.maximum(np.abs(avg_min - shift), np.abs(avg_max - shift)).max())
    return fields | {"hist_counts": counts, "hist_edges": edges}, entry


def write_merged_statistics(
    paths: ActivationPaths, manifest: Mapping[str, Any], plan: Mapping[str, Any], sigmas: Sequence[float]
) -> None:
    """Merge the partial results of every step, and write the files of stage 2A, layer_statistics.json last."""
    for step in plan["key_timesteps"]:
        partials = StepPartials(paths, plan["calibration_run"], step, plan["selected_image_ids"])
        write_step(paths, step, merge_partials(partials), plan["calibration_run"])
    write_statistics(paths, manifest, plan, sigmas, SHIFT_MOMENTUM)
