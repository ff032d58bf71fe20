"""The forward pass of a block whose linear layers are quantized in training; gradients flow through it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from w4a8.model.hooks import substituted_layers
from w4a8.model.layers import Block
from w4a8.quantized.activation_rules import Quantize
from w4a8.quantized.dynamic_rules import DynamicPerToken
from w4a8.rounding.fused_inputs import dropped_inputs
from w4a8.rounding.sixteen_bits import in_sixteen_bits, product

OVERFLOW = "a value does not fit 16 bits, or is not finite; give --precision float32 --force"
PRODUCT_DTYPES = {"float32": None, "bfloat16": mx.bfloat16}  # by the name of a precision; None: as the inputs are


class QuantizedForward:
    """Dense quantized weights and quantized inputs in place of the layers' own; `compute` is called in their place."""

    def __init__(
        self, weights: Mapping[str, mx.array], biases: Mapping[str, mx.array],
        quantize: Quantize | DynamicPerToken | None = None, drop: float = 0.0, key: mx.array | None = None,
        watched: Sequence[str] = (), products: mx.Dtype | None = None,
    ):  # fmt: skip
        """Store the weights (out, in) and biases of the layers that are substituted; other layers compute as they are.

        quantize: the rule for the inputs, as a function, or the rule itself where one kernel applies it; None leaves them
        as they are. drop: the share of input elements that stay unquantized (QDrop, Wei et al. 2022), drawn from key.
        watched: the layers whose inputs are noted in `inputs`. products: the 16-bit dtype of products, None for the inputs'
        own.
        """
        self.weights, self.biases, self.products = weights, biases, products
        self.inputs: dict[str, mx.array] = {}  # (rows, channels) by watched layer
        self._quantize, self._drop, self._key = quantize, drop, key
        self._watched = watched
        self._last: tuple[mx.array, mx.array] | None = None  # the last input, and the same quantized

    @contextlib.contextmanager
    def installed(
        self, mmdit: nn.Module, blocks: Sequence[Block], names: Sequence[str] | None = None
    ) -> Iterator[None]:
        """Let the layers `names` (default: all) compute so until exit, and the blocks' attention with them."""
        with substituted_layers(mmdit, self.compute, names), in_sixteen_bits(self.products, blocks):
            yield
        self._last = None  # it would keep a batch's activations alive

    def compute(self, name: str, layer: nn.Module, x: mx.array) -> mx.array:
        """Compute a layer with its quantized weight and input; q, k and v share one quantized input."""
        if name in self._watched:
            self.inputs[name] = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        if name not in self.weights:
            return layer(x)
        if self._last is None or self._last[0] is not x:
            self._last = x, self._quantize_input(name, x)
        y = product(self._last[1], self._cast(self.weights[name]).T)
        return y + self._cast(self.biases[name]) if name in self.biases else y

    def _cast(self, array: mx.array) -> mx.array:
        return array if self.products is None else array.astype(self.products)

    def _quantize_input(self, name: str, x: mx.array) -> mx.array:
        if self._quantize is None:
            return self._cast(x)
        if isinstance(self._quantize, DynamicPerToken):
            assert self.products is not None  # a rule comes where products have a dtype of their own
            return dropped_inputs(self._quantize, x, self._drop, self._next_key(), self.products)
        x = x.astype(mx.float32)
        quantized = self._quantize(name, x)
        if not self._drop:
            return self._cast(quantized)
        return self._cast(mx.where(mx.random.bernoulli(self._drop, x.shape, self._next_key()), x, quantized))

    def _next_key(self) -> mx.array:
        if self._key is None:  # nothing is dropped
            return mx.random.key(0)
        self._key, key = mx.random.split(self._key)
        return key


def original_forward(
    blocks: Sequence[Block], products: mx.Dtype | None, watched: Sequence[str] = ()
) -> QuantizedForward:
    """Return a forward pass of unquantized blocks with these products."""
    layers = [] if products is None else [layer for block in blocks for layer in block.layers]
    biases = {layer.name: bias for layer in layers if (bias := layer.bias) is not None}
    return QuantizedForward({layer.name: layer.weight for layer in layers}, biases, watched=watched, products=products)
