"""What a bit-width costs an activation, and where it is clipped best: from histograms and moments. NumPy."""

import math
from collections.abc import Sequence

import numpy as np


def levels(bits: int) -> int:
    """Positive levels of a symmetric grid: 127 for 8 bits, 31 for 6, 7 for 4."""
    return 2 ** (bits - 1) - 1


def outlier_multipliers(reach: np.ndarray, threshold: float) -> tuple[np.ndarray, float]:
    """TaQ-DiT's migration: per channel m_c = max(1, round(s_c / s)) (channels,) int64, and s.

    reach (channels,) is s_c, the clipping range of each channel; channels above threshold × the median range are
    outliers, s is the largest range of the others. x / m is quantized with one scale, and W takes W·m.
    """
    outliers = reach > threshold * np.median(reach)
    normal = float(reach[~outliers].max())
    if normal == 0 or not outliers.any():
        return np.ones(reach.shape, np.int64), normal
    return np.where(outliers, np.clip(np.rint(reach / normal), 1, 2**24), 1).astype(np.int64), normal


def absolute_histogram(counts: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Histogram of |x| from one of x: counts (n,) float64 and edges (n + 1,), from 0.

    Exact where edges lie symmetrically around 0 (as those of `histogram_grid` do); elsewhere a bin's values are
    taken as spread evenly.
    """
    zero = int(np.searchsorted(edges, 0.0))
    if (
        0 < zero < edges.size and edges[zero] == 0 and edges[1] - edges[0] == edges[-1] - edges[-2]
    ):  # grids of this toolkit
        width = max(zero, counts.size - zero)
        folded = np.zeros(width)
        folded[: counts.size - zero] = counts[zero:]
        folded[:zero] += counts[:zero][::-1]
        return folded, np.arange(width + 1) * (edges[1] - edges[0])
    magnitudes = np.unique(np.abs(np.append(edges, 0.0)))
    cumulative = np.concatenate([[0], np.cumsum(counts)]).astype(np.float64)
    inside = np.interp(magnitudes, edges, cumulative) - np.interp(-magnitudes, edges, cumulative)
    return np.diff(inside), magnitudes


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


def centred_histogram(counts: np.ndarray, edges: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Histogram of x − shift from that of x (equal bins) and the shifts (channels,), taken as independent.

    Returns counts (2·bins,) float64 and edges (2·bins + 1,). The histogram does not say which channel a value is of:
    most of a post-GELU tensor lies near 0 in every channel, so that x − shift spreads as −shift does.
    """
    width = (edges[-1] - edges[0]) / counts.size
    bins = np.floor(-shift.astype(np.float64) / width).astype(np.int64)
    first = int(bins.min())
    spread = np.bincount(bins - first) / shift.size
    moved = np.convolve(counts.astype(np.float64), spread)
    return moved, edges[0] + (first + np.arange(moved.size + 1) + 0.5) * width


def expected_noise(counts: np.ndarray, edges: np.ndarray, ranges: Sequence[float], bits: Sequence[int]) -> np.ndarray:
    """Mean squared error of x̂ = Δ·clip(round(x / Δ), −n, n), Δ = range / n, n = 2^(bits−1) − 1, from x's histogram.

    For each of the ranges and bits, which belong together; float64 (bits,). A bin's values are taken as spread evenly
    over it; the integral of the error over a bin is exact then, for rounding (a cubic in the distance to the nearest
    level) as for clipping.
    """
    widths = edges[1:] - edges[:-1]
    density = counts / (widths * counts.sum())
    n = np.array([[levels(width)] for width in bits], np.float64)
    step = np.reshape(ranges, (-1, 1)) / n
    magnitude = np.abs(edges)
    nearest = np.minimum(np.floor(magnitude / step + 0.5), n)
    remainder = magnitude - nearest * step
    integral = np.sign(edges) * (nearest * (step**3 / 12) + remainder * remainder * remainder / 3)  # from 0 to edge
    return (integral[:, 1:] - integral[:, :-1]) @ density


def expected_sqnrs(
    counts: np.ndarray, edges: np.ndarray, ranges: Sequence[float], bits: Sequence[int], shift: np.ndarray | None = None
) -> tuple[float, ...]:
    """Signal-to-quantization-noise ratio in dB at each bit-width: 10·log10(E[x²] / E[(x − x̂)²]), from x's histogram.

    With a shift (channels,) x − shift is quantized, and ranges are its.
    """
    power = mean_square(counts, edges)
    if shift is not None:
        counts, edges = centred_histogram(counts, edges, shift)
    noises = expected_noise(counts, edges, ranges, bits).tolist()
    return tuple(10 * math.log10(power / noise) if power and noise > 0 else math.inf for noise in noises)


def mean_square(counts: np.ndarray, edges: np.ndarray) -> float:
    """E[x²] from x's histogram."""
    low, high = edges[:-1], edges[1:]
    return float(counts @ (low * low + low * high + high * high)) / (3 * float(counts.sum()))


def clipping_weight(bits: int) -> float:
    """How much worse an error by clipping is than one of equal energy by rounding.

    Rounding errors differ from token to token and channel to channel and average out in a matrix product; those of clipping
    come back in the same channels and tokens (the first text token is the same in every prompt). At 8 bits, where there is
    little to win, clipping must be worth it 64 times over: with a weight of 1 the worst layer of sd3-emoji loses 5.8 dB
    of its output's SQNR on held-out images against the full range, with 64 0.4 dB. Below 8 bits energy decides.
    """
    return 64.0 if bits == 8 else 1.0


def histogram_clipping_ranges(counts: np.ndarray, edges: np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """(bits,): the clipping range with the least expected noise.

    The noise of range t is t² / (12·n²) + w·E[max(0, |x| − t)²], n = 2^(bits−1) − 1: evenly spread rounding errors and
    what clipping costs (as in ACIQ, Banner et al. 2019; w: `clipping_weight`). Every edge of the histogram of |x| is tried.
    """
    inside, magnitudes = absolute_histogram(counts, edges)
    filled = int(np.flatnonzero(inside)[-1]) + 1
    inside, ranges = inside[:filled], magnitudes[1 : filled + 1]
    centres = (magnitudes[:filled] + ranges) / 2
    first, second = inside * centres, inside * centres * centres
    clipping = (  # of what lies beyond each range
        (second.sum() - second.cumsum())
        - 2 * ranges * (first.sum() - first.cumsum())
        + ranges * ranges * (inside.sum() - inside.cumsum())
    ) / inside.sum()
    best = [
        np.argmin(ranges * ranges / (12 * levels(width) ** 2) + clipping_weight(width) * clipping) for width in bits
    ]
    return ranges[best]


def clipping_fraction(counts: np.ndarray, edges: np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """(bits,): `histogram_clipping_ranges` as a fraction of the largest |x|."""
    inside, magnitudes = absolute_histogram(counts, edges)
    return histogram_clipping_ranges(counts, edges, bits) / magnitudes[int(np.flatnonzero(inside)[-1]) + 1]


def unmigrated_clipping_ranges(
    histogram: tuple[np.ndarray, np.ndarray] | None, shift: np.ndarray | None, reach: np.ndarray,
    power: np.ndarray | None, bits: Sequence[int],
) -> np.ndarray:  # fmt: skip
    """(bits,): where x − shift is clipped: where that costs least, judged on what is quantized.

    histogram: (counts, edges) of x; without a shift it is exact. With one, that of x − shift follows from it and the shifts; a
    channel whose range comes from a few tokens has its ordinary ones at −shift, so no range is below the root mean square
    of any channel's x − shift (power, (channels,): E[(x − shift)²]). Where histogram or moments are missing the full
    range stays: reach (channels,), the largest |x − shift| of any image.
    """
    full = float(reach.max())
    if histogram is None or full == 0 or (shift is not None and power is None):
        return np.full(len(bits), full)
    if shift is None:
        return full * clipping_fraction(*histogram, bits)
    ranges = histogram_clipping_ranges(*centred_histogram(*histogram, shift), bits)
    return np.clip(ranges, float(np.sqrt(power.max())), full)


CANDIDATES = np.linspace(0.3, 1.0, 71)  # of the full range


def channel_clipping_range(
    reach: np.ndarray, power: np.ndarray | None, multipliers: np.ndarray | int, bits: Sequence[int]
) -> np.ndarray:
    """(bits,): clipping ranges of z = (x − shift) / m that cost no more than the full one, from moments per channel.

    reach (channels,): largest |x − shift| of any image; power (channels,): E[(x − shift)²] over all tokens, None where it is
    not known (then the full range stays); multipliers: m, (channels,) or 1. What clipping at t costs a channel is bounded
    without knowing its distribution: E[max(0, |z| − t)²] ≤ (1 − t / r)²·E[z²] for |z| ≤ r. A channel whose range comes
    from a few tokens has its ordinary ones at −shift, so that E[z²] is near r² and the bound is what is lost; a rare
    excursion gives a small E[z²]. The range chosen has the least sum of rounding noise t² / (12·n²) and this bound (times
    `clipping_weight`), both in units of x (times m²). A channel that ranges below t is not clipped at all.
    """
    m = np.broadcast_to(np.asarray(multipliers, np.float64), reach.shape)
    r = reach / m
    full = float(r.max())
    if power is None or full == 0:
        return np.full(len(bits), full)
    ranges = CANDIDATES * full
    wide = r > ranges[0]
    excess = np.maximum(1 - ranges / r[wide, None], 0)
    clipping = power[wide] @ (excess * excess)
    weight = float((m * m).sum())
    best = [
        np.argmin(weight * ranges * ranges / (12 * levels(width) ** 2) + clipping_weight(width) * clipping)
        for width in bits
    ]
    return ranges[best]
