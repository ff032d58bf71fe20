"""Make up inputs of linear layers with real SD3-Medium's extremes, from tools/sd3_medium_extremes.json. NumPy only.

There are two kinds of outlier channels, and a quantizer has to survive both: channels that are wide on every token
("every"), and channels that are ordinary but for one or two tokens of an image ("rare").
"""

import json
import math
import re
import zlib
from pathlib import Path

import numpy as np

TABLE = Path(__file__).resolve().parent.parent / "tools" / "sd3_medium_extremes.json"
KINDS = ("rare", "every")
CHANNELS_PER_OUTLIER = 512
GELU_MINIMUM = 0.17


def real_layers() -> dict[str, dict]:
    """Return {layer: entry}.

    An entry has the keys name, inputs, absmax, channel_absmax_mean, channel_absmax_max and max_over_median_channel.
    """
    table = json.loads(TABLE.read_text())
    return {
        name: {"name": name} | dict(zip(table["columns"], row, strict=True)) for name, row in table["layers"].items()
    }


def channel_absmax(layer: dict) -> np.ndarray:
    """Return the largest |x| of each channel (inputs,), ascending, with the table's largest, median and nearly mean.

    The values are a lognormal bulk and a few outliers between half the largest and the largest. The upper half of the
    bulk (for a mean above the median) or its lower half is as wide as the mean asks for. The table's figures need not
    agree with one another: a mean below half the median is out of reach.
    """
    channels, largest = layer["inputs"], layer["channel_absmax_max"]
    median, mean = largest / layer["max_over_median_channel"], layer["channel_absmax_mean"]
    count = channels // CHANNELS_PER_OUTLIER
    outliers = largest * np.linspace(0.5, 1, count)
    normal = np.sqrt(2) * _inverse_erf(2 * (np.arange(channels) + 0.5) / channels - 1)

    def spread(lower: float, upper: float) -> np.ndarray:
        bulk = median * np.exp(normal * np.where(normal < 0, lower, upper))
        return np.sort(np.concatenate([np.minimum(bulk[:-count], 0.9 * largest), outliers]))

    usual = 0.25
    widen_upper = spread(usual, usual).mean() < mean
    low, high = 0.0, 6.0
    for _ in range(20):
        width = (low + high) / 2
        values = spread(usual, width) if widen_upper else spread(width, usual)
        if (values.mean() < mean) == widen_upper:
            low = width
        else:
            high = width
    return values


def _inverse_erf(y: np.ndarray) -> np.ndarray:
    """Return the inverse error function of y, by Winitzki's approximation, which is good to 2e-3."""
    a = 0.147
    log = np.log1p(-y * y)
    half = 2 / (math.pi * a) + log / 2
    return np.copysign(np.sqrt(np.sqrt(half * half - log / a) - half), y)


def _generators(layer: dict, seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Return two random generators, one for rows and one for values.

    With its own generator `ordinary_rows` draws the rows of `synthetic_inputs`. q_proj, k_proj and v_proj of a stream
    get the same generators, since they have the same input.
    """
    name = zlib.crc32(re.sub("[kv]_proj", "q_proj", layer["name"]).encode())
    return np.random.default_rng([seed, name, 0]), np.random.default_rng([seed, name, 1])


def ordinary_rows(layer: dict, kind: str, tokens: int, images: int, seed: int) -> list[np.ndarray]:
    """Return for each image a mask (tokens,) bool of the rows that hold no rare extreme.

    With kind "every" these are all rows, with "rare" all but one or two.
    """
    rng, _ = _generators(layer, seed)
    ordinary = np.ones((images, tokens), bool)
    if kind == "rare":
        for rows in ordinary:
            rows[rng.choice(tokens, rng.integers(1, 3), replace=False)] = False
    return list(ordinary)


def synthetic_inputs(layer: dict, kind: str, tokens: int, images: int, seed: int) -> list[np.ndarray]:
    """Return an input (tokens, inputs) float32 for each image.

    Over all images the largest |x| of the channels are `channel_absmax(layer)`, in a random order. layer: an entry of
    `real_layers`. Ordinary values are normal; those of fc2 are post-GELU: most of them near 0, none below -0.17, with
    positive tails. With kind "rare" the outlier channels are like the median channel on ordinary rows and reach their
    extremes on the rare ones; with "every" they are large everywhere, with one sign.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {KINDS}")
    _, rng = _generators(layer, seed)
    channels, is_fc2 = layer["inputs"], layer["name"].endswith(".mlp.fc2")
    count = channels // CHANNELS_PER_OUTLIER
    widths = channel_absmax(layer).astype(np.float32)
    order = rng.permutation(channels)  # position of each width
    outliers, extremes = order[-count:], widths[-count:].copy()
    widths[-count:] = widths[channels // 2]
    at = np.empty_like(widths)
    at[order] = widths
    x = rng.standard_normal((images * tokens, channels), np.float32)
    if is_fc2:
        _gelu_tails(x, at)
    else:
        x *= at / np.maximum(x.max(0), -x.min(0))
    signs = np.ones(count, np.float32) if is_fc2 else rng.choice(np.float32([-1, 1]), count)
    if kind == "every":
        rows = np.arange(len(x))
    else:
        rows = np.flatnonzero(~np.concatenate(ordinary_rows(layer, kind, tokens, images, seed)))
    size = rng.uniform(0.5, 1, (len(rows), count)).astype(np.float32)
    size[0] = 1  # image 0 has the extreme
    x[rows[:, None], outliers] = size * extremes * signs
    return list(x.reshape(images, tokens, channels))


def _gelu_tails(x: np.ndarray, widths: np.ndarray) -> None:
    """Turn normal x (rows, channels) into post-GELU values in place: most near 0, positive tails up to `widths`.

    x · sigmoid(1.702 x) has GELU's shape and a minimum of -0.16. widths (channels,).
    """
    x -= 0.7
    x /= 1 + np.exp(-1.702 * x)
    tails = np.maximum(x, 0)
    x -= tails
    tails *= np.maximum(widths, GELU_MINIMUM) / tails.max(0)
    x += tails
