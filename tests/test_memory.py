"""What is in memory when, what is said of it before, and that micro-batches and groups change nothing."""

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT, folder_bytes, invoke, memory_limit
from finished_run import finished_run, one_line
from mlx.utils import tree_flatten

import w4a8.rounding.training_samples as samples_module
from calibration_store.block_cache import read_cache_metadata
from calibration_store.layout import WeightPaths
from calibration_store.manifest import read_manifest
from calibration_store.weights import read_quantized_block
from w4a8.backend import blas, parallel
from w4a8.evaluation.variants import make_variant
from w4a8.model import parts
from w4a8.model.catalog import BUNDLED_FOLDER, ModelError, describe_model
from w4a8.model.decoding import decode, decoding_elements
from w4a8.model.diffusionkit import VAEDecoder
from w4a8.model.layers import model_layers
from w4a8.model.loading import load_pipeline
from w4a8.model.parts import DECODER, TEXT, TRANSFORMER, check_finite, whole_model
from w4a8.model.prompt_encoder import PromptEncoder, encode_prompts
from w4a8.model.runs import run_transformer
from w4a8.rounding.iteration_bytes import IterationBytes
from w4a8.rounding.settings import Settings
from w4a8.rounding.training_samples import Samples
from w4a8.rounding.unit_phase import half_alpha
from w4a8.rounding.units import BlockUnit

PROMISE = 0.15  # how far the measured peak may be from what the dry run says
TOOK = re.compile(r"\[took\] [\d.]+ s, (\d+) bytes MLX")
SAID = re.compile(r"([\d.]+) (kB|MB|GB) of memory at the peak")
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


@pytest.fixture
def run(tmp_path_factory, tmp_path):
    return shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), tmp_path / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp())


def lazy():
    return load_pipeline(describe_model("sd3-emoji"), whole_model("float32"), lazy=True)


# --- parts --------------------------------------------------------------------------------------------------


def test_parts_come_when_they_are_used_and_go():
    pipeline = lazy()
    assert not any(pipeline.has(part) for part in (TEXT, TRANSFORMER, DECODER))
    first = np.array(pipeline.mmdit.context_embedder.weight)
    assert pipeline.has(TRANSFORMER) and not pipeline.has(TEXT)
    pipeline.drop(TRANSFORMER)
    assert not pipeline.has(TRANSFORMER)
    assert np.array_equal(np.array(pipeline.mmdit.context_embedder.weight), first)
    with pytest.raises(AttributeError, match="no t5_tokenizer"):
        pipeline.t5_tokenizer


@pytest.mark.parametrize("group", [1, 2, None])
def test_texts_are_those_of_single_prompts_whatever_the_group(emoji, group):
    pipeline, prompts = lazy(), ["rocket", "red heart", "mango", "rocket"]
    texts = PromptEncoder(pipeline, prompts, 4.0, "", group)
    pipeline.load(TRANSFORMER)
    for some in (prompts[:1], prompts[:2], prompts[2:]):
        found, expected = texts.encode(some), encode_prompts(emoji, some, 4.0)
        assert mx.array_equal(found.tokens, expected.tokens) and mx.array_equal(found.pooled, expected.pooled)
        assert (not pipeline.has(TEXT) and not pipeline.has(TRANSFORMER)) or group is None


def test_quantized_weights_take_the_place_of_the_originals():
    pipeline = lazy()
    pipeline.load(TRANSFORMER)
    one_model = sum(array.nbytes for _, array in tree_flatten(pipeline.mmdit.parameters()))
    layer = max(weight.nbytes for weight in (each.weight for each in model_layers(pipeline.mmdit).values()))
    before = mx.get_active_memory() - one_model
    mx.reset_peak_memory()
    with make_variant("w4-rtn-g64", None).in_place(pipeline):
        assert mx.get_active_memory() - before <= one_model + layer
        assert mx.get_peak_memory() - before <= one_model + 8 * layer  # codes and the grid of one layer
    assert not pipeline.has(TRANSFORMER)


def test_stage_3w_opens_a_block_at_a_time(finished):
    before = mx.get_active_memory()
    mmdit = run_transformer(read_manifest(finished))()
    assert mx.get_active_memory() - before < 1e6  # nothing is read
    layers = model_layers(mmdit)
    mx.eval(layers["mm0.img.mlp.fc1"].weight)
    assert layers["mm0.img.mlp.fc1"].weight.dtype == mx.float32
    assert 4 * 192 * 768 <= mx.get_active_memory() - before < 3e6


