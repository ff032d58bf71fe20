"""Stage 3W with 16-bit products: attention and GELU against float64, gradients against float32's, files and options."""

import json
import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import invoke
from finished_run import finished_run

from benchmarks.pass_timing import random_transformer
from w4a8.model.layers import model_blocks, model_layers
from w4a8.quantized.arithmetic import min_max_grid, searched_grid
from w4a8.quantized.dynamic_rules import DynamicPerToken
from w4a8.rounding import held_boundaries, micro_batches, sixteen_bits
from w4a8.rounding.fused_inputs import dropped_inputs
from w4a8.rounding.iteration_bytes import IterationBytes
from w4a8.rounding.quantized_forward import original_forward
from w4a8.rounding.settings import Settings
from w4a8.rounding.training_samples import SampleBatch
from w4a8.rounding.unit_grids import grids_on_device
from w4a8.rounding.unit_training import UnitTraining
from w4a8.rounding.units import BlockUnit


def draws(*shape, count=1, scale=1.0):
    return [scale * np.random.default_rng(seed).standard_normal(shape) for seed in range(count)]


def attention_in_float64(q, k, v, slope, scale):
    """Return softmax(scale·q·kᵀ)·v, and d Σ output·slope / d (q, k, v), as the textbook has them."""
    scores = scale * q @ k.swapaxes(-1, -2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = slope @ v.swapaxes(-1, -2)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) * scale
    return weights @ v, (of_scores @ k, of_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ slope)


@pytest.mark.parametrize("way", ["tiles", "recomputed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-5), (mx.bfloat16, 0.02)])
@pytest.mark.parametrize("tokens", [256, 300])
def test_attention_and_its_gradients_against_float64(way, dtype, tolerance, tokens):
    attend = sixteen_bits._recomputed(0.125) if way == "recomputed" else lambda *x: sixteen_bits._tiled(*x, 0.125)
    *inputs, slope = (
        np.array(mx.array(x, mx.float32).astype(dtype).astype(mx.float32)) for x in draws(1, 2, tokens, 64, count=4)
    )
    expected, slopes = attention_in_float64(*(x.astype(np.float64) for x in (*inputs, slope)), 0.125)
    given = [mx.array(x).astype(dtype) for x in inputs]
    output, found = mx.vjp(attend, given, [mx.array(slope).astype(dtype)])
    for one, other in zip((*output, *found), (expected, *slopes), strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert abs(np.array(one.astype(mx.float32)) - other).max() < tolerance * abs(other).max()


def test_attention_keeps_few_scores():
    """Autograd holds several arrays of all scores."""
    tokens, rows = 1536, 1
    given, peaks = [mx.array(x, mx.float32) for x in draws(1, rows, tokens, 16, count=3)], []
    for attend in (sixteen_bits._recomputed(0.25), lambda *x: mx.fast.scaled_dot_product_attention(*x, scale=0.25)):
        mx.eval(given)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda *x, attend=attend: attend(*x).sum(), argnums=(0, 1, 2))(*given))
        peaks.append((mx.get_peak_memory() - before) / (4 * rows * tokens**2))
    assert peaks[0] < 0.5 * peaks[1]


def test_gelu_computes_in_float32():
    x = np.linspace(-6, 6, 4001)
    given = mx.array(x, mx.float32).astype(mx.bfloat16)
    exact = np.array(given.astype(mx.float32), np.float64)
    (output,), (slope,) = mx.vjp(sixteen_bits._gelu("none"), [given], [mx.ones_like(given)])
    density = np.exp(-(exact**2) / 2) / np.sqrt(2 * np.pi)
    share = np.array([0.5 * (1 + float(mx.erf(mx.array(value / np.sqrt(2))))) for value in exact])
    for found, expected in ((output, exact * share), (slope, share + exact * density)):
        error = abs(np.array(found.astype(mx.float32)) - expected)
        assert (error <= 2.0**-8 * abs(expected) + 1e-6).all()  # the rounding of the result alone


@pytest.mark.parametrize("drop", [0.0, 0.25])
def test_dropped_inputs_are_quantized_or_as_they_were(drop):
    rule, x = DynamicPerToken(8), mx.array(draws(3, 40, 1, 256)[0], mx.float32)
    given, (slope,) = mx.vjp(
        lambda x: dropped_inputs(rule, x, drop, mx.random.key(1), mx.bfloat16),
        [x],
        [mx.ones_like(x).astype(mx.bfloat16)],
    )
    quantized = given[0] == rule.at(0.0, 1)("", x).astype(mx.bfloat16)
    stays = given[0] == x.astype(mx.bfloat16)
    assert (quantized | stays).all() and given[0].dtype == mx.bfloat16
    assert 1 - (quantized & ~stays).mean().item() / (~(quantized & stays)).mean().item() == pytest.approx(
        drop, abs=0.02
    )
    assert slope.dtype == x.dtype and (slope == 1).all()


@pytest.mark.parametrize("group_size", [0, 64])
def test_grids_on_the_device_are_numpys(group_size):
    weight = (draws(96, 256)[0] ** 3).astype(np.float32)
    nearest, best = grids_on_device(mx.array(weight), 4, group_size)
    for found, expected in (
        (nearest, min_max_grid(weight, 4, group_size)),
        (best, searched_grid(weight, 4, group_size)),
    ):
        for one, other in zip(found, expected, strict=True):
            assert np.allclose(np.array(one), other, rtol=1e-5)


class Rows:
    """Random samples of a block (TrainingSamples), one channel of whose tokens is `widest` times the others."""

    training, held_out, all_steps, holds_velocity = range(2, 8), range(2), range(1), False

    def __init__(self, block, hidden, widest):
        tokens = [mx.array(x, mx.float32) for x in (*draws(16, 12, 1, hidden), *draws(16, 5, 1, hidden))]
        widen = mx.where(mx.arange(hidden) == 3, widest, 1.0)
        self.rows = [tokens[0] * widen, tokens[1] * widen, mx.array(draws(16, 1, 1, hidden)[0], mx.float32)]
        self.rows += block.run(self.rows[:2], self.rows[2])

    def steps(self, indices):
        return np.zeros(len(indices), int)

    def batch(self, indices):
        at = mx.array(np.stack([2 * np.asarray(indices), 2 * np.asarray(indices) + 1], axis=1).ravel())
        rows = [array[at] for array in self.rows]
        return SampleBatch(rows[:2], rows[2], rows[3:])

    def keep(self, indices):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "widest"), [("token", 2e5), ("block", 1.0), ("static", 1.0)])  # FLUX's exceed 65,504
