"""What a quantized model is: codes, grid and bias of each layer, whatever made them, and a rule for the inputs.

Stage 3W trains it, stage 4 and the benchmarks measure it: the same objects.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.errors import OptionError, StoreError
from calibration_store.layout import WeightPaths
from calibration_store.model_folder import PACKED_GROUPS
from calibration_store.names import block_of
from calibration_store.weights import WEIGHTS_METADATA, read_quantized_block
from w4a8.model.layers import Layer, model_layers
from w4a8.quantized.arithmetic import dequantize, min_max_grid, nearest_codes, pack_codes

SMALLEST_SCALE = 2.0**-24  # the smallest float16 above 0


def deployed(scale: Any, zero_point: Any) -> tuple[Any, Any]:
    """(scale, minimum) of a grid as a packed model holds them: float16 values, (out, groups) float32; NumPy or MLX arrays.

    minimum = −scale·zero point, the value of code 0. A grid that was made from the result gives it again, bit for bit.
    """
    if isinstance(scale, mx.array):
        scale = mx.maximum(scale, SMALLEST_SCALE).astype(mx.float16).astype(mx.float32)
        return scale, (-scale * zero_point).astype(mx.float16).astype(mx.float32)
    with np.errstate(over="ignore"):  # infinity: whoever reads it refuses it
        scale = np.maximum(scale, np.float32(SMALLEST_SCALE)).astype(np.float16).astype(np.float32)
        return scale, (-scale * zero_point).astype(np.float16).astype(np.float32)


def deployed_grid(scale: Any, zero_point: Any) -> tuple[Any, Any]:
    """The grid that is deployed in place of this one, as (scale, zero point); the zero point is no integer then."""
    scale, minimum = deployed(scale, zero_point)
    return scale, -minimum / scale


@dataclass(frozen=True)
class QuantizedLayer:
    """Codes (out, in), scale and zero point (out, groups) float32, bias (out,) or None.

    NumPy arrays with codes uint8, or MLX arrays with codes float32 (between two of the grid's while a sigmoid is undecided).
    Ŵ = scale·(code − zero point) on the grid that is deployed: what is trained and measured is what is exported.
    """

    codes: Any
    scale: Any
    zero_point: Any
    bias: Any = None

    @property
    def weight(self) -> Any:
        """Ŵ (out, in) float32."""
        codes = self.codes if isinstance(self.codes, mx.array) else self.codes.astype(np.float32)
        return dequantize(codes, *deployed(self.scale, self.zero_point))

    def as_mlx(self) -> "QuantizedLayer":
        """The same as MLX arrays."""
        bias = None if self.bias is None else mx.array(self.bias)
        codes = mx.array(self.codes).astype(mx.float32)
        return QuantizedLayer(codes, mx.array(self.scale), mx.array(self.zero_point), bias)

    def fields(self) -> dict[str, np.ndarray]:
        """As a block file holds it (calibration_store.weights)."""
        bias = {} if self.bias is None else {"bias": np.array(self.bias)}
        scale, zero_point = deployed_grid(np.array(self.scale), np.array(self.zero_point))
        return bias | {"q": np.array(self.codes).astype(np.uint8), "scale": scale, "zero_point": zero_point}

    def packed(self, bits: int) -> "Packed":
        """As MLX runs it; codes are uint8."""
        scale, minimum = deployed(self.scale, self.zero_point)
        width = self.codes.shape[1]
        group_size = width // scale.shape[1]
        if group_size not in PACKED_GROUPS:  # one for a whole channel: its groups repeat it
            group_size = next(size for size in reversed(PACKED_GROUPS) if width % size == 0)
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


@dataclass(frozen=True)
class Packed:
    """A layer as `mx.quantized_matmul` takes it: codes uint32 (out, in·bits / 32), scales and biases (out, groups) float16."""

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    def dense(self, dtype: mx.Dtype) -> mx.array:
        """Ŵ (out, in) as a model of this precision unpacks it."""
        scales, biases = self.scales.astype(dtype), self.biases.astype(dtype)
        return mx.dequantize(self.codes, scales, biases, self.group_size, self.bits)


# --- where weights come from --------------------------------------------------------------------------------


class Weights(Protocol):
    """Quantized weights of a model; `sources` are the files they follow from, made_from what these say of their run."""

    bits: int
    group_size: int
    sources: list[Path]
    made_from: list[tuple[Path, Mapping[str, Any]]]
    remedy: str  # what to run for files of another run

    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        """Whether they are of this model, all of its layers. Raises a UserError that names the variant."""

    def quantized(self, layers: Mapping[str, Layer]) -> Iterator[tuple[str, QuantizedLayer]]:
        """(name, quantized layer) one after the other."""


@dataclass(frozen=True)
class NearestWeights:
    """Round-to-nearest, from the model alone."""

    bits: int
    group_size: int
    sources: tuple = ()
    made_from: tuple = ()
    remedy: str = ""

    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        for name, layer in layers.items():
            width = layer.shape[1]
            if self.group_size and width % self.group_size:
                raise OptionError(f"{variant}: groups of {self.group_size} do not divide the {width} inputs of {name}")

    def quantized(self, layers: Mapping[str, Layer]) -> Iterator[tuple[str, QuantizedLayer]]:
        for name, layer in layers.items():
            weight = np.array(layer.weight.astype(mx.float32))
            yield name, QuantizedLayer.nearest(weight, self.bits, self.group_size)


class StoredWeights:
    """What stage 3W, or GPTQ, left in adaround_weights/; a block in memory at a time."""

    remedy = "run cache_adaround_data.py and optimize_adaround.py with --force"

    def __init__(self, calib_dir: Path):
        self.paths = WeightPaths(calib_dir)
        self.metadata = WEIGHTS_METADATA.read(self.paths.metadata)
        self.bits: int = self.metadata["weight_bits"]
        self.activation_bits: int = self.metadata["activation_bits"]
        self.group_size: int = self.metadata["group_size"]
        self.sources = [self.paths.block(block) for block in self.metadata["block_names"]]
        self.made_from = [(self.paths.metadata, self.metadata)]

    def fields(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """(layer, everything that its block's file says of it)."""
        for block in self.metadata["block_names"]:
            yield from read_quantized_block(self.paths, block, self.metadata).items()

    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        names = set()
        for name, fields in self.fields():
            names.add(name)
            if name not in layers or fields["q"].shape != layers[name].shape:
                path = self.paths.block(block_of(name))
                raise StoreError(f"{path}: {name} {fields['q'].shape} is not the model's")
        check_coverage(variant, "adaround_weights", names, layers)

    def quantized(self, layers: Mapping[str, Layer]) -> Iterator[tuple[str, QuantizedLayer]]:
        for name, fields in self.fields():
            yield name, QuantizedLayer.of_fields(fields)


def check_coverage(variant: str, where: str, names: set[str], layers: Mapping[str, Layer]) -> None:
    """Raise StoreError unless the names are those of the model's layers."""
    extra = sorted(names - layers.keys())
    if extra:
        raise StoreError(f"{variant}: its files have {extra[0]}, which this model has not; leave it out of --variants")
    missing = [layer for layer in layers if layer not in names]
    if missing:
        raise StoreError(
            f"{variant}: {len(missing)} of {len(layers)} layers are missing ({where}: {missing[0]} …); "
            "make the files for the whole model, or leave it out of --variants"
        )


@contextlib.contextmanager
def weights_in_place(mmdit: nn.Module, weights: Weights | None) -> Iterator[None]:
    """Quantized weights (and corrected biases), unpacked as the exported model unpacks them, until the block ends."""
    if weights is None:
        yield
        return
    layers = model_layers(mmdit)
    packed = [name for name, layer in layers.items() if layer.is_packed]
    if packed:
        raise OptionError(f"{packed[0]}: the model's weights are packed already; quantize the original model's")
    originals = {name: (layer.module.weight, layer.bias) for name, layer in layers.items()}
    try:
        for name, quantized in weights.quantized(layers):
            dtype = originals[name][0].dtype
            bias = None if quantized.bias is None else mx.array(quantized.bias).astype(dtype)
            layers[name].replace(quantized.packed(weights.bits).dense(dtype), bias)
        yield
    finally:
        for name, original in originals.items():
            layers[name].replace(*original)