@pytest.mark.parametrize("part", ["mmdit", "clip_l", "decoder"])
@pytest.mark.parametrize("keep", [10_000, 100])
def test_a_truncated_part_is_one_line_and_nothing_is_lost(run, tmp_path, part, keep):
    """Of every part, whenever it would be read: also with --force, before the old run is deleted."""
    model = shutil.copytree(BUNDLED_FOLDER, tmp_path / "model")
    weights = model / f"{part}.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    before = folder_bytes(run)
    arguments = ("--model", model, "--num-images", 2, "--num-steps", 2)
    one_line(invoke("generate_calibration_data", *arguments, "--calib-dir", run, "--force"), f"{part}.safetensors")
    one_line(
        invoke("draw_images", "red heart", "--model", model, "--output", tmp_path / "drawn"), f"{part}.safetensors"
    )
    one_line(
        invoke("evaluate_quantization", "--calib-dir", run, "--model", model, "--variants", "w4-rtn"),
        f"{part}.safetensors",
    )
    assert folder_bytes(run) == before


# --- micro-batches ------------------------------------------------------------------------------------------


def unit_of(folder, micro_batch, samples=None):
    mmdit = run_transformer(read_manifest(folder))()
    spec = BlockUnit.specs(model_layers(mmdit), ["mm2"])[0]
    settings = Settings(
        iters=20,
        batch_size=4,
        qdrop=0.0,
        lr_activation_scale=1e-3,
        seed=3,
        micro_batch=micro_batch,
        activation_rule="static",
    )
    return BlockUnit.build(
        mmdit, spec, samples or Samples.of_stretch(folder, read_cache_metadata(folder), ["mm2"]), settings
    )


def gradients_of(unit, with_ranges=False):
    state = unit.quantized(unit.start, unit.codes(unit.start, hard=True), with_ranges)
    return unit.gradients(state, np.array([0, 1, 2, 3]), 0)


@pytest.mark.slow
def test_micro_batches_change_nothing_but_float_noise(finished):
    loss, whole = gradients_of(unit_of(finished, 4))
    rounded, _ = gradients_of(unit_of(finished, 4), True)
    for micro_batch in (1, 2, 3):
        found_loss, found = gradients_of(unit_of(finished, micro_batch))
        assert found_loss.item() == pytest.approx(loss.item(), rel=1e-4)
        for (name, a), (_, b) in zip(tree_flatten(found), tree_flatten(whole), strict=True):
            size = mx.abs(b).max().item()
            assert mx.abs(a - b).max().item() <= 1e-3 * size + 1e-9, (micro_batch, name)
        # 8-bit inputs round the noise to a code up or down here and there
        assert gradients_of(unit_of(finished, micro_batch), True)[0].item() == pytest.approx(rounded.item(), rel=1e-3)


@pytest.mark.slow
def test_how_many_work_side_by_side_changes_nothing_at_all(finished, monkeypatch):
    """Micro-batches are summed in their order: one core gives the bits of two.

    The unit is made once: on some CPUs its norms have other last bits with two BLAS threads than with one.
    """
    found, unit, own = {}, unit_of(finished, 1), blas.cores()
    for cores in (1, 2, 3):
        monkeypatch.setattr(blas, "cores", lambda cores=cores: cores)
        blas.set_threads(cores)
        assert parallel.working_cores() == cores
        found[cores] = [np.array(array) for _, array in tree_flatten(list(gradients_of(unit, True)))]
    blas.set_threads(own)
    for cores in (2, 3):
        assert all(np.array_equal(a, b) for a, b in zip(found[1], found[cores], strict=True))


def test_samples_that_do_not_fit_stay_in_their_files(finished, monkeypatch):
    cache = read_cache_metadata(finished)
    held = Samples.of_stretch(finished, cache, ["mm1"])
    monkeypatch.setattr(samples_module, "SAMPLES_SHARE", 0)
    mapped = Samples.of_stretch(finished, cache, ["mm1"])
    assert held.held_bytes == held.num_bytes == mapped.num_bytes and mapped.held_bytes == 0
    for (_, a), (_, b) in zip(*(tree_flatten(s.batch(np.array([3, 1]))) for s in (held, mapped)), strict=True):
        assert a.dtype == b.dtype and mx.array_equal(a, b)


