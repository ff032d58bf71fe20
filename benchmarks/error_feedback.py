"""GPTQ's rounding of one layer: what gptq.py writes for every layer."""

import mlx.core as mx
import numpy as np

from w4a8.quantized.arithmetic import searched_grid
from w4a8.quantized.layer import QuantizedLayer

DAMPING = 0.01  # of the mean diagonal, as in the published code


def gptq_codes(
    weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bits: int
) -> np.ndarray:
    """Codes (out, in) uint8: columns rounded in order of their activations' energy, each error spread over the rest.

    weight (out, in), gram XXᵀ (in, in), grid (out, groups).
    """
    width = weight.shape[1]
    order = np.argsort(-np.diag(gram), kind="stable")
    damped = gram[np.ix_(order, order)] + np.eye(width) * DAMPING * np.trace(gram) / width
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    remaining = weight.astype(np.float64)[:, order]
    per_column = (
        np.repeat(array.astype(np.float64), width // scale.shape[1], axis=1)[:, order] for array in (scale, zero_point)
    )
    scales, zero_points = per_column
    codes = np.empty((len(weight), width), np.uint8)
    for position, column in enumerate(order):
        s, z = scales[:, position], zero_points[:, position]
        code = np.clip(np.rint(remaining[:, position] / s + z), 0, 2**bits - 1)
        error = (remaining[:, position] - (code - z) * s) / factor[position, position]
        remaining[:, position + 1 :] -= np.outer(error, factor[position, position + 1 :])
        codes[:, column] = code
    return codes


def gptq_layer(weight: mx.array, gram: mx.array, bits: int, group_size: int) -> QuantizedLayer:
    """A layer by GPTQ, on the grid that stage 3W starts from. weight (out, in), gram XXᵀ (in, in)."""
    dense = np.array(weight)
    grid = searched_grid(dense, bits, group_size)
    return QuantizedLayer(gptq_codes(dense, np.array(gram, np.float64), *grid, bits), *grid)
