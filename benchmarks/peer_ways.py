"""Other people's ways to quantize the weights of a model: what `peers.py` compares stage 3W with."""

import ctypes
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from w4a8.quantized.arithmetic import searched_grid
from w4a8.quantized.layer import QuantizedLayer
from w4a8.rounding.methods import Arrays
from w4a8.rounding.rest import nearest_dense
from w4a8.rounding.training_samples import spread_over
from w4a8.rounding.units import Unit

BITS = 4
GGML_TYPES = ("Q4_0", "Q4_K", "Q5_K", "Q6_K")
IN_PLACE = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # as llama.cpp does, where 256 does not divide a row
RANKS, SMOOTHING, ALTERNATIONS = (16, 32), (0.0, 0.25, 0.5, 0.75), 4  # of SVDQuant
POWERS = 20  # exponents that AWQ tries
GRAM_SAMPLES = 256
DAMPING = 0.01  # GPTQ: share of the mean diagonal, as in the published code
Dense = dict[str, tuple[mx.array, mx.array | None]]  # layer -> its weight and bias


@dataclass(frozen=True)
class Way:
    """A quantized model: dense weights and biases of its layers, bits a weight, and parameters beside the layers by path."""

    layers: Dense
    bits: float
    rest: Arrays = field(default_factory=dict)


def input_grams(unit: Unit) -> Arrays:
    """Return XXᵀ of every distinct input of the unquantized model, over some of the training samples."""
    grams: Arrays = {}
    names = list(dict.fromkeys(unit.input_of.values()))
    for seen in unit.watch(names, spread_over(unit.samples.training, GRAM_SAMPLES)):
        grams = {name: grams.get(name, 0) + x.T @ x for name, x in seen.items()}
        mx.eval(grams)
    return grams


def grouped(unit: Unit, layers: Dense, rest: Arrays | None = None) -> Way:
    """Return the way of codes with a float16 scale and minimum for each group of the unit's settings."""
    groups = sum(layer.scale.size for layer in unit.nearest.values())
    weights = sum(weight.size for weight in unit.weights.values())
    return Way(layers, unit.settings.weight_bits + 32 * groups / weights, rest or {})


def nearest(unit: Unit, grams: Arrays) -> Way:
    """Round to nearest on a min-max grid."""
    return grouped(unit, {name: (layer.as_mlx().weight, unit.biases.get(name)) for name, layer in unit.nearest.items()})


def mlx_quantize(unit: Unit, grams: Arrays) -> Way:
    """Quantize with MLX's own function."""
    group = unit.settings.group_size

    def dense(weight: mx.array) -> mx.array:
        codes, scales, biases = mx.quantize(weight.astype(mx.float16), group, BITS)
        return mx.dequantize(codes, scales, biases, group, BITS).astype(mx.float32)

    return grouped(unit, {name: (dense(weight), unit.biases.get(name)) for name, weight in unit.weights.items()})


def awq(unit: Unit, grams: Arrays) -> Way:
    """Scale by the activations (AWQ, Lin et al. 2024): round W·s to nearest, then divide by s.

    s is the root mean square of each channel to a power: the one that gives the layer the least output error.
    """

    def scaled(weight: mx.array, gram: mx.array, power: float) -> tuple[float, mx.array]:
        scaling = mx.power(mx.sqrt(mx.maximum(mx.diag(gram), 1e-12)), power)
        scaling = scaling / mx.sqrt(scaling.max() * scaling.min())
        layer = QuantizedLayer.nearest(np.array(weight * scaling), BITS, unit.settings.group_size).as_mlx()
        dense = layer.weight / scaling
        error = dense - weight
        return (error * (error @ gram)).sum().item(), dense

    found: Dense = {}
    for name, weight in unit.weights.items():
        tried = (scaled(weight, grams[unit.input_of[name]], power / POWERS) for power in range(POWERS))
        found[name] = min(tried, key=lambda one: one[0])[1], unit.biases.get(name)
    return grouped(unit, found)


def gptq(unit: Unit, grams: Arrays) -> Way:
    """Spread each column's error over the columns that follow (GPTQ, Frantar et al. 2022), on stage 3W's first grid."""
    found: Dense = {}
    for name, weight in unit.weights.items():
        dense, gram = np.array(weight), np.array(grams[unit.input_of[name]], np.float64)
        grid = searched_grid(dense, BITS, unit.settings.group_size)
        layer = QuantizedLayer(gptq_codes(dense, gram, *grid), *grid).as_mlx()
        found[name] = layer.weight, unit.biases.get(name)
    return grouped(unit, found)


