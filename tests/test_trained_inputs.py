"""Activations as stage 3W trains them: dynamic per token, static ranges that follow the noise level; and what judges."""

import json

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import generate, invoke

from calibration_store.layout import WeightPaths
from calibration_store.weights import read_quantized_block
from w4a8.quantized.activation_rules import Learned
from w4a8.quantized.differentiable import fake_quantize
from w4a8.quantized.dynamic_rules import DYNAMIC_PER_BLOCK, DynamicPerBlock, DynamicPerToken, block_codes
from w4a8.rounding.settings import Settings
from w4a8.rounding.training_samples import spread_over

pytestmark = pytest.mark.slow


def test_ranges_follow_the_noise_level():
    rule = Learned({"a": np.float32([4, 1]), "b": np.float32(2)}, {}, 8, [1.0, 0.25])
    assert rule.range_at("a", 1.0) == 4 and rule.range_at("a", 0.0) == 1 and rule.range_at("b", 0.3) == 2
    assert rule.range_at("a", 0.625) == pytest.approx(2)  # log-linear
    x = mx.random.normal((4, 3, 1, 8), key=mx.random.key(0)) * 3
    rows = Learned({"a": mx.array([4.0, 1.0])}, {}, 8).of_rows(mx.array([0, 0, 1, 1]))("a", x)
    for row, sigma in ((0, 1.0), (1, 1.0), (2, 0.25), (3, 0.25)):
        np.testing.assert_allclose(np.array(rows[row]), np.array(rule.at(sigma)("a", x)[row]), atol=1e-6)
    exported = rule.exported()
    assert exported["rule"] == "static by step" and exported["sigma_map"] == {"0": 1.0, "1": 0.25}
    assert exported["per_timestep"]["1"]["a"]["clipping_range"] == 1
    assert Learned({"b": np.float32(2)}, {}, 8, [1.0]).exported()["rule"] == "static"


def test_each_step_gives_gradients_to_its_own_range():
    x, ranges = mx.random.normal((4, 3, 1, 8), key=mx.random.key(0)) * 3, mx.array([2.0, 1.5, 9.0])

    def total(ranges):
        return mx.square(Learned({"a": ranges}, {}, 8).of_rows(mx.array([0, 0, 1, 1]))("a", x) - x).sum()

    gradient = np.array(mx.grad(total)(ranges))
    for step, rows in ((0, slice(0, 2)), (1, slice(2, 4))):
        alone = mx.grad(lambda r, rows=rows: mx.square(fake_quantize(x[rows], r, 8) - x[rows]).sum())(ranges[step])
        assert gradient[step] == pytest.approx(alone.item(), rel=1e-4)
    assert gradient[2] == 0


def test_tokens_are_quantized_as_deployed_and_gradients_pass():
    x = np.random.default_rng(0).normal(0, 2, (2, 5, 1, 16)).astype(np.float32)
    x[0, 0] = 0
    x[0, 1] = np.abs(x[0, 1])
    low, high = np.minimum(x.min(-1, keepdims=True), 0.0).astype(np.float64), np.maximum(x.max(-1, keepdims=True), 0.0)
    step = np.maximum((high - low) / 255, 1e-10)
    zero = np.rint(-low / step)
    expected = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    rule = DynamicPerToken(8)
    trained = rule.of_rows(mx.zeros(2, mx.int32))
    np.testing.assert_allclose(np.array(trained("a", mx.array(x))), expected, atol=0.51 * step.max() * 1e-2)
    weights = mx.random.normal(x.shape, key=mx.random.key(1))
    slope = mx.grad(lambda values: (trained("a", values) * weights).sum())(mx.array(x))
    assert np.array_equal(np.array(slope), np.array(weights))


