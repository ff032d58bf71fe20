"""Rules of activations that need no file: each range is that of the values that are quantized."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from calibration_store.errors import OptionError
from calibration_store.names import is_post_gelu
from w4a8.model.layers import Layer
from w4a8.quantized.activation_rules import ActivationRule, Quantize
from w4a8.quantized.differentiable import fake_quantize

# The values of `rule` in activations.json.
DYNAMIC_PER_TOKEN, DYNAMIC_PER_BLOCK = "dynamic per token, asymmetric", "dynamic per block of 32, symmetric"
BLOCK_WIDTH = 32  # inputs of a token that share a step, in ggml's block_q8_1
SMALLEST_STEP = 1e-10  # the step of a token that holds only zeros


class Dynamic(ActivationRule):
    """A rule that needs no file, because each range is that of the values that are quantized."""

    def __init__(self, bits: int):
        self.bits, self.sources, self.made_from = bits, [], []

    @classmethod
    def named(cls, variant: str, bits: int | None, calib_dir: Path, rounded: bool, scale_is: str | None) -> "Dynamic":
        """Make the rule of these bits."""
        assert bits is not None  # the grammar of every dynamic rule has a group `bits`
        return cls(bits)

    def of_rows(self, steps: mx.array) -> Quantize:
        """Return the function with gradients that pass through it unchanged."""
        quantize = self.at(0.0, 1)
        return lambda name, x: x + mx.stop_gradient(quantize(name, x) - x)


class DynamicPerTensor(Dynamic):
    """A range for the tensor of each image, all of its rows together.

    Post-GELU inputs are shifted by (min + max) / 2 of each channel first.
    """

    grammar, spelled = r"a(?P<bits>[2-8])-dynamic", "a8-dynamic"

    def at(self, sigma: float, rows_per_image: int) -> Quantize:
        """Return the function that quantizes by the range of each image's tensor, at every noise level alike."""

        def quantize(name: str, x: mx.array) -> mx.array:
            grouped = x.reshape(rows_per_image, -1, *x.shape[1:])
            rows, shift, centred = (0, 2, 3), None, grouped
            if is_post_gelu(name):
                shift = (grouped.min(axis=rows, keepdims=True) + grouped.max(axis=rows, keepdims=True)) / 2
                centred = grouped - shift
            reach = mx.abs(centred).max(axis=(*rows, 4), keepdims=True)
            return fake_quantize(grouped, mx.maximum(reach, 1e-8), self.bits, shift).reshape(x.shape)

        return quantize


class DynamicPerToken(Dynamic):
    """An asymmetric grid for each token: 2^bits levels from its minimum to its maximum, 0 among them."""

    grammar, spelled = r"a(?P<bits>[2-8])-token", "a8-token"

    def at(self, sigma: float, rows_per_image: int) -> Quantize:
        """Return the function that quantizes by the grid of each token, at every noise level alike."""
        top = 2**self.bits - 1

        def quantize(name: str, x: mx.array) -> mx.array:
            low = mx.minimum(x.min(axis=-1, keepdims=True), 0.0)
            high = mx.maximum(x.max(axis=-1, keepdims=True), 0.0)
            step = mx.maximum((high - low) / top, SMALLEST_STEP)
            zero_point = mx.round(-low / step)
            return (mx.clip(mx.round(x / step) + zero_point, 0, top) - zero_point) * step

        return quantize

    def exported(self) -> dict[str, Any]:
        """Return the content of activations.json: the name of the rule, and its bits."""
        return {"rule": DYNAMIC_PER_TOKEN, "bits": self.bits}


class DynamicPerBlock(Dynamic):
    """The inputs of a token in blocks of 32, as ggml's Q8_1 has them: what programs on ggml multiply Q4_1 weights with.

    The codes are round(x / d), half away from 0, with d = max|x| / 127 of a block in float32; x̂ is codes · d with d in
    float16 (quantize_row_q8_1_ref in ggml-quants.c).
    """

    grammar, spelled = r"a(?P<bits>8)-block", "a8-block"

    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        """Raise OptionError for a layer whose inputs are no whole number of blocks."""
        odd = next((name for name, layer in layers.items() if layer.shape[1] % BLOCK_WIDTH), None)
        if odd is not None:
            raise OptionError(f"{variant}: {odd} has {layers[odd].shape[1]} inputs, no multiple of {BLOCK_WIDTH}")

    def at(self, sigma: float, rows_per_image: int) -> Quantize:
        """Return the function that quantizes by the step of each block, at every noise level alike."""
        return lambda name, x: block_codes(x)[0]

    def exported(self) -> dict[str, Any]:
        """Return the content of activations.json: the name of the rule, and its bits."""
        return {"rule": DYNAMIC_PER_BLOCK, "bits": self.bits}


def block_codes(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return x̂ (…, channels), codes (…, blocks, 32) and steps (…, blocks, 1) of x (…, channels), all float32."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK_WIDTH)
    exact = mx.abs(blocks).max(axis=-1, keepdims=True) / 127
    scaled = blocks * mx.where(exact > 0, 1 / mx.where(exact > 0, exact, 1.0), 0.0)
    codes = mx.sign(scaled) * mx.floor(mx.abs(scaled) + 0.5)
    step = exact.astype(mx.float16).astype(mx.float32)
    return (codes * step).reshape(x.shape), codes, step