def gptq_codes(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """Round columns in order of their activations' energy, and return the codes (out, in) uint8.

    weight (out, in), gram XXᵀ (in, in), grid (out, groups).
    """
    width = weight.shape[1]
    order = np.argsort(-np.diag(gram), kind="stable")
    damped = gram[np.ix_(order, order)] + np.eye(width) * DAMPING * np.trace(gram) / width
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    remaining = weight.astype(np.float64)[:, order]
    scales, zero_points = (
        np.repeat(array.astype(np.float64), width // scale.shape[1], axis=1)[:, order] for array in (scale, zero_point)
    )
    codes = np.empty((len(weight), width), np.uint8)
    for position, column in enumerate(order):
        s, z = scales[:, position], zero_points[:, position]
        code = np.clip(np.rint(remaining[:, position] / s + z), 0, 2**BITS - 1)
        error = (remaining[:, position] - (code - z) * s) / factor[position, position]
        remaining[:, position + 1 :] -= np.outer(error, factor[position, position + 1 :])
        codes[:, column] = code
    return codes


def svdquant(unit: Unit, grams: Arrays, rank: int) -> Way:
    """Keep a low-rank part of the smoothed weight in float16, and round what is left (SVDQuant, Li et al. 2024).

    Smoothing is the root mean square of each channel to the power that gives the layer the least output error; low-rank part
    and rounded part are found in turns.
    """
    found: Dense = {}
    extra = 0
    for name, weight in unit.weights.items():
        gram = grams[unit.input_of[name]]
        tried = []
        for power in SMOOTHING:
            smooth = mx.power(mx.sqrt(mx.maximum(mx.diag(gram), 1e-12)), power)
            smooth = smooth / mx.sqrt(smooth.max() * smooth.min())
            dense = low_rank_and_rounded(weight * smooth, rank, unit.settings.group_size) / smooth
            difference = dense - weight
            tried.append(((difference * (difference @ gram)).sum().item(), dense))
        found[name] = min(tried, key=lambda one: one[0])[1], unit.biases.get(name)
        extra += 16 * rank * sum(weight.shape)
    whole = grouped(unit, found)
    return replace(whole, bits=whole.bits + extra / sum(weight.size for weight in unit.weights.values()))


def low_rank_and_rounded(weight: mx.array, rank: int, group: int) -> mx.array:
    """Return L + nearest(W − L), L of this rank in float16; weight (out, in)."""
    rounded = mx.zeros_like(weight)
    for _ in range(ALTERNATIONS):
        u, s, v = np.linalg.svd(np.array(weight - rounded), full_matrices=False)
        halves = [mx.array(part).astype(mx.float16).astype(mx.float32) for part in (u[:, :rank] * s[:rank], v[:rank])]
        low = halves[0] @ halves[1]
        rounded = nearest_dense(weight - low, BITS, group)
    return low + rounded


class Ggml:
    """ggml's own quantizer, from libggml-base.so or any library that exports `ggml_quantize_chunk`."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        self._quantize = library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
        ]  # fmt: skip

    def way(self, unit: Unit, name: str) -> Way:
        """Return the model with layers of this type, or of the one that takes its place."""
        found: Dense = {}
        total = 0
        for layer, weight in unit.weights.items():
            kind = gguf.GGMLQuantizationType[name]
            if weight.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = gguf.GGMLQuantizationType[IN_PLACE[name]]
            packed = self.packed(np.array(weight, np.float32), kind)
            total += packed.size
            found[layer] = mx.array(self.dense(packed, kind)), unit.biases.get(layer)
        return Way(found, 8 * total / sum(weight.size for weight in unit.weights.values()))

    def packed(self, weight: np.ndarray, kind: Any) -> np.ndarray:
        """Return the bytes of each row of a weight (out, in), (out, bytes) uint8."""
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, width = weight.shape
        packed = np.empty((rows, width // block * size), np.uint8)
        weight = np.ascontiguousarray(weight)
        written = self._quantize(int(kind), weight.ctypes.data, packed.ctypes.data, 0, rows, width, None)
        assert written == packed.nbytes, (written, packed.nbytes)
        return packed

    @staticmethod
    def dense(packed: np.ndarray, kind: Any) -> np.ndarray:
        """Return the weight (out, in) float32 of these bytes, as gguf unpacks them."""
        return gguf.quants.dequantize(packed, kind)