def test_blocks_are_quantized_as_ggml_does_and_gradients_pass():
    """The codes are those of gguf's own quantizer (Q8_0 has the codes and the step of Q8_1); x̂ against float64."""
    x = np.random.default_rng(5).normal(0, 2, (3, 40, 1, 192)).astype(np.float32)
    x[0, 0, 0, :32], x[1, 2, 0, 64:96] = 0, x[1, 2, 0, 64:96] * 1000
    rebuilt, codes, step = (np.array(array) for array in block_codes(mx.array(x)))
    packed = gguf.quants.quantize(x.reshape(-1, 192), gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)
    assert np.array_equal(codes.reshape(-1, 32), packed[:, 2:].view(np.int8))
    assert np.array_equal(step.reshape(-1), packed[:, :2].copy().view(np.float16)[:, 0].astype(np.float32))
    exact = np.abs(x.reshape(-1, 32).astype(np.float64)).max(1, keepdims=True) / 127
    expected = np.rint(x.reshape(-1, 32) / np.where(exact > 0, exact, 1)) * exact
    near_half = np.abs(x.reshape(-1, 32) / np.where(exact > 0, exact, 1) % 1 - 0.5) < 1e-4
    np.testing.assert_allclose(rebuilt.reshape(-1, 32)[~near_half], expected[~near_half], rtol=6e-4, atol=1e-12)
    rule = DynamicPerBlock(8)
    trained = rule.of_rows(mx.zeros(3, mx.int32))
    assert np.array_equal(np.array(trained("a", mx.array(x))), rebuilt) and rule.exported()["rule"] == DYNAMIC_PER_BLOCK
    weights = mx.random.normal(x.shape, key=mx.random.key(1))
    slope = mx.grad(lambda values: (trained("a", values) * weights).sum())(mx.array(x))
    assert np.array_equal(np.array(slope), np.array(weights))


QUICK = ("--iters", 10, "--batch-size", 2, "--unit", "block", "--end-to-end", 0, "--bits", "mm[0134567].*=16")


def test_inputs_are_quantized_late_and_as_asked(tmp_path):
    copy = tmp_path / "run"
    assert generate("--num-images", 3, "--num-steps", 4, "--no-images", "--calib-dir", copy).exit_code == 0
    assert invoke("cache_adaround_data", "--calib-dir", copy, "--num-images", 3, "--stride", 2).exit_code == 0
    for arguments, scales in (
        ((), False),
        (("--activation-rule", "static"), True),
        (("--activation-rule", "block"), False),
        (("--activation-bits", 0), False),
    ):
        done = invoke("optimize_adaround", "--calib-dir", copy, *QUICK, "--force", *arguments)
        assert done.exit_code == 0, done.output
        metadata = json.loads((copy / "adaround_weights/metadata.json").read_bytes())
        losses = metadata["losses"]["mm2"]["stages"][0]
        assert (losses["end_activations"] is None) == (arguments == ("--activation-bits", 0))
        for fields in read_quantized_block(WeightPaths(copy), "mm2").values():
            assert ("act_scales" in fields) == scales
            if scales:
                assert fields["act_scales"].shape == (2,) and fields["act_scale"] == fields["act_scales"].max()
        if scales:
            assert metadata["range_sigmas"] == [metadata["schedule"][step] for step in metadata["key_timesteps"]]
            done = invoke(
                "evaluate_quantization", "--calib-dir", copy, "--num-images", 1, "--num-steps", 2,
                "--variants", "w4-adaround+a8-learned",
            )  # fmt: skip
            assert done.exit_code == 0, done.output
    for bits, begin in ((8, 5), (0, 10)):
        assert (
            Settings(
                iters=10, batch_size=2, activation_bits=bits, lr_activation_scale=5e-3, seed=0, activation_rule="static"
            ).inputs_from
            == begin
        )


def test_what_is_judged_on_passes_over_no_step():
    indices = list(range(64 * 7 * 4))  # image by image, 7 steps each
    chosen = spread_over(indices, 64)
    assert chosen == spread_over(indices, 64) == sorted(set(chosen)) and {index % 7 for index in chosen} == set(
        range(7)
    )
    assert spread_over(indices[:5], 64) == indices[:5]