def test_the_micro_batch_follows_the_memory(monkeypatch):
    monkeypatch.setattr(blas, "cores", lambda: 2)
    need = IterationBytes(weights=10**6, sample=10**8, blocks=1)
    assert need.micro_batch(16, 10**11) == 8  # two cores share the batch
    assert need.micro_batch(16, 10**9) == 3
    assert need.micro_batch(16, 10**7) == 1
    assert need.peak(8) > need.peak(2)


@pytest.mark.slow
def test_a_run_keeps_its_micro_batch(run):
    arguments = ("optimize_adaround", "--calib-dir", run, "--iters", 10, "--batch-size", 4, "--blocks", "mm0")
    assert invoke(*arguments, "--force", "--micro-batch", 3).exit_code == 0
    done = invoke(*arguments, "--resume", "--micro-batch", 1)
    one_line(done, "has --micro-batch 3, not 1")
    done = invoke(*arguments, "--resume")
    assert done.exit_code == 0 and "10 iterations of 4 (3 at once)" in done.stdout


# --- alpha, bytes -------------------------------------------------------------------------------------------


def test_alpha_in_half_precision_stays_on_its_side():
    alpha = np.array([0.3, -0.3, 1e-9, -1e-9, 0.0, -0.0, 2.0**-25, -(2.0**-25), 10, -10], np.float32)
    half = half_alpha(alpha)
    assert half.dtype == np.float16
    assert np.array_equal(half >= 0, alpha >= 0)
    np.testing.assert_allclose(half.astype(np.float32), alpha, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_no_alpha_leaves_it_out_and_nothing_else(run):
    arguments = (
        "optimize_adaround",
        "--calib-dir",
        run,
        "--iters",
        10,
        "--batch-size",
        2,
        "--blocks",
        "mm0",
        "--force",
    )
    found = []
    for option in ("--alpha", "--no-alpha"):
        assert invoke(*arguments, option).exit_code == 0
        found.append(read_quantized_block(WeightPaths(run), "mm0"))
    kept, without = found
    for name, fields in kept.items():
        assert fields.pop("alpha").dtype == np.float16
        assert fields.keys() == without[name].keys()
        assert all(np.array_equal(fields[key], without[name][key]) for key in fields)


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("cache_adaround_data", ("--num-images", 2)),
        ("collect_layer_activations", ("--num-images", 2)),
        ("optimize_adaround", ("--iters", 10)),
    ],
)
def test_a_budget_is_kept(run, script, arguments):
    before = sorted(path for path in run.rglob("*") if path.is_file())
    one_line(
        invoke(script, "--calib-dir", run, *arguments, "--force", "--max-bytes", "10kB"), "--max-bytes allows 10.0 kB"
    )
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize("text", ["20XB", "GB", "-3MB", "nan", "1e999"])
def test_sizes_that_are_none(run, text):
    done = invoke("cache_adaround_data", "--calib-dir", run, "--max-bytes", text)
    assert done.exit_code == 2 and "is not a size such as 20GB" in done.stderr


# --- said before it happens ---------------------------------------------------------------------------------


def staged(*arguments):
    command = [sys.executable, "benchmarks/run_stage.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, arguments",
    [
        ("cache_adaround_data.py", ("--num-images", 2, "--force")),
        ("collect_layer_activations.py", ("--num-images", 2, "--force")),
        ("optimize_adaround.py", ("--iters", 10, "--batch-size", 4, "--unit", "block", "--no-tune-rest", "--force")),
        ("optimize_adaround.py", ("--iters", 10, "--batch-size", 4, "--force")),
        ("evaluate_quantization.py", ("--num-images", 2, "--num-steps", 3, "--variants", "w4-rtn")),
    ],
)
def test_the_peak_is_what_the_dry_run_says(run, script, arguments):
    said = SAID.search(staged(script, "--calib-dir", run, *arguments, "--dry-run"))
    measured = int(TOOK.search(staged(script, "--calib-dir", run, *arguments))[1])
    assert measured == pytest.approx(float(said[1]) * UNITS[said[2]], rel=PROMISE)


