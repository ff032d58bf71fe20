"""What a quantized layer is: codes, grid and bias, whatever made them; and the same as MLX runs it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from calibration_store.model_folder import PACKED_GROUPS
from w4a8.backend.parallel import compiled
from w4a8.model.packed import Packed
from w4a8.quantized.arithmetic import dequantize, min_max_grid, nearest_codes, pack_codes

SMALLEST_SCALE = 2.0**-24  # the smallest float16 above 0


def float16_values(array: Any) -> Any:
    """Rounded to float16, as float32; NumPy or MLX."""
    if isinstance(array, mx.array):
        return array.astype(mx.float16).astype(mx.float32)
    with np.errstate(over="ignore"):  # infinity: whoever reads it refuses it
        return array.astype(np.float16).astype(np.float32)


def deployed(scale: Any, zero_point: Any) -> tuple[Any, Any]:
    """(scale, minimum) of a grid as a packed model holds them: float16 values, (out, groups) float32; NumPy or MLX arrays.

    minimum = −scale·zero point, the value of code 0. A grid that was made from the result gives it again, bit for bit.
    """
    largest = mx.maximum if isinstance(scale, mx.array) else np.maximum
    scale = float16_values(largest(scale, SMALLEST_SCALE))
    return scale, float16_values(-scale * zero_point)


def deployed_grid(scale: Any, zero_point: Any) -> tuple[Any, Any]:
    """The grid that is deployed in place of this one, as (scale, zero point); the zero point is no integer then."""
    scale, minimum = deployed(scale, zero_point)
    return scale, -minimum / scale


@functools.cache
def fused_weight() -> Callable:
    """(codes float32, scale, zero point) -> Ŵ on the grid that is deployed; MLX."""
    return compiled(lambda codes, scale, zero_point: dequantize(codes, *deployed(scale, zero_point)))


@dataclass(frozen=True)
class QuantizedLayer:
    """Codes (out, in), scale and zero point (out, groups) float32, bias (out,) or None.

    NumPy arrays with codes uint8, or MLX arrays with codes float32 (between two of the grid's while a sigmoid is undecided).
    Ŵ = scale·(code − zero point) on the grid that is deployed, a bias as it is deployed: what is trained and measured is what
    is exported.
    """

    codes: Any
    scale: Any
    zero_point: Any
    bias: Any = None

    @property
    def weight(self) -> Any:
        """Ŵ (out, in) float32."""
        if isinstance(self.codes, mx.array):
            return fused_weight()(self.codes, self.scale, self.zero_point)
        return dequantize(self.codes.astype(np.float32), *deployed(self.scale, self.zero_point))

    @property
    def deployed_bias(self) -> Any:
        """The bias in float16 values, (out,) float32; None where it is the model's own."""
        return None if self.bias is None else float16_values(self.bias)

    def as_mlx(self) -> "QuantizedLayer":
        """The same as MLX arrays."""
        bias = None if self.bias is None else mx.array(self.bias)
        codes = mx.array(self.codes).astype(mx.float32)
        return QuantizedLayer(codes, mx.array(self.scale), mx.array(self.zero_point), bias)

    def fields(self) -> dict[str, np.ndarray]:
        """As a block file holds it (calibration_store.weights)."""
        bias = {} if self.bias is None else {"bias": np.array(self.deployed_bias)}
        scale, zero_point = deployed_grid(np.array(self.scale), np.array(self.zero_point))
        return bias | {"q": np.array(self.codes).astype(np.uint8), "scale": scale, "zero_point": zero_point}

    def packed(self, bits: int) -> Packed:
        """As MLX runs it; codes are uint8."""
        scale, minimum = deployed(self.scale, self.zero_point)
        width = self.codes.shape[1]
        group_size = packed_group(width, width // scale.shape[1])
        scale, minimum = (np.repeat(array, width // group_size // array.shape[1], 1) for array in (scale, minimum))
        codes, grid = mx.array(pack_codes(self.codes, bits)), (mx.array(scale), mx.array(minimum))
        return Packed(codes, *(array.astype(mx.float16) for array in grid), bits, group_size)

    @classmethod
    def of_fields(cls, fields: Mapping[str, np.ndarray]) -> "QuantizedLayer":
        return cls(fields["q"], fields["scale"], fields["zero_point"], fields.get("bias"))

    @classmethod
    def nearest(cls, weight: np.ndarray, bits: int, group_size: int) -> "QuantizedLayer":
        """Round-to-nearest on a min-max grid, bias as it is."""
        grid = deployed_grid(*min_max_grid(weight, bits, group_size))
        return cls(nearest_codes(weight, *grid, bits), *grid)


def packed_group(width: int, group_size: int) -> int:
    """The group size of a packed layer; one scale for a whole channel (0, or the width) is repeated in MLX's groups."""
    return (
        group_size
        if group_size in PACKED_GROUPS
        else next(size for size in reversed(PACKED_GROUPS) if width % size == 0)
    )


