"""Layers that compute from packed weights: y = x·Ŵᵀ + b, Ŵ as `mx.dequantize` unpacks it.

DiffusionKit's tokens are (R, tokens, 1, hidden): `mx.quantized_matmul` takes the 1 for the number of rows and runs a
matrix-vector product per token. Therefore the input is flattened to two dimensions first, and the way to multiply is
chosen by device and number of rows. benchmarks/native_speed.py measures every way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from w4a8.backend.memory import device_memory
from w4a8.backend.parallel import announce_compilation
from w4a8.model.layers import model_layers

AUTO, QUANTIZED, DEQUANTIZE, DENSE = "auto", "quantized", "dequantize", "dense"
FEW_ROWS = 256  # up to this number of rows CUDA multiplies packed weights faster than it unpacks them
DENSE_SHARE = 0.25  # the share of a CPU's memory that dense copies of the weights may take


@dataclass(frozen=True)
class Packed:
    """A layer as `mx.quantized_matmul` takes it.

    codes (out, in·bits / 32) uint32; scales and biases (out, groups) float16.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    def dense(self, dtype: mx.Dtype) -> mx.array:
        """Unpack Ŵ (out, in) as a model of this precision does."""
        scales, biases = self.scales.astype(dtype), self.biases.astype(dtype)
        return mx.dequantize(self.codes, scales, biases, self.group_size, self.bits)


class NativeLinear(nn.QuantizedLinear):
    """A packed linear layer for any number of rows, with the parameters of nn.QuantizedLinear.

    way: quantized (`mx.quantized_matmul`), dequantize (unpack, then a dense product), dense (as dequantize, but the
    dense weight is kept) or auto (as quantized up to FEW_ROWS rows, as dequantize above). Both dense products equal
    those of a dense layer with the unpacked weight, bit for bit.
    """

    way = DEQUANTIZE
    together: "Together | None" = None  # the layers that are unpacked with this one

    def __init__(self, packed: Packed, bias: mx.array | None = None):
        nn.Module.__init__(self)
        self.group_size, self.bits, self.mode = packed.group_size, packed.bits, "affine"
        self.weight, self.scales, self.biases = packed.codes, packed.scales, packed.biases
        if bias is not None:
            self.bias = bias
        self.freeze()

    def dense_weight(self) -> mx.array:
        """Unpack Ŵ (out, in) in the dtype of the scales."""
        if self.together is not None:
            return self.together.weight_of(self)
        return mx.dequantize(*self.packed_arrays, self.group_size, self.bits)

    @property
    def packed_arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return codes, scales and biases."""
        return self["weight"], self["scales"], self["biases"]

    def __call__(self, x: mx.array) -> mx.array:
        """Compute y = x·Ŵᵀ + b, (…, out), for x (…, in)."""
        if self.way == QUANTIZED or (self.way == AUTO and x.size // x.shape[-1] <= FEW_ROWS):
            return self._quantized_product(x)
        if self.way == DENSE:
            if "_dense" not in self:  # a name with an underscore is no parameter to MLX
                self["_dense"] = self.dense_weight()
            weight = self["_dense"]
        else:
            weight = self.dense_weight()
        return mx.addmm(self["bias"], x, weight.T) if "bias" in self else x @ weight.T

    def _quantized_product(self, x: mx.array) -> mx.array:
        announce_compilation("4-bit kernels")
        rows = x.reshape(-1, x.shape[-1])
        y = mx.quantized_matmul(rows, *self.packed_arrays, transpose=True, group_size=self.group_size, bits=self.bits)
        y = y + self["bias"] if "bias" in self else y
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Together:
    """Packed layers of one stream and width, which are unpacked by one kernel, since launches cost more than its work."""

    def __init__(self, layers: Sequence[NativeLinear]):
        """Join the layers' packed arrays, of which each layer then has its rows."""
        arrays = [mx.concatenate(list(parts)) for parts in zip(*(layer.packed_arrays for layer in layers), strict=True)]
        mx.eval(arrays)
        self._arrays, self._first = arrays, layers[0]
        self._rows: dict[int, slice] = {}
        self._waiting: dict[int, mx.array] = {}  # unpacked weights whose layers were not called yet
        begin = 0
        for layer in layers:
            rows = slice(begin, begin + len(layer["weight"]))
            layer["weight"], layer["scales"], layer["biases"] = (array[rows] for array in arrays)
            layer.together, self._rows[id(layer)], begin = self, rows, rows.stop

    def weight_of(self, layer: NativeLinear) -> mx.array:
        """Return a layer's unpacked weight (out, in); the other layers' wait until these are called, once."""
        if id(layer) not in self._waiting:
            codes, scales, biases = self._arrays
            dense = mx.dequantize(codes, scales, biases, self._first.group_size, self._first.bits)
            self._waiting = {name: dense[rows] for name, rows in self._rows.items()}
        return self._waiting.pop(id(layer))


