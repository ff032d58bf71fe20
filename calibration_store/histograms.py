"""The dyadic grid of the histograms in the statistics (2A); it is part of their format."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

HISTOGRAM_BINS = 256
MIN_EXPONENT = -24  # the narrowest bin is 2^-24, float16's smallest step


def histogram_grid(low: float, high: float) -> tuple[int, int]:
    """Return the finest dyadic grid of 256 bins that covers `low`, `high` and 0, as (exponent, first bin).

    Bin j covers [(first + j)·2^exponent, (first + j + 1)·2^exponent). Widths are powers of two and edges multiples
    of them, so every grid nests in the coarser ones: bin b at exponent e lies in bin b >> (f − e) at exponent f, and
    histograms of parts of the data add up to the histogram of the whole exactly.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    exponent = max(MIN_EXPONENT, int(np.frexp(high - low)[1]) - 10) if high > low else MIN_EXPONENT
    while np.floor(high * 2.0**-exponent) - np.floor(low * 2.0**-exponent) > HISTOGRAM_BINS - 1:
        exponent += 1
    return exponent, int(np.floor(low * 2.0**-exponent))


def histogram_edges(exponent: int, first: int) -> np.ndarray:
    """Return the edges of a grid: (257,) float64, exact."""
    return (first + np.arange(HISTOGRAM_BINS + 1)) * 2.0**exponent


def regrid_histogram(counts: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """Move counts (256,) from one grid to a coarser or equal one, and return them as int64.

    Grids are (exponent, first bin). Neighbouring bins merge, and no count is lost. Raises ValueError for a finer grid.
    """
    shift = new[0] - old[0]
    if shift < 0:
        raise ValueError(f"a histogram cannot be refined (exponent {old[0]} to {new[0]})")
    bins = ((old[1] + np.arange(HISTOGRAM_BINS)) >> shift) - new[1]
    filled = np.flatnonzero(counts)
    merged = np.zeros(HISTOGRAM_BINS, np.int64)
    np.add.at(merged, bins[filled], counts[filled].astype(np.int64))
    return merged


def histogram_fault(fields: Mapping[str, np.ndarray], entry: Mapping[str, Any], own: bool) -> str | None:
    """Return what is wrong with the histogram among a layer's statistics, or None.

    fields: arrays by name, `hist_counts` (bins,) and `hist_edges` (bins + 1,) among them. entry: the layer's entry in
    the index. own: the statistics are this toolkit's, whose histograms count every value between `min` and `max`.
    """
    counts, edges = fields["hist_counts"], fields["hist_edges"]
    total = counts.sum(dtype=np.float64)
    if not 0 < total < 2**63:
        return "the histogram is empty" if not total else "hist_counts sum to more than int64 holds"
    widest = max(abs(float(edges[0])), abs(float(edges[-1])))
    for key in ("hist_p999", "hist_p99", "hist_p01", "hist_p001"):
        if abs(entry.get(key, 0.0)) > widest:
            return f"the index says {key} {entry[key]:.6g}, outside the histogram"
    if not own or "min" not in fields:
        return None
    filled = np.flatnonzero(counts)
    if not (edges[filled[0]] <= fields["min"].min() < edges[filled[0] + 1]):
        return "hist_counts do not begin at the smallest value"
    if not (edges[filled[-1]] <= fields["max"].max() < edges[filled[-1] + 1]):
        return "hist_counts do not end at the largest value"
    if int(total) % (fields["min"].size * entry.get("n_batches", 1)):
        return "hist_counts do not sum to the values seen"
    return None
