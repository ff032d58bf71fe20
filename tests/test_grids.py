"""The arithmetic of grids, codes and fake quantization, against float64 and finite differences."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import on_grid

from w4a8.quantized.arithmetic import min_max_grid, nearest_codes, pack_codes, searched_grid
from w4a8.quantized.differentiable import (
    fake_quantize,
    rectified_sigmoid,
    rectified_sigmoid_gradient,
    rectified_sigmoid_inverse,
    rounding_regularizer_gradient,
)
from w4a8.quantized.layer import QuantizedLayer, deployed, deployed_grid


@pytest.mark.parametrize("group_size", [0, 32, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grids_and_codes_against_float64(bits, group_size):
    weight = np.random.default_rng(0).normal(0, 0.1, (6, 128)).astype(np.float32)
    scale, zero_point = min_max_grid(weight, bits, group_size)
    assert scale.shape == zero_point.shape == (6, 128 // (group_size or 128)) and scale.dtype == np.float32
    codes = nearest_codes(weight, scale, zero_point, bits)
    rebuilt = on_grid(codes, scale, zero_point)
    for row in range(6):
        for group in range(scale.shape[1]):
            part = slice(group * (group_size or 128), (group + 1) * (group_size or 128))
            low, high = min(weight[row, part].min(), 0), max(weight[row, part].max(), 0)
            step = (float(high) - float(low)) / (2**bits - 1)
            assert scale[row, group] == pytest.approx(step, rel=1e-6)
            assert abs(rebuilt[row, part] - weight[row, part]).max() <= step * (0.5 + 0.51)  # the zero point rounds too
    searched = searched_grid(weight, bits, group_size)
    best = on_grid(nearest_codes(weight, *searched, bits), *searched)
    assert np.square(best - weight).sum() <= np.square(rebuilt - weight).sum() * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["numpy", "mlx"])
def test_a_deployed_grid_is_kept_bit_for_bit(kind):
    """float16 scale and minimum survive the way through scale and zero point in float32, tiny and huge ones, too."""
    generator = np.random.default_rng(2)
    scale = (10.0 ** generator.uniform(-9, 3, (200, 40))).astype(np.float32)
    zero_point = generator.uniform(-4, 15, scale.shape).astype(np.float32)
    given = (mx.array(scale), mx.array(zero_point)) if kind == "mlx" else (scale, zero_point)
    first = deployed(*given)
    again = deployed(*deployed_grid(*deployed_grid(*given)))
    for one, other in zip(first, again, strict=True):
        one, other = np.array(one), np.array(other)
        assert np.array_equal(one, other) and np.array_equal(one, one.astype(np.float16)) and one.dtype == np.float32
    step = np.maximum(scale, 2.0**-24).astype(np.float16).astype(np.float64)
    assert np.array_equal(np.array(first[0]), step) and (np.array(first[0]) > 0).all()
    offset = -step * zero_point.astype(np.float64)
    assert (abs(np.array(first[1]) - offset) <= np.maximum(abs(offset) * 2.0**-11, 2.0**-25) * 1.0001).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
def test_what_is_trained_is_what_is_packed(bits, group_size):
    """A layer's float32 weight equals its packed form's, bit for bit; per channel, groups repeat the channel's grid."""
    weight = np.random.default_rng(3).normal(0, 0.1, (24, 384)).astype(np.float32)
    layer = QuantizedLayer.nearest(weight, bits, group_size)
    packed = layer.packed(bits)
    assert packed.group_size == (group_size or 128) and packed.scales.dtype == mx.float16
    for found in (layer, layer.as_mlx(), QuantizedLayer.of_fields(layer.fields())):
        assert np.array_equal(np.array(found.weight), np.array(packed.dense(mx.float32)))
    reference = on_grid(layer.codes, *deployed_grid(layer.scale, layer.zero_point))
    np.testing.assert_allclose(layer.weight, reference, rtol=0, atol=1e-6)
    half = np.array(packed.dense(mx.float16), np.float64)
    assert abs(half - reference).max() <= 2.0**-10 * abs(reference).max()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_codes_are_mlx_codes(bits, group_size):
    generator = np.random.default_rng(1)
    weight = generator.normal(0, 0.1, (16, 256)).astype(np.float32)
    scale, zero_point = searched_grid(weight, bits, group_size)
    zero_point = zero_point + generator.uniform(-0.3, 0.3, zero_point.shape).astype(np.float32)  # as tuned
    codes = nearest_codes(weight, scale, zero_point, bits)
    own = on_grid(codes, scale, zero_point)
    packed = (mx.array(pack_codes(codes, bits)), mx.array(scale), mx.array(-scale * zero_point))
    theirs = np.array(mx.dequantize(*packed, group_size=group_size, bits=bits))
    np.testing.assert_allclose(theirs, own, rtol=0, atol=1e-6 * abs(own).max())
    x = mx.array(generator.normal(size=(3, 256)).astype(np.float32))
    product = mx.quantized_matmul(x, *packed, transpose=True, group_size=group_size, bits=bits)
    np.testing.assert_allclose(np.array(product), np.array(x) @ own.T, atol=1e-4)


