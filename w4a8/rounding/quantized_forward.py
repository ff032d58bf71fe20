"""The forward pass of a block whose linear layers are quantized in training; gradients flow through it."""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from w4a8.quantized.activation_rules import Quantize


class QuantizedForward:
    """Dense quantized weights and quantized inputs in place of the layers' own; `compute` is called in their place."""

    def __init__(
        self, weights: Mapping[str, mx.array], biases: Mapping[str, mx.array], quantize: Quantize | None = None,
        drop: float = 0.0, key: mx.array | None = None, watched: Sequence[str] = (),
    ):  # fmt: skip
        """Store the weights (out, in) and biases of the layers that are substituted; other layers compute as they are.

        quantize: the rule for the inputs; None leaves them as they are. drop: the share of input elements that stay
        unquantized (QDrop, Wei et al. 2022), drawn from key. watched: the layers whose inputs are noted in `inputs`.
        """
        self.weights, self.biases = weights, biases
        self.inputs: dict[str, mx.array] = {}  # (rows, channels) by watched layer
        self._quantize, self._drop, self._key = quantize, drop, key
        self._watched = watched
        self._last: tuple[mx.array, mx.array] | None = None  # the last input, and the same quantized

    def compute(self, name: str, layer: nn.Module, x: mx.array) -> mx.array:
        """Compute a layer with its quantized weight and input; q, k and v share one quantized input."""
        if name in self._watched:
            self.inputs[name] = x.reshape(-1, x.shape[-1])
        if name not in self.weights:
            return layer(x)
        if self._last is None or self._last[0] is not x:
            self._last = x, self._quantize_input(name, x)
        y = self._last[1] @ self.weights[name].T
        return y + self.biases[name] if name in self.biases else y

    def let_go(self) -> None:
        """Forget the last input, which would keep a batch's activations alive."""
        self._last = None

    def _quantize_input(self, name: str, x: mx.array) -> mx.array:
        if self._quantize is None:
            return x
        quantized = self._quantize(name, x)
        if not self._drop:
            return quantized
        assert self._key is not None  # whoever drops elements gives a key
        self._key, key = mx.random.split(self._key)
        return mx.where(mx.random.bernoulli(self._drop, x.shape, key), x, quantized)
