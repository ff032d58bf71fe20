"""Compute grids, codes and packed words of weights, in NumPy; grid_position and dequantize take MLX arrays, too."""

import numpy as np

CACHED = 2**17  # number of weights that a core's cache holds
SHRINKS = np.linspace(1, 0.6, 21).tolist()  # shares of a group's range that `searched_grid` tries


def min_max_grid(weight: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an asymmetric grid over each group's range, Ŵ = scale·(code − zero point).

    weight (out, in); group_size is the number of consecutive inputs in a group, 0 for one group per output channel.
    Returns scale and zero point, (out, groups) float32 each. The range always holds 0; the zero point is the integer
    code of 0.
    """
    return _grid(_grouped(weight, group_size), bits, 1.0)


def searched_grid(weight: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a grid as `min_max_grid` does, but over the best of 21 ranges between 0.6 and 1 × the group's.

    The best range of a group is the one with the least squared error Σ (Ŵ − W)².
    """
    rows = max(1, CACHED // weight.shape[1])
    parts = [_searched(weight[begin : begin + rows], bits, group_size) for begin in range(0, len(weight), rows)]
    scale, zero_point = map(np.concatenate, zip(*parts, strict=True))
    return scale, zero_point


def _searched(weight: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    grouped = _grouped(weight, group_size).astype(np.float32)
    best_error = None
    for shrink in SHRINKS:
        scale, zero_point = _grid(grouped, bits, shrink)
        error = grouped / scale[..., None]  # the only large array: what follows is computed in its place
        error += zero_point[..., None]
        np.subtract(np.clip(np.rint(error), 0, 2**bits - 1), error, out=error)
        error = np.einsum("ogi,ogi->og", error, error) * np.square(scale)
        if best_error is None:
            best_error, best_scale, best_zero_point = error, scale, zero_point
        else:
            better = error < best_error
            best_scale = np.where(better, scale, best_scale)
            best_zero_point = np.where(better, zero_point, best_zero_point)
            best_error = np.minimum(error, best_error)
    return best_scale, best_zero_point


def _grouped(weight: np.ndarray, group_size: int) -> np.ndarray:
    return weight.reshape(len(weight), -1, group_size or weight.shape[1])


def _grid(grouped: np.ndarray, bits: int, shrink: float) -> tuple[np.ndarray, np.ndarray]:
    low, high = grouped.min(axis=-1).astype(np.float64), grouped.max(axis=-1).astype(np.float64)
    low, high = np.minimum(low, 0) * shrink, np.maximum(high, 0) * shrink
    scale = np.maximum((high - low) / (2**bits - 1), np.finfo(np.float32).tiny)
    return scale.astype(np.float32), np.rint(-low / scale).astype(np.float32)


def grid_position(weight, scale, zero_point):
    """Return each weight's position on its grid, as a real code: W / scale + zero point (out, in).

    weight (out, in); scale and zero_point (out, groups). NumPy or MLX arrays.
    """
    return (weight.reshape(*scale.shape, -1) / scale[..., None] + zero_point[..., None]).reshape(weight.shape)


def dequantize(codes, scale, minimum):
    """Return Ŵ = scale·code + minimum, (out, in), as `mx.dequantize` computes it.

    codes (out, in); scale and minimum (out, groups). NumPy or MLX arrays.
    """
    return (codes.reshape(*scale.shape, -1) * scale[..., None] + minimum[..., None]).reshape(codes.shape)


def nearest_codes(weight: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bits: int) -> np.ndarray:
    """Round weights (out, in) to the nearest codes of a grid (out, groups). Returns codes (out, in) uint8."""
    return np.clip(np.rint(grid_position(weight, scale, zero_point)), 0, 2**bits - 1).astype(np.uint8)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes (out, in) uint8 into words (out, in·bits / 32) uint32, the first code in a word's lowest bits.

    This is the layout of `mx.quantize`: `mx.dequantize` and `mx.quantized_matmul` read it with a grid's scale and
    minimum as scales and biases. in·bits must be a multiple of 32.
    """
    if 8 % bits == 0:
        packed, count = codes[:, :: 8 // bits].copy(), 8 // bits
        for place in range(1, count):
            packed |= codes[:, place::count] << np.uint8(place * bits)
        return packed.view("<u4")
    ones_and_zeros = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(ones_and_zeros.reshape(len(codes), -1), axis=1, bitorder="little")
    return packed.view("<u4")
