"""The dyadic grid that histograms in the statistics lie on: part of their format."""

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
