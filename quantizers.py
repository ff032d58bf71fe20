"""The arithmetic of quantization. NumPy float64 in, plain functions out."""

from collections.abc import Sequence

import numpy as np

HISTOGRAM_BINS = 256
MIN_EXPONENT = -24  # the narrowest bin is 2^-24, float16's smallest step


def histogram_grid(low: float, high: float) -> tuple[int, int]:
    """The finest dyadic grid of 256 bins over a range that includes 0: (exponent, first bin).

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
    """The 257 edges of a grid, float64, exact."""
    return (first + np.arange(HISTOGRAM_BINS + 1)) * 2.0**exponent


def regrid_histogram(counts: np.ndarray, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """Move counts (256,) from one grid to a coarser or equal one: neighbouring bins merge, nothing is lost."""
    shift = new[0] - old[0]
    if shift < 0:
        raise ValueError(f"a histogram cannot be refined (exponent {old[0]} to {new[0]})")
    bins = ((old[1] + np.arange(HISTOGRAM_BINS)) >> shift) - new[1]
    filled = np.flatnonzero(counts)
    merged = np.zeros(HISTOGRAM_BINS, np.int64)
    np.add.at(merged, bins[filled], counts[filled].astype(np.int64))
    return merged


def absolute_histogram(counts: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Histogram of |x| from one of x whose edges include 0: counts (n,) and edges (n + 1,)."""
    zero = int(np.searchsorted(edges, 0.0))
    negative, positive = counts[:zero][::-1], counts[zero:]
    bins = max(len(negative), len(positive))
    folded = np.zeros(bins, counts.dtype)
    folded[: len(negative)] += negative
    folded[: len(positive)] += positive
    return folded, np.arange(bins + 1) * (edges[1] - edges[0])


def histogram_percentile(counts: np.ndarray, edges: np.ndarray, fraction: float) -> float:
    """np.percentile(x, 100·fraction) from the histogram of x, at most one bin's width off.

    As np.percentile does, takes the two order statistics around position fraction·(n − 1) and interpolates; each
    is known to lie in its bin, and is placed there as if the bin's values were spread evenly.
    """
    cumulative = np.cumsum(counts)
    position = fraction * (int(cumulative[-1]) - 1)
    ranks = np.array([np.floor(position), np.ceil(position)])
    bins = np.searchsorted(cumulative, ranks, side="right")
    inside = (ranks - (cumulative - counts)[bins] + 0.5) / counts[bins]
    low, high = edges[bins] + (edges[bins + 1] - edges[bins]) * inside
    return float(low + (high - low) * (position - ranks[0]))
