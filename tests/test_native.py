"""w4a8/model/packed.py: every way of multiplying packed weights, against float64 and against a dense layer."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks.pass_timing import random_transformer
from calibration_store.choices import NATIVE_WAYS, WEIGHT_BITS
from w4a8.model.layers import model_blocks, model_layers
from w4a8.model.packed import (
    DENSE,
    DEQUANTIZE,
    QUANTIZED,
    NativeEmbedding,
    NativeLinear,
    adopt,
    dense_bytes,
    get_ready,
    native_module,
    resolve,
    unpack_together,
)
from w4a8.quantized.arithmetic import pack_codes
from w4a8.quantized.layer import Packed, QuantizedLayer

OUT, IN = 48, 192
SHAPES = ((4, 6, 1, IN), (13, IN), (1, IN))


def random_layer(bits, group_size=32, rows=OUT):
    weight = np.random.default_rng(bits).normal(size=(rows, IN)).astype(np.float32)
    return QuantizedLayer.nearest(weight, bits, group_size)


def random_input(shape):
    return mx.array(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32))


def random_bias():
    return mx.array(np.random.default_rng(0).normal(size=OUT).astype(np.float32))


def with_float32_grid(packed):
    """As a float32 model loads it."""
    grid = (packed.scales.astype(mx.float32), packed.biases.astype(mx.float32))
    return Packed(packed.codes, *grid, packed.bits, packed.group_size)


def native(layer, bits, bias, way):
    module = NativeLinear(with_float32_grid(layer.packed(bits)), bias)
    module.way = way
    return module


# --- linear layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_every_way_against_float64(bits, has_bias):
    layer, bias = random_layer(bits), random_bias() if has_bias else None
    for way, shape in itertools.product(NATIVE_WAYS, SHAPES):
        x = random_input(shape)
        y = native(layer, bits, bias, way)(x)
        assert y.shape == (*shape[:-1], OUT) and y.dtype == mx.float32
        expected = np.array(x, np.float64) @ layer.weight.astype(np.float64).T + (np.array(bias) if has_bias else 0)
        np.testing.assert_allclose(np.array(y), expected, atol=2e-4, err_msg=f"{way} {shape}")


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("way", [DEQUANTIZE, DENSE])
def test_unpacked_products_are_a_dense_layers_bit_for_bit(bits, way):
    layer = random_layer(bits)
    weight = mx.array(layer.weight)
    for bias, shape in itertools.product((random_bias(), None), SHAPES):
        x, module = random_input(shape), native(layer, bits, bias, way)
        expected = x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
        for _ in range(2):  # `dense` keeps its weight at the first pass
            assert mx.array_equal(module(x), expected)


def test_only_the_dense_way_keeps_a_dense_weight():
    """It is no parameter: neither saved nor counted."""
    for way in NATIVE_WAYS:
        module = native(random_layer(4), 4, random_bias(), way)
        before = set(module.parameters())
        module(random_input((300, IN)))
        assert ("_dense" in module) == (way == DENSE) and set(module.parameters()) == before
        assert before == {"weight", "scales", "biases", "bias"} and not module.trainable_parameters()


def test_half_precision_unpacks_in_half_precision():
    layer, x = random_layer(4), random_input((5, IN)).astype(mx.float16)
    packed = layer.packed(4)
    assert packed.scales.dtype == mx.float16
    module = NativeLinear(packed, random_bias().astype(mx.float16))
    expected = mx.dequantize(packed.codes, packed.scales, packed.biases, 32, 4)
    assert mx.array_equal(module.dense_weight(), expected) and expected.dtype == mx.float16
    assert module(x).dtype == mx.float16 and mx.array_equal(module(x), mx.addmm(module.bias, x, expected.T))


@pytest.mark.parametrize(("group_size", "packed_size"), [(0, 64), (32, 32), (64, 64)])
def test_packed_weights_are_the_layers(group_size, packed_size):
    """A scale per output channel becomes groups that repeat it."""
    layer = random_layer(4, group_size)
    packed = layer.packed(4)
    assert packed.group_size == packed_size and packed.scales.shape == (OUT, IN // packed_size)
    assert np.array_equal(np.array(packed.dense(mx.float32)), layer.weight)
    codes = mx.dequantize(packed.codes, mx.ones_like(packed.scales), mx.zeros_like(packed.biases), packed_size, 4)
    assert np.array_equal(np.array(codes), layer.codes)


# --- tables and whole models --------------------------------------------------------------------------------


def test_tables_unpack_to_a_dense_weight():
    layer = random_layer(8)
    table = native_module(nn.Embedding(OUT, IN), with_float32_grid(layer.packed(8)))
    assert isinstance(table, NativeEmbedding) and set(table.parameters()) == {"weight", "scales", "biases"}
    assert np.array_equal(np.array(table.weight), layer.weight)
    assert np.array_equal(np.array(table(mx.array([5, 0, 47]))), layer.weight[[5, 0, 47]])


def quantized_model():
    mx.random.seed(0)
    model = nn.Sequential(nn.Embedding(20, IN), nn.Linear(IN, IN), nn.LayerNorm(IN), nn.Linear(IN, 8, bias=False))
    nn.quantize(model, 64, 4)
    return model


def test_adopt_replaces_mlx_packed_layers():
    model, tokens = quantized_model(), mx.array([[1, 2, 19]])
    before, parameters = model(tokens), dict(model.parameters())
    norm = model.layers[2]
    adopt(model, DEQUANTIZE)
    assert [type(layer) for layer in model.layers] == [NativeEmbedding, NativeLinear, nn.LayerNorm, NativeLinear]
    assert model.layers[2] is norm and "bias" in model.layers[1] and "bias" not in model.layers[3]
    assert {layer.way for layer in (model.layers[1], model.layers[3])} == {DEQUANTIZE}
    np.testing.assert_allclose(np.array(model(tokens)), np.array(before), atol=1e-5)
    assert set(model.parameters()) == set(parameters)
    native_layers = list(model.layers)
    adopt(model, QUANTIZED)  # once more: the layers stay, the way changes
    assert all(a is b for a, b in zip(model.layers, native_layers, strict=True)) and model.layers[1].way == QUANTIZED


def test_adopted_models_compute_as_asked():
    for way, expected in (("quantized", QUANTIZED), ("dequantize", DEQUANTIZE), ("auto", DENSE)):
        model = quantized_model()
        adopt(model, way)
        assert {layer.way for layer in model.modules() if isinstance(layer, NativeLinear)} == {expected}
    adopt(nn.Sequential(nn.Linear(4, 4)))  # nothing packed: nothing to do


def test_auto_on_a_cpu_depends_on_memory():
    assert resolve("auto", 2**20) == DENSE and resolve("auto", 2**60) == DEQUANTIZE
    assert [resolve(way, 2**60) for way in (QUANTIZED, DEQUANTIZE, DENSE)] == [QUANTIZED, DEQUANTIZE, DENSE]
    assert dense_bytes(native(random_layer(4), 4, None, DENSE)) == 4 * OUT * IN


def test_a_cpu_has_nothing_to_compile(capsys):
    get_ready(nn.Sequential(native(random_layer(4), 4, None, DENSE)))
    assert not capsys.readouterr().err


# --- packing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_codes_are_packed_from_the_lowest_bits_on(bits):
    """Against integers: a row is one number, code i at bit i·bits; and against mx.quantize's own layout."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 96), dtype=np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == np.uint32 and packed.shape == (3, 96 * bits // 32)
    for row, words in zip(codes, packed, strict=True):
        number = sum(int(code) << (index * bits) for index, code in enumerate(row))
        assert [number >> 32 * i & 0xFFFFFFFF for i in range(len(words))] == words.tolist()
    ones, zeros = mx.ones((3, 3)), mx.zeros((3, 3))
    assert np.array_equal(np.array(mx.dequantize(mx.array(packed), ones, zeros, 32, bits)), codes)