def test_a_block_learns_with_bfloat16_products(widest, rule):
    mmdit = random_transformer(mx.float32, depth_multimodal=2, hidden_size_override=128, num_heads=2)
    rows, spec = Rows(model_blocks(mmdit)["mm0"], 128, widest), BlockUnit.specs(model_layers(mmdit), ["mm0"])[0]
    units = {}
    for precision in ("float32", "bfloat16"):
        settings = Settings(iters=20, batch_size=4, precision=precision, activation_rule=rule)
        units[precision] = BlockUnit.build(mmdit, spec, rows, settings)
    found = {}
    for precision, unit in units.items():
        state = unit.quantized(unit.start, unit.codes(unit.start, hard=True), with_ranges=False)
        found[precision] = unit.gradients(state, np.arange(2, 6), 0)[1]["weights"]
    for name in spec.layers:
        one, other = (np.array(found[precision][name], np.float64).ravel() for precision in found)
        assert one @ other > 0.98 * np.linalg.norm(one) * np.linalg.norm(other), name
    training = UnitTraining(units["bfloat16"])
    while training.iteration < training.iters:
        training.step()
    losses = training.measure()
    assert losses["end_training"] < 0.95 and all(np.isfinite(value) for value in losses.values())


def test_the_unquantized_block_in_16_bits_is_near_float32():
    mmdit = random_transformer(mx.float32, depth_multimodal=2, hidden_size_override=128, num_heads=2)
    block = model_blocks(mmdit)["mm0"]
    rows = Rows(block, 128, 1.0)
    with original_forward([block], mx.float16).installed(mmdit, [block]):
        found = block.run(rows.rows[:2], rows.rows[2])
    assert isinstance(block.module.image_transformer_block.mlp.act_fn, nn.GELU)  # all is put back
    for one, other in zip(found, rows.rows[3:], strict=True):
        assert 0 < mx.abs(one - other).max() < 5e-3 * mx.abs(other).max()


def test_16_bit_products_take_less_memory():
    float32, half = (IterationBytes.of_shapes(10**6, 10**6, 10**7, 10**5, 1, half=half) for half in (False, True))
    assert half.peak(1) < 0.65 * float32.peak(1)