def test_analyzers_have_a_dry_run(run):
    for script, config in (("analyze_activations", "quant_config.json"), ("analyze_activations_multitier", "x.json")):
        output = run / "activations" / config
        before = output.read_bytes() if output.exists() else None
        done = invoke(script, "--calib-dir", run, "--output", output, "--dry-run")
        assert done.exit_code == 0 and re.search(r"layers at \d+ steps, about .* of memory at the peak", done.stdout)
        assert (output.read_bytes() if output.exists() else None) == before


def limited(*arguments, limit=3 * 10**9):
    """Return a stage that may have so many bytes of address space."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit the address space")
def test_what_cannot_fit_is_said_before_it_is_loaded(tmp_path):
    first = ("generate_calibration_data.py", "--model", "sd3-emoji", "--num-images", 3000, "--batch-size", 3000)
    done = limited(*first, "--calib-dir", tmp_path / "new")
    assert done.returncode == 2, done.stderr
    assert re.search(r" 3.00 GB are there: --batch-size \d+ takes less \(Issue 10\)\n$", done.stderr), done.stderr
    assert not (tmp_path / "new/samples").exists()


def test_samples_that_do_not_fit_at_once_are_refused(run):
    with memory_limit(3 * 10**8):
        done = invoke("optimize_adaround", "--calib-dir", run, "--force", "--batch-size", 500, "--micro-batch", 500)
    assert done.exit_code == 2, done.output
    assert re.search(r" 300.0 MB are there: --micro-batch \d takes less \(Issue 10\)\n$", done.stderr), done.stderr
    assert list((run / "adaround_weights").iterdir())


# --- neighbours ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not blas._is_needed(), reason="another BLAS")
def test_one_thread_is_one_thread():
    """Also where MLX computes, in a thread of its own."""
    x = mx.random.normal((1536, 1536))
    mx.eval(x)
    blas.set_threads(1)
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(5):
            mx.eval(x @ x)
        assert time.process_time() - cpu <= 1.25 * (time.perf_counter() - wall)
    finally:
        blas.set_threads(blas.cores())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="macOS has no affinity")
def test_threads_follow_the_affinity():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import w4a8.backend.parallel as p; print(p.working_cores())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_settings_default_to_the_whole_batch():
    assert Settings(iters=20, batch_size=16, lr_activation_scale=1e-3, seed=3, activation_rule="static").chunk == 16
    assert (
        replace(
            Settings(iters=20, batch_size=16, lr_activation_scale=1e-3, seed=3, activation_rule="static"), micro_batch=2
        ).chunk
        == 2
    )


@pytest.mark.parametrize(("channels", "resnets", "side"), [((16, 32), 2, 16), ((8, 16, 16, 64), 1, 8), ((8, 8), 1, 40)])
def test_decoding_takes_what_shapes_say_and_changes_no_bit(channels, resnets, side):
    """The last decoder is so narrow that the attention's scores take the most."""
    decoder = VAEDecoder(block_out_channels=channels, layers_per_block=resnets, resnet_groups=8)
    latent = mx.random.normal((1, side, side + 2, 16))
    mx.eval(decoder.parameters(), latent)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pixels = decode(decoder, latent)
    peak = mx.get_peak_memory() - before
    assert mx.array_equal(pixels, decoder(latent)).item()
    said = 4 * decoding_elements(channels, resnets, side, side + 2)
    if mx.default_device() == mx.Device(mx.cpu):
        assert 0.95 < peak / said < 1.05


def test_weights_are_cast_and_checked_in_groups_on_every_core(monkeypatch):
    monkeypatch.setattr(parts, "READ_AT_ONCE", 5000)
    model = nn.Sequential(*(nn.Linear(64, 64 + i) for i in range(5)), nn.QuantizedLinear(64, 8))
    model.set_dtype(mx.float16)
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    check_finite(model, "a.safetensors", mx.float32)
    after = dict(tree_flatten(model.parameters()))
    assert {array.dtype for name, array in after.items()} == {mx.float32, mx.uint32}
    assert all(np.array_equal(np.array(after[name]), array) for name, array in before.items())
    model.layers[3].weight[2, 5] = mx.inf
    with pytest.raises(ModelError, match=r"a.safetensors: layers.3.weight holds NaN or infinity \(1 such weights\)"):
        check_finite(model, "a.safetensors", mx.float16)