def test_layers_that_are_unpacked_together_compute_the_same():
    mmdit = random_transformer(mx.float32, depth_multimodal=2, hidden_size_override=128, num_heads=2)
    chosen = {id(layer.module) for layer in model_layers(mmdit).values()}
    nn.quantize(mmdit, 64, 4, class_predicate=lambda path, module: id(module) in chosen)
    adopt(mmdit, DEQUANTIZE)
    block, keys = model_blocks(mmdit)["mm0"], mx.random.split(mx.random.key(0), 3)
    tokens = [mx.random.normal((2, count, 1, 128), key=key) for count, key in zip((9, 5), keys, strict=False)]
    given = tokens, mx.random.normal((2, 1, 1, 128), key=keys[2])
    before = [np.array(each) for each in block.run(*given)]
    parameters = {name: np.array(array) for name, array in tree_flatten(mmdit.parameters())}
    unpack_together(mmdit)
    layers = model_layers(mmdit)
    group = layers["mm0.img.attn.q_proj"].module.together
    alike = [name for name, layer in layers.items() if layer.module.together is group]
    assert alike == [
        f"mm0.img.{role}" for role in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc1")
    ]
    assert layers["mm0.img.mlp.fc2"].module.together is None
    for _ in range(2):
        for one, other in zip(before, block.run(*given), strict=True):
            assert np.array_equal(one, np.array(other))
        assert not group._waiting  # nothing unpacked is held after a pass
    for name, array in tree_flatten(mmdit.parameters()):
        assert np.array_equal(np.array(array), parameters[name])