def unpack_together(mmdit: nn.Module) -> None:
    """Let the layers of each stream that have the same inputs' width and packing be unpacked together."""
    alike: dict[tuple, list[NativeLinear]] = {}
    for layer in model_layers(mmdit).values():
        module = layer.module
        if isinstance(module, NativeLinear) and module.way in (AUTO, DEQUANTIZE):
            stream = layer.name.removesuffix(layer.role)
            kind = (stream, layer.shape[1], module.bits, module.group_size, module["scales"].dtype)
            alike.setdefault(kind, []).append(module)
    for layers in alike.values():
        if len(layers) > 1:
            Together(layers)


class NativeEmbedding(nn.QuantizedEmbedding):
    """A packed table whose `weight` is the dense one: DiffusionKit crops the table of positions itself."""

    def __init__(self, packed: Packed):
        nn.Module.__init__(self)
        self.group_size, self.bits, self.mode = packed.group_size, packed.bits, "affine"
        self["weight"], self["scales"], self["biases"] = packed.codes, packed.scales, packed.biases
        self.freeze()

    @property
    def weight(self) -> mx.array:  # type: ignore[override]  # MLX's stubs say that it is an attribute
        """Return the table (rows, channels) in the dtype of the scales."""
        return mx.dequantize(self["weight"], self["scales"], self["biases"], self.group_size, self.bits)


def native_module(module: nn.Module, packed: Packed) -> nn.Module:
    """Make the packed form of a linear layer or a table; a linear layer keeps its bias."""
    table = isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
    return NativeEmbedding(packed) if table else NativeLinear(packed, module.get("bias"))


def adopt(model: nn.Module, way: str = AUTO) -> None:
    """Put native layers in place of MLX's packed ones. way: how they multiply (`--native`)."""

    def replace(path: str, module: nn.Module) -> nn.Module:
        if type(module) not in (nn.QuantizedLinear, nn.QuantizedEmbedding):
            return module
        codes = Packed(module["weight"], module["scales"], module["biases"], module.bits, module.group_size)
        return native_module(module, codes)

    model.update_modules(tree_map_with_path(replace, model.leaf_modules(), is_leaf=nn.Module.is_module))
    layers = [module for module in model.modules() if isinstance(module, NativeLinear)]
    way = resolve(way, sum(dense_bytes(layer) for layer in layers))
    for layer in layers:
        layer.way = way


def dense_bytes(layer: NativeLinear) -> int:
    """Return the bytes of a layer's dense weight."""
    return layer["scales"].size * layer.group_size * layer["scales"].dtype.size


def resolve(way: str, bytes_of_dense: int) -> str:
    """Return the way to multiply that `auto` means on this device; another way stays.

    Metal multiplies packed weights; CUDA unpacks them, but for a few rows. A CPU keeps dense copies where these take
    at most a quarter of its memory, else it unpacks at every pass.
    """
    if way != AUTO:
        return way
    if mx.default_device() != mx.Device(mx.cpu):
        return QUANTIZED if mx.metal.is_available() else AUTO
    return DENSE if bytes_of_dense <= DENSE_SHARE * device_memory() else DEQUANTIZE


def get_ready(model: nn.Module) -> None:
    """Compile the kernels that unpack this model's weights on a GPU, announce it, and join what is unpacked together."""
    if mx.default_device() == mx.Device(mx.cpu):
        return
    kinds = {(m.bits, m.group_size): m for m in model.modules() if isinstance(m, NativeLinear)}
    if kinds:
        announce_compilation("4-bit kernels")
        mx.eval([module.dense_weight() for module in kinds.values()])
        unpack_together(model)
