"""Histograms and what follows from them against plain NumPy in float64."""

import numpy as np
import pytest

from calibration_store.histograms import histogram_edges, histogram_grid, regrid_histogram
from w4a8.analysis.clipping_ranges import absolute_histogram, histogram_percentile


def histogram(values, grid):
    bins = np.floor(values.astype(np.float64) / 2.0 ** grid[0]).astype(int) - grid[1]
    assert bins.min() >= 0 and bins.max() <= 255
    return np.bincount(bins, minlength=256)


@pytest.mark.parametrize(
    ("low", "high"), [(-1, 1), (0, 1), (-3.7, 250.1), (-1e-3, 0), (5, 6), (-6e4, 6e4), (0, 0), (0, 256), (0, 255.99)]
)
def test_the_grid_is_the_finest_that_holds_the_range_and_zero(low, high):
    exponent, first = histogram_grid(low, high)
    edges = histogram_edges(exponent, first)
    assert edges.shape == (257,) and 0.0 in edges
    assert edges[0] <= min(low, 0) and edges[-1] > max(high, 0)
    if exponent > -24:
        finer = 2.0 ** (exponent - 1)
        assert np.floor(max(high, 0) / finer) - np.floor(min(low, 0) / finer) > 255


def test_histograms_of_parts_add_up_to_that_of_the_whole():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=1000) * scale for scale in (0.01, 3, 70)] + [np.abs(rng.normal(size=10))]
    everything = np.concatenate(parts)
    whole = histogram_grid(everything.min(), everything.max())
    grids = [histogram_grid(part.min(), part.max()) for part in parts]
    merged = sum(regrid_histogram(histogram(part, grid), grid, whole) for part, grid in zip(parts, grids, strict=True))
    assert merged.dtype == np.int64 and np.array_equal(merged, histogram(everything, whole))
    with pytest.raises(ValueError, match="cannot be refined"):
        regrid_histogram(merged, whole, grids[0])


@pytest.mark.parametrize("size", [1, 2, 50, 5000])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.5, 0.99, 0.999, 1.0])
def test_percentiles_lie_within_one_bin_of_the_exact_ones(size, fraction):
    values = np.random.default_rng(size).standard_t(3, size=size)
    grid = histogram_grid(values.min(), values.max())
    counts, edges = histogram(values, grid), histogram_edges(*grid)
    width = 2.0 ** grid[0]
    assert abs(histogram_percentile(counts, edges, fraction) - np.percentile(values, 100 * fraction)) <= width
    magnitudes, magnitude_edges = absolute_histogram(counts, edges)
    assert magnitudes.sum() == size
    assert (
        abs(histogram_percentile(magnitudes, magnitude_edges, fraction) - np.percentile(abs(values), 100 * fraction))
        <= width
    )
