"""What stands in for the linear layers while a unit is trained: gradients flow through it."""

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
        """weights (out, in) and biases of the layers that are substituted; the others compute as they are.

        quantize: of the inputs (None: as they are). drop: share of input elements that stay unquantized (QDrop), drawn
        from key. watched: layers whose inputs are wanted.
        """
        self.weights, self.biases = weights, biases
        self.inputs: dict[str, mx.array] = {}  # (rows, channels) of the watched ones
        self._quantize, self._drop, self._key = quantize, drop, key
        self._watched = watched
        self._given = self._quantized = None

    def compute(self, name: str, layer: nn.Module, x: mx.array) -> mx.array:
        """The layer with its quantized weight and input; q, k and v share one quantized input."""
        if name in self._watched:
            self.inputs[name] = x.reshape(-1, x.shape[-1])
        if name in self.weights:
            if self._given is not x:
                self._given, self._quantized = x, self._quantize_input(name, x)
            y = self._quantized @ self.weights[name].T
            y = y + self.biases[name] if name in self.biases else y
        else:
            y = layer(x)
        return y

    def let_go(self) -> None:
        """Forget the last input: it would keep a batch's activations alive."""
        self._given = self._quantized = None

    def _quantize_input(self, name: str, x: mx.array) -> mx.array:
        if self._quantize is None:
            return x
        quantized = self._quantize(name, x)
        if not self._drop:
            return quantized
        self._key, key = mx.random.split(self._key)
        return mx.where(mx.random.bernoulli(self._drop, x.shape, key), x, quantized)