def test_rectified_sigmoid_and_its_gradients_against_finite_differences():
    alpha = np.linspace(-6, 6, 41)
    exact = lambda a: np.clip(1.2 / (1 + np.exp(-a)) - 0.1, 0, 1)  # noqa: E731
    h = rectified_sigmoid(mx.array(alpha.astype(np.float32)))
    np.testing.assert_allclose(np.array(h), exact(alpha), atol=1e-6)
    slope = (exact(alpha + 1e-6) - exact(alpha - 1e-6)) / 2e-6
    found = np.array(rectified_sigmoid_gradient(mx.array(alpha.astype(np.float32))))
    np.testing.assert_allclose(found, slope, atol=1e-5)
    inside = np.linspace(0.02, 0.98, 30)
    np.testing.assert_allclose(exact(np.array(rectified_sigmoid_inverse(mx.array(inside)))), inside, atol=1e-6)
    for beta in (2, 8, 20):
        penalty = lambda x, beta=beta: 1 - abs(2 * x - 1) ** beta  # noqa: E731
        slope = (penalty(inside + 1e-6) - penalty(inside - 1e-6)) / 2e-6
        found = np.array(rounding_regularizer_gradient(mx.array(inside.astype(np.float32)), beta))
        np.testing.assert_allclose(found, slope, atol=1e-4)


@pytest.mark.parametrize("shifted", [False, True])
def test_fake_quantize_and_lsq_gradients(shifted):
    generator = np.random.default_rng(2)
    x, out = generator.normal(0, 1, (50, 8)), generator.normal(size=(50, 8))
    shift, reach, n = generator.normal(size=8) if shifted else np.zeros(8), 1.3, 127
    z = (x - shift) * n / reach
    rebuilt = np.clip(np.rint(z), -n, n) * reach / n + shift
    to_mlx = lambda a: mx.array(np.asarray(a, np.float32))  # noqa: E731
    given_shift = to_mlx(shift) if shifted else None
    found = fake_quantize(to_mlx(x), to_mlx(reach), 8, given_shift)
    near_half = abs(z - np.rint(z)) > 0.499
    np.testing.assert_allclose(np.array(found)[~near_half], rebuilt[~near_half], atol=1e-5)

    def weighted(x, reach):
        return (fake_quantize(x, reach, 8, given_shift) * to_mlx(out)).sum()

    slopes = mx.grad(weighted, argnums=(0, 1))(to_mlx(x), to_mlx(reach))
    inside = abs(z) < n
    np.testing.assert_allclose(np.array(slopes[0])[~near_half], (out * inside)[~near_half], atol=1e-5)
    of_range = np.where(inside, (np.rint(z) - z) / n, np.sign(z))  # LSQ, equation 3, per unit of range
    assert slopes[1].item() == pytest.approx((of_range * out).sum(), abs=0.02)