# --- files and options --------------------------------------------------------------------------------------


def optimize(folder, *arguments):
    quick = ("--calib-dir", folder, "--iters", 10, "--batch-size", 1, "--unit", "block", "--blocks", "mm0,mm1")
    return invoke("optimize_adaround", *quick, *arguments)


@pytest.fixture
def ends(tmp_path_factory, tmp_path):
    """Return a run of 3 images × 2 steps whose cache holds the ends."""
    folder = shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), tmp_path / "run")
    shutil.rmtree(folder / "adaround_weights")
    done = invoke(
        "cache_adaround_data",
        "--calib-dir",
        folder,
        "--num-images",
        3,
        "--stride",
        2,
        "--boundaries",
        "ends",
        "--force",
    )
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.slow
def test_samples_in_memory_and_in_files_learn_alike(ends, monkeypatch):
    weights = ends / "adaround_weights"

    def learn(host, device, *arguments):
        monkeypatch.setattr(held_boundaries, "HELD_SHARE", device)
        monkeypatch.setattr(held_boundaries, "memory_beside_gpu", lambda: host)
        done = optimize(ends, *arguments)
        assert done.exit_code == 0 and "products in bfloat16" in done.output, done.output
        noted = json.loads((weights / "metadata.json").read_text())
        assert noted["precision"] == "bfloat16"
        return {block: row["stages"][0] for block, row in noted["losses"].items()}

    filed = learn(0, 0, "--precision", "bfloat16", "--force")  # their targets are float16
    monkeypatch.setattr(micro_batches, "room_for_samples", lambda *_: 3)  # of six samples, beside the host's
    held = learn(10**12, 0, "--precision", "bfloat16", "--force")
    for block, losses in held.items():
        assert losses["nearest"] == pytest.approx(filed[block]["nearest"], rel=0.02)
        assert losses["end_training"] == pytest.approx(filed[block]["end_training"], rel=0.1)
    before = (weights / "mm1.npz").read_bytes()
    (weights / "mm1.npz").unlink()
    learn(0, 1, "--resume")  # the precision is the run's; samples walk up to mm1 anew, on the device now
    assert (weights / "mm1.npz").read_bytes() == before
    done = optimize(ends, "--resume", "--precision", "float32")
    assert done.exit_code == 2 and "--precision" in done.output


def test_rows_of_the_host_are_overwritten_where_they_fit():
    """A block of FLUX takes two arrays and gives one."""

    def tokens(count, value):
        return mx.full((2, count, 2), value, mx.float16)  # of two samples

    rows = [[np.zeros((1, 4, 2), np.float16), np.zeros((1, 3, 2), np.float16), "modulation"] for _ in range(2)]
    kept = rows[1][0]
    held_boundaries.replace_rows(rows, range(2), [1], [tokens(4, 3), tokens(3, 1)], on_host=True)
    assert rows[1][0] is kept and (kept == 3).all() and len(rows[1]) == 3 and (rows[0][0] == 0).all()
    held_boundaries.replace_rows(rows, range(2), [0, 1], [tokens(7, 5)], on_host=True)
    assert all(len(row) == 2 and row[0].shape == (1, 7, 2) and (row[0] == 5).all() for row in rows)


def test_a_micro_batch_of_one_need_not_fit():
    need = IterationBytes(weights=10**9, sample=10**9, blocks=24)
    assert need.micro_batch(8, 10**9) == 1 and not need.fits(1, 10**9) and need.fits(1, 10**12) is False
    assert IterationBytes(weights=10**6, sample=10**6, blocks=24).fits(8, 10**9)


@pytest.mark.slow
def test_less_memory_is_less_at_once(ends):
    """--max-memory stands in for a smaller device, and only while the command runs."""
    before, quick = mx.get_memory_limit(), ("--force", "--dry-run", "--batch-size", 6)
    plenty, little, refused = (
        optimize(ends, *quick, *limit) for limit in ((), ("--max-memory", "100MB"), ("--max-memory", "20MB"))
    )
    found = [int(re.search(r"\((\d+) at once\)", done.output).group(1)) for done in (plenty, little)]
    assert found[1] < found[0] <= 6 and mx.get_memory_limit() == before
    assert refused.exit_code == 2 and "of memory, and 20.0 MB are there" in refused.output, refused.output
