"""optimize_adaround.py: the arithmetic against float64 NumPy, files, resumption, bad input."""

import json
import os
import random
import shutil
import signal
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import folder_bytes, generate, invoke, on_grid, start

import w4a8.rounding.training as training_module
from calibration_store.block_cache import read_cache_metadata
from calibration_store.layout import WeightPaths
from calibration_store.manifest import read_manifest
from calibration_store.weights import read_quantized_block
from w4a8.backend.progress import progress_bar
from w4a8.model.layers import model_blocks, model_layers
from w4a8.model.parts import TRANSFORMER
from w4a8.model.runs import load_run_pipeline
from w4a8.quantized.arithmetic import grid_position, min_max_grid, nearest_codes, searched_grid
from w4a8.quantized.layer import QuantizedLayer, deployed_grid
from w4a8.rounding.settings import EVALUATED, Settings
from w4a8.rounding.training_samples import Samples, spread_over
from w4a8.rounding.unit_training import UnitTraining
from w4a8.rounding.units import BlockUnit, QuantizedUnit

QUICK = ("--iters", 10, "--batch-size", 2, "--no-tune-rest")


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Return a calibration run of 3 images × 4 steps with its block cache."""
    folder = tmp_path_factory.mktemp("optimize") / "run"
    assert generate("--num-images", 3, "--num-steps", 4, "--no-images", "--calib-dir", folder).exit_code == 0
    done = invoke("cache_adaround_data", "--calib-dir", folder, "--num-images", 3, "--stride", 2, "--boundaries", "all")
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def copy(cached, tmp_path):
    shutil.copytree(cached, tmp_path / "run")
    return tmp_path / "run"


def optimize(folder, *arguments):
    return invoke("optimize_adaround", "--calib-dir", folder, *QUICK, *arguments)


def minimum_of(fields):
    """Return the value of code 0, in float64."""
    return -fields["scale"].astype(np.float64) * fields["zero_point"].astype(np.float64)


@pytest.fixture(scope="module")
def unit(cached):
    """Return the first block as a unit, and what it takes to make another."""
    return block_unit(cached, "ste")


def block_unit(folder, rounding):
    mmdit = load_run_pipeline(read_manifest(folder), {TRANSFORMER: "float32"}).mmdit
    spec = BlockUnit.specs(model_layers(mmdit), list(model_blocks(mmdit)))[2]
    samples = Samples.of_stretch(folder, read_cache_metadata(folder), spec.blocks)
    settings = Settings(
        iters=20, batch_size=2, rounding=rounding, lr_activation_scale=1e-3, seed=3, activation_rule="static"
    )
    return BlockUnit.build(mmdit, spec, samples, settings)


def test_gradients_of_a_block_against_finite_differences(unit):
    state = unit.quantized(unit.start, unit.codes(unit.start, hard=True), with_ranges=False)
    indices = np.array(unit.samples.training[:2])
    _, gradients = unit.gradients(state, indices, 0)
    for name in ("mm2.img.attn.v_proj", "mm2.txt.mlp.fc2", "mm2.img.attn.o_proj"):
        direction = np.array(gradients["weights"][name])
        direction = mx.array(direction / np.linalg.norm(direction))
        losses, layer = [], state.layers[name]
        one, zero = mx.ones((len(layer.codes), 1)), mx.zeros((len(layer.codes), 1))
        for offset in (-0.01, 0.01):
            moved = QuantizedLayer(layer.weight + offset * direction, one, zero, layer.bias)
            losses += unit.losses(indices.tolist(), [QuantizedUnit({**state.layers, name: moved})])
        expected = (gradients["weights"][name] * direction).sum().item()
        assert (losses[1] - losses[0]) / 0.02 == pytest.approx(expected, rel=0.05), name


def unquantized(unit):
    """Return a state whose dense weights are the original ones: codes of one level each, on a grid of weights."""
    ones = {name: mx.ones((len(weight), 1)) for name, weight in unit.weights.items()}
    zeros = {name: mx.zeros((len(weight), 1)) for name, weight in unit.weights.items()}
    return QuantizedUnit({n: QuantizedLayer(w, ones[n], zeros[n], unit.biases.get(n)) for n, w in unit.weights.items()})


def test_round_to_nearest_has_a_loss_of_one(unit):
    chosen = spread_over(unit.samples.training, EVALUATED)
    nearest, original = unit.losses(chosen, [unit.nearest_state(), unquantized(unit)])
    assert nearest == pytest.approx(1, rel=1e-4)
    assert original < 1e-3  # the float16 of the cache


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["ste", "sigmoid"])
def test_a_restored_training_goes_on_as_if_nothing_happened(cached, rounding):
    unit = block_unit(cached, rounding)
    whole = UnitTraining(unit)
    for _ in range(20):
        whole.step()
    first = UnitTraining(unit)
    for _ in range(12):
        first.step()
    saved = {name: np.array(array) for name, array in first.arrays().items()}
    second = UnitTraining(unit)
    second.restore(saved, 12)
    for _ in range(8):
        second.step()
    expected = {name: np.array(array) for name, array in whole.arrays().items()}
    found = {name: np.array(array) for name, array in second.arrays().items()}
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    if rounding == "sigmoid":
        decided = np.concatenate([np.abs(np.array(a)).ravel() for a in second.state["alpha"].values()])
        assert (decided == 10).mean() > 0.5  # more at every tenth iteration


@pytest.mark.parametrize(("seconds", "expected"), [(None, [1]), (0.0, list(range(1, 21)))])
def test_checkpoints_take_a_tenth_of_the_time_unless_told_otherwise(unit, monkeypatch, seconds, expected):
    monkeypatch.setattr(training_module, "CHECKPOINT_SECONDS", 0.0)
    training, saves = UnitTraining(unit), []

    def save():  # the first takes as long as three iterations: the next one would be due after thirty
        saves.append(training.iteration)
        time.sleep(3 * (time.monotonic() - begun) if len(saves) == 1 else 0)

    begun = time.monotonic()
    training_module.train(training, progress_bar(20, "", "it", leave=False), save, seconds, lambda: None)
    assert saves == expected


# --- the stage ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files(copy):
    done = optimize(copy, "--unit", "model", "--alpha")
    assert done.exit_code == 0, done.output
    paths = WeightPaths(copy)
    metadata = json.loads(paths.metadata.read_bytes())
    assert metadata["format"] == "adaround_weights_v1" and metadata["group_size"] == 64 and metadata["weight_bits"] == 4
    assert metadata["block_names"] == [f"mm{i}" for i in range(8)] and metadata["iters"] == 10
    layers = model_layers(load_run_pipeline(read_manifest(copy), {TRANSFORMER: "float32"}).mmdit)
    seen = set()
    for block in metadata["block_names"]:
        losses = metadata["losses"][block]["stages"][0]
        assert losses["end"] < losses["nearest"] or losses["kept_nearest"]
        for name, fields in read_quantized_block(paths, block).items():
            seen.add(name)
            weight = np.array(layers[name].weight)
            out, groups = weight.shape[0], weight.shape[1] // 64
            assert fields["alpha"].shape == fields["q"].shape == weight.shape
            assert fields["alpha"].dtype == np.float16 and fields["q"].dtype == np.uint8 and fields["q"].max() <= 15
            assert fields["scale"].shape == fields["zero_point"].shape == (out, groups)
            assert fields["act_scale"].shape == () and fields["act_scale"] > 0
            assert ("act_shift" in fields) == name.endswith("fc2")
            assert ("bias" in fields) == (layers[name].bias is not None)
            grid = deployed_grid(*searched_grid(weight, 4, 64))
            lower = np.floor(grid_position(weight, *grid))
            assert np.array_equal(fields["q"], np.clip(lower + (fields["alpha"] >= 0), 0, 15))
            rebuilt = on_grid(fields["q"], fields["scale"], fields["zero_point"])
            assert np.abs(rebuilt - weight).mean() < np.abs(weight).mean() / 4
            for stored in (fields["scale"], minimum_of(fields)):  # what is deployed
                np.testing.assert_allclose(stored, stored.astype(np.float16).astype(np.float64), rtol=1e-6)
    assert seen == set(layers)
    assert not paths.checkpoint.exists()


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["ste", "sigmoid"])
def test_methods(copy, rounding):
    done = optimize(copy, "--unit", "block", "--rounding", rounding, "--blocks", "mm3,mm7", "--group-size", 0)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (copy / "adaround_weights").glob("mm?.npz")) == ["mm3.npz", "mm7.npz"]
    for layer, fields in read_quantized_block(WeightPaths(copy), "mm7").items():
        assert fields["scale"].shape[1] == 1, layer


@pytest.mark.slow
def test_learning_beats_round_to_nearest_on_held_out_samples(copy):
    done = optimize(copy, "--unit", "block", "--blocks", "mm2", "--iters", 60)
    assert done.exit_code == 0, done.output
    losses = json.loads(WeightPaths(copy).metadata.read_bytes())["losses"]["mm2"]["stages"][0]
    assert losses["end"] < 0.9 * losses["nearest"] and not losses["kept_nearest"]


@pytest.mark.slow
def test_a_block_that_got_worse_keeps_round_to_nearest(copy):
    done = optimize(copy, "--unit", "block", "--blocks", "mm2", "--lr-alpha", 5, "--weight-bits", 8, "--alpha")
    assert done.exit_code == 0 and "kept round-to-nearest" in done.stdout, done.output
    layers = model_layers(load_run_pipeline(read_manifest(copy), {TRANSFORMER: "float32"}).mmdit)
    for name, fields in read_quantized_block(WeightPaths(copy), "mm2").items():
        weight = np.array(layers[name].weight)
        grid = deployed_grid(*min_max_grid(weight, 8, 64))
        assert np.array_equal(fields["q"], nearest_codes(weight, *grid, 8))
        lower = np.floor(grid_position(weight, *grid))
        assert np.array_equal(fields["q"], np.clip(lower + (fields["alpha"] >= 0), 0, 255))


def codes_of(folder):
    return {name: array for block in WeightPaths(folder).root.glob("mm?.npz") for name, array in np.load(block).items()}


@pytest.mark.slow
@pytest.mark.all_cores
def test_killed_and_resumed_gives_the_codes_of_one_run(copy, tmp_path):
    arguments = (
        "--iters", 12, "--batch-size", 2, "--unit", "block", "--blocks", "mm0,mm1,mm2", "--checkpoint-seconds", 0,
    )  # fmt: skip
    clean = tmp_path / "clean"
    shutil.copytree(copy, clean)
    assert invoke("optimize_adaround", "--calib-dir", clean, *arguments).exit_code == 0
    chance = random.Random(int(os.environ.get("SEED", 0)))
    paths = WeightPaths(copy)
    for kill in range(int(os.environ.get("KILLS", 2))):
        process = start("optimize_adaround", "--calib-dir", copy, *arguments, *(["--resume"] if kill else []))
        while process.poll() is None and not (paths.checkpoint.exists() or paths.block("mm2").exists()):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = invoke("optimize_adaround", "--calib-dir", copy, *arguments, "--resume")
    assert done.exit_code == 0, done.output
    expected, found = codes_of(clean), codes_of(copy)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert folder_bytes(clean / "adaround_weights").keys() == folder_bytes(copy / "adaround_weights").keys()


def test_dry_run_writes_nothing(copy):
    before = folder_bytes(copy)
    done = optimize(copy, "--dry-run", "--unit", "block")
    assert done.exit_code == 0 and "of memory at the peak" in done.stdout, done.output
    assert folder_bytes(copy) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--group-size", 50], "'--group-size': '50' is not one of '0', '32', '64', '128'"),
        (["--group-size", 128], "--group-size 128 does not divide the layers' inputs ([192, 768])"),
        (["--weight-bits", 7], "'--weight-bits': '7' is not one of '2', '3', '4', '5', '6', '8'"),
        (["--blocks", "mm9"], "--blocks: mm9 not in the cache, which has mm0"),
        (["--activation-bits", 1], "--activation-bits 1: a symmetric grid needs 2 bits or more"),
        (["--unit", "model", "--blocks", "mm1"], "--unit model needs every block"),
        (["--resume", "--force"], "give one of them"),
    ],
)
def test_bad_options(cached, arguments, message):
    done = optimize(cached, *arguments)
    assert done.exit_code == 2 and message in done.stderr and not (cached / "adaround_weights").exists()


@pytest.mark.slow
def test_other_parameters_are_not_resumed(copy):
    assert optimize(copy, "--unit", "block", "--blocks", "mm0").exit_code == 0
    done = optimize(copy, "--unit", "block", "--blocks", "mm0")
    assert done.exit_code == 2 and "holds a run already: --resume goes on with it" in done.stderr
    done = optimize(copy, "--unit", "block", "--blocks", "mm0", "--resume", "--seed", 5)
    assert done.exit_code == 2 and "--seed 0, not 5" in done.stderr
    assert optimize(copy, "--unit", "block", "--blocks", "mm0", "--force", "--seed", 5).exit_code == 0


def test_no_cache_is_one_line(tmp_path):
    done = optimize(tmp_path)
    assert done.exit_code == 2 and "not found; run cache_adaround_data.py first" in done.stderr


@pytest.mark.slow
def test_a_micro_batch_that_an_older_run_noted_is_kept(copy):
    """Go on with a run of 0.8.0, whose plan may note a larger micro-batch than there are samples."""
    arguments = ("--calib-dir", copy, "--iters", 10, "--unit", "block", "--blocks", "mm0", "--batch-size", 64)
    assert invoke("optimize_adaround", *arguments).exit_code == 0
    path = WeightPaths(copy).plan
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"micro_batch": 64}))
    done = invoke("optimize_adaround", *arguments, "--resume", "--dry-run")
    assert done.exit_code == 0, done.output
