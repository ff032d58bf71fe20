"""Hold a quantized layer as codes, grid and bias, whatever made them, and pack it for MLX."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from calibration_store.choices import PACKED_GROUPS
from w4a8.backend.parallel import compiled
from w4a8.model.packed import Packed
from w4a8.quantized.arithmetic import dequantize, min_max_grid, nearest_codes, pack_codes

SMALLEST_SCALE = 2.0**-24  # the smallest float16 above 0


def float16_values(array: Any) -> Any:
    """Round a NumPy or MLX array to float16 values. Returns float32 of the same shape."""
    if isinstance(array, mx.array):
        return array.astype(mx.float16).astype(mx.float32)
    with np.errstate(over="ignore"):  # an overflow becomes infinity, which every reader of the result refuses
        return array.astype(np.float16).astype(np.float32)


def deployed(scale: Any, zero_point: Any) -> tuple[Any, Any]:
    """Return (scale, minimum) of a grid as a packed model holds them: float16 values in (out, groups) float32.

    minimum = −scale·zero point is the value of code 0. A grid that was made from the result gives the same result
    again, bit for bit. NumPy or MLX arrays.
    """
    largest = mx.maximum if isinstance(scale, mx.array) else np.maximum
    scale = float16_values(largest(scale, SMALLEST_SCALE))
    return scale, float16_values(-scale * zero_point)


def deployed_grid(scale: Any, zero_point: Any) -> tuple[Any, Any]:
    """Return the grid that a packed model has in place of this one, as (scale, zero point), (out, groups) float32 each.

    Its zero point is no integer.
    """
    scale, minimum = deployed(scale, zero_point)
    return scale, -minimum / scale


@functools.cache
def fused_weight() -> Callable:
    """Return a compiled function of MLX arrays: (codes float32, scale, zero point) -> Ŵ on the deployed grid."""
    return compiled(lambda codes, scale, zero_point: dequantize(codes, *deployed(scale, zero_point)))


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer's codes (out, in), scale and zero point (out, groups) float32, and bias (out,) or None.

    The arrays are NumPy's with codes uint8, or MLX's with codes float32, which lie between two codes of the grid while
    a sigmoid is undecided. Ŵ = scale·(code − zero point) is computed on the deployed grid, and the bias has its
    deployed values: training and measuring see the numbers that are exported.
    """

    codes: Any
    scale: Any
    zero_point: Any
    bias: Any = None

    @property
    def weight(self) -> Any:
        """Return Ŵ (out, in) float32."""
        if isinstance(self.codes, mx.array):
            return fused_weight()(self.codes, self.scale, self.zero_point)
        return dequantize(self.codes.astype(np.float32), *deployed(self.scale, self.zero_point))

    @property
    def deployed_bias(self) -> Any:
        """Return the bias in float16 values, (out,) float32; None where the model's own bias stays."""
        return None if self.bias is None else float16_values(self.bias)

    def as_mlx(self) -> "QuantizedLayer":
        """Return the same layer as MLX arrays, with codes float32."""
        bias = None if self.bias is None else mx.array(self.bias)
        codes = mx.array(self.codes).astype(mx.float32)
        return QuantizedLayer(codes, mx.array(self.scale), mx.array(self.zero_point), bias)

    def fields(self) -> dict[str, np.ndarray]:
        """Return the layer's arrays as a block file holds them (calibration_store.weights)."""
        bias = {} if self.bias is None else {"bias": np.array(self.deployed_bias)}
        scale, zero_point = deployed_grid(np.array(self.scale), np.array(self.zero_point))
        return bias | {"q": np.array(self.codes).astype(np.uint8), "scale": scale, "zero_point": zero_point}

    def packed(self, bits: int) -> Packed:
        """Pack a layer of NumPy arrays, with codes uint8, for MLX."""
        scale, minimum = deployed(self.scale, self.zero_point)
        width = self.codes.shape[1]
        group_size = packed_group(width, width // scale.shape[1])
        scales, biases = (
            mx.array(np.repeat(array, width // group_size // array.shape[1], 1)).astype(mx.float16)
            for array in (scale, minimum)
        )
        return Packed(mx.array(pack_codes(self.codes, bits)), scales, biases, bits, group_size)

    @classmethod
    def of_fields(cls, fields: Mapping[str, np.ndarray]) -> "QuantizedLayer":
        """Make a layer from the arrays of a block file, the inverse of `fields`."""
        return cls(fields["q"], fields["scale"], fields["zero_point"], fields.get("bias"))

    @classmethod
    def nearest(cls, weight: np.ndarray, bits: int, group_size: int) -> "QuantizedLayer":
        """Round a weight (out, in) to nearest on a min-max grid; the model's own bias stays."""
        grid = deployed_grid(*min_max_grid(weight, bits, group_size))
        return cls(nearest_codes(weight, *grid, bits), *grid)


def packed_group(width: int, group_size: int) -> int:
    """Return the group size of a packed layer of `width` inputs.

    A scale per output channel (group size 0, or the width) is repeated in the largest of MLX's groups that divides
    the width.
    """
    return (
        group_size
        if group_size in PACKED_GROUPS
        else next(size for size in reversed(PACKED_GROUPS) if width % size == 0)
    )
