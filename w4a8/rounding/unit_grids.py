"""The grids that the training of a unit starts from: searched by NumPy on every core, or by MLX on a GPU."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from w4a8.backend.parallel import on_every_core
from w4a8.quantized.arithmetic import SHRINKS, grid_position, searched_grid
from w4a8.quantized.layer import QuantizedLayer, deployed_grid
from w4a8.rounding.methods import METHODS, Arrays
from w4a8.rounding.settings import FLOAT32, Settings

STATE_KEYS = ("alpha", "scale", "zero_point", "bias", "range")


@dataclass(frozen=True)
class UnitGrids:
    """The grids that the training of a unit's layers starts from, found in the weights alone."""

    nearest: dict[str, QuantizedLayer]  # round-to-nearest on a min-max grid
    floor: Arrays  # (out, in) float32: the code below each weight on the searched grid
    start: dict[str, Arrays]  # α, scale and zero point by layer

    @classmethod
    def search(cls, weights: Arrays, settings: Settings) -> "UnitGrids":
        """Search a grid for each of the weights (out, in): on every core, or where products have 16 bits on the device."""
        if settings.precision != FLOAT32:
            return cls._on_device(weights, settings)
        dense = {name: np.array(weight, np.float32) for name, weight in weights.items()}
        method, found = METHODS[settings.rounding](settings), cls({}, {}, {key: {} for key in STATE_KEYS})

        def grids(name: str) -> tuple[QuantizedLayer, np.ndarray, np.ndarray]:
            bits, group = settings.bits(name), settings.group_size
            grid = deployed_grid(*searched_grid(dense[name], bits, group))
            return QuantizedLayer.nearest(dense[name], bits, group), *grid

        for name, (nearest, scale, zero_point) in zip(dense, on_every_core(grids, dense), strict=True):
            position = grid_position(dense[name], scale, zero_point)
            found.nearest[name], found.floor[name] = nearest, mx.array(np.floor(position))
            found.start["alpha"][name] = method.first_alpha(position - np.floor(position))
            found.start["scale"][name], found.start["zero_point"][name] = mx.array(scale), mx.array(zero_point)
        return found

    @classmethod
    def _on_device(cls, weights: Arrays, settings: Settings) -> "UnitGrids":
        method, found = METHODS[settings.rounding](settings), cls({}, {}, {key: {} for key in STATE_KEYS})
        for name, weight in weights.items():
            bits, group = settings.bits(name), settings.group_size
            nearest, best = (deployed_grid(*grid) for grid in grids_on_device(weight.astype(mx.float32), bits, group))
            codes = mx.clip(mx.round(grid_position(weight, *nearest)), 0, 2**bits - 1).astype(mx.uint8)
            position = grid_position(weight, *best)
            found.nearest[name], found.floor[name] = QuantizedLayer(codes, *nearest), mx.floor(position)
            found.start["alpha"][name] = method.first_alpha(position - found.floor[name])
            found.start["scale"][name], found.start["zero_point"][name] = best
            mx.eval(codes, *nearest, found.floor[name], *(found.start[key][name] for key in STATE_KEYS[:3]))
        return found


Grid = tuple[mx.array, mx.array]  # scale and zero point, (out, groups) float32


def grids_on_device(weight: mx.array, bits: int, group_size: int) -> tuple[Grid, Grid]:
    """Return the min-max grid of a weight (out, in) float32, and the best of the grids that `searched_grid` compares.

    It is that function's twin in float32: where two grids err alike, the twins may choose differently.
    """
    grouped, top = weight.reshape(len(weight), -1, group_size or weight.shape[1]), 2**bits - 1
    low, high = mx.minimum(grouped.min(axis=-1), 0), mx.maximum(grouped.max(axis=-1), 0)
    grids: list[Grid] = []
    errors = []
    for shrink in SHRINKS:
        scale = mx.maximum((high - low) * (shrink / top), float(np.finfo(np.float32).tiny))
        zero_point = mx.round(-low * shrink / scale)
        position = grouped / scale[..., None] + zero_point[..., None]
        rest = mx.clip(mx.round(position), 0, top) - position
        grids.append((scale, zero_point))
        errors.append(mx.square(rest).sum(axis=-1) * mx.square(scale))
        mx.eval(errors[-1])
    chosen = mx.argmin(mx.stack(errors), axis=0)[None]
    scale, zero_point = (
        mx.take_along_axis(mx.stack(list(parts)), chosen, axis=0)[0] for parts in zip(*grids, strict=True)
    )
    return grids[0], (scale, zero_point)
