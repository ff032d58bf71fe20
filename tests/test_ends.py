"""The road from a cache of the ends: what 2W stores, 3W's walk and last phase, activation rules as trained, resumption."""

import gc
import json
import random
import re
import shutil
import signal
import time
import weakref
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import folder_bytes, generate, invoke, start
from finished_run import one_line
from mlx.utils import tree_flatten

from calibration_store.block_cache import read_cache_metadata, read_cached_block, read_cached_ends
from calibration_store.errors import StoreError
from calibration_store.layout import WeightPaths
from calibration_store.manifest import read_manifest
from calibration_store.weights import read_quantized_block
from w4a8.block_recording import Recording
from w4a8.effort import effort_of
from w4a8.model.parts import TEXT, TRANSFORMER
from w4a8.model.runs import load_run_pipeline, run_schedule, run_transformer
from w4a8.options import CacheOptions
from w4a8.passes import SampleId, StoredPasses, choose_amount
from w4a8.rounding import block_boundaries
from w4a8.rounding.block_boundaries import BlockBoundaries
from w4a8.rounding.final_phase import FinalPhase
from w4a8.rounding.held_boundaries import ON_HOST, HeldSamples
from w4a8.rounding.phases import jobs_of
from w4a8.rounding.run import RoundingRun
from w4a8.rounding.settings import Settings
from w4a8.rounding.training import grid_slopes
from w4a8.rounding.training_samples import patches
from w4a8.rounding.unit_phase import trained_layers
from w4a8.rounding.whole_model import WholeModel

pytestmark = pytest.mark.slow

BLOCKS = [f"mm{index}" for index in range(8)]
CACHE = ("--num-images", 3, "--stride", 2)
QUICK = ("--iters", 10, "--batch-size", 2, "--no-tune-rest")


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Return a calibration run of 3 images × 4 steps with the ends cached."""
    folder = tmp_path_factory.mktemp("ends") / "run"
    assert generate("--num-images", 3, "--num-steps", 4, "--no-images", "--calib-dir", folder).exit_code == 0
    done = invoke("cache_adaround_data", "--calib-dir", folder, *CACHE)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def everything(ends, tmp_path_factory):
    """Return the same run with all boundaries."""
    folder = tmp_path_factory.mktemp("all") / "run"
    shutil.copytree(ends, folder, ignore=shutil.ignore_patterns("adaround_cache"))
    done = invoke("cache_adaround_data", "--calib-dir", folder, *CACHE, "--boundaries", "all")
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def copy(ends, tmp_path):
    shutil.copytree(ends, tmp_path / "run")
    return tmp_path / "run"


def optimize(folder, *arguments):
    return invoke("optimize_adaround", "--calib-dir", folder, *QUICK, *arguments)


# --- the cache ----------------------------------------------------------------------------------------------


def test_what_the_ends_hold(ends, everything):
    metadata = json.loads((ends / "adaround_cache/metadata.json").read_bytes())
    assert metadata["boundaries"] == "ends" and metadata["velocity_shape"] == [2, 16, 16, 16]
    assert json.loads((everything / "adaround_cache/metadata.json").read_bytes())["boundaries"] == "all"
    mmdit = run_transformer(read_manifest(ends))()
    whole = list(read_cached_block(everything, "mm0", "mm7"))
    for cached, other in zip(read_cached_ends(ends), whole, strict=True):
        with np.load(ends / f"adaround_cache/samples/{cached.image_id:04d}_{cached.step_index:03d}.npz") as found:
            keys = {"mm0__arg0", "mm0__arg1", "modulation_input", "velocity"}
            assert set(found.files) == keys | {"image_id", "step_index", "calibration_run"}
            assert all(found[key].dtype == np.float16 for key in keys)
        assert (cached.image_id, cached.step_index) == (other.image_id, other.step_index)
        for one, two in zip(
            (*cached.inputs, cached.modulation_input), (*other.inputs, other.modulation_input), strict=True
        ):
            assert np.array_equal(one, two)
        final = mmdit.final_layer  # of the last block's output: the model's own velocity
        modulation = mx.array(np.array(other.modulation_input)).astype(mx.float32)
        final["_modulation_params"] = {0.0: final.adaLN_modulation(modulation)}
        velocity = np.array(final(mx.array(np.array(other.outputs[0])).astype(mx.float32), mx.zeros((1,))))
        np.testing.assert_allclose(
            patches(np.array(cached.velocity, np.float32), mmdit.config), velocity, atol=6e-3 * abs(velocity).max()
        )
    with pytest.raises(StoreError, match="only the ends .* --boundaries all --force"):
        next(iter(read_cached_block(ends, "mm3")))
    with pytest.raises(StoreError, match="read_cached_block"):
        next(iter(read_cached_ends(everything)))


def test_several_samples_in_a_pass_give_the_same(ends, monkeypatch):
    """What a GPU does: rows of different prompts and steps in one pass; float noise is all that differs."""
    manifest = read_manifest(ends)
    pipeline = load_run_pipeline(manifest, {TRANSFORMER: "float32", TEXT: "float32"})
    recording, passes = (
        Recording(pipeline.mmdit, None, True),
        StoredPasses.open(pipeline, ends, manifest, manifest["images"]),
    )
    sample_ids = [SampleId(image, step) for image in range(3) for step in (0, 1, 3)]
    alone = {
        sample_id: {key: np.array(a) for key, a in arrays.items()}
        for sample_id, arrays in recording.record_all(passes, sample_ids)
    }
    monkeypatch.setattr(StoredPasses, "samples_at_once", lambda self: 4)
    together = dict(recording.record_all(passes, sample_ids))
    assert together.keys() == alone.keys()
    seconds, first = recording.probe(passes, sample_ids)
    assert 0 < seconds < 10 and all(np.array_equal(first[key], together[sample_ids[0]][key]) for key in first)
    for sample_id, arrays in alone.items():
        for key, array in arrays.items():
            found = np.array(together[sample_id][key], np.float32)
            assert found.shape == array.shape
            np.testing.assert_allclose(found, array.astype(np.float32), atol=2e-3 * abs(array).max())


def test_a_budget_picks_images_first(ends):
    manifest, effort = {"images": [{}] * 100, "num_steps": 20, "stride": 1}, effort_of("good", 1)

    def pick(samples, images=None, stride=None, steps=None):
        options = CacheOptions(num_images=images, stride=stride, steps=steps, max_bytes=samples * 1000)
        return choose_amount(options, effort, manifest, None, 1000)[:2]

    assert pick(40) == (10, 5) and pick(400) == (100, 5) and pick(2000) == (100, 1) and pick(10**6) == (100, 1)
    assert pick(1) == (1, 20) and pick(40, images=20) == (20, 10) and pick(40, stride=10) == (20, 10)
    assert pick(40, steps="1,2") == (20, 1)
    whole = choose_amount(CacheOptions(calib_dir=ends), effort, manifest, None, 1000)
    assert whole == (100, 1, [10, 14, 16, 17, 18])
    done = invoke("cache_adaround_data", "--calib-dir", ends, "--force", "--dry-run", "--max-bytes", "1MB")
    assert done.exit_code == 0 and "images [0, 2], 4 steps each, 8 samples, ends" in done.stdout
    needs = float(re.search(r"to do: 8 of 8 samples .* at most ([\d.]+) kB", done.stdout)[1])
    assert needs <= 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--steps", "0,9"), "--steps 0,9: step 9 was not saved; there are [0, 1, 2, 3]"),
        (("--steps", "a-b"), "--steps a-b: step indices such as 8,12,16-19"),
        (("--steps", "3-1"), "--steps 3-1: step ? was not saved"),
        (("--steps", "1", "--stride", "2"), "--steps and --stride exclude each other"),
        (("--boundaries", "ends", "--blocks", "mm0"), "--boundaries ends is of all blocks"),
        (("--boundaries", "some"), "'some' is not one of 'all', 'ends'"),
    ],
)
def test_choices_that_cannot_be(ends, arguments, message):
    before = folder_bytes(ends)
    done = invoke("cache_adaround_data", "--calib-dir", ends, "--force", *arguments)
    assert done.exit_code == 2 and message in done.stderr and folder_bytes(ends) == before


def test_steps_are_chosen_and_kept(copy):
    done = invoke("cache_adaround_data", "--calib-dir", copy, "--num-images", 2, "--steps", "1,3", "--force")
    assert done.exit_code == 0, done.output
    assert read_cache_metadata(copy)["key_timesteps"] == [1, 3]
    done = invoke("cache_adaround_data", "--calib-dir", copy, "--num-images", 2, "--steps", "0,3", "--resume")
    assert done.exit_code == 2 and "--steps [1, 3], not [0, 3]" in done.stderr
    assert (
        invoke("cache_adaround_data", "--calib-dir", copy, "--num-images", 2, "--steps", "1,3", "--resume").exit_code
        == 0
    )


def test_a_cache_of_an_earlier_version_goes_on(everything, tmp_path):
    """Without a word on boundaries: all."""
    folder = shutil.copytree(everything, tmp_path / "run")
    for name in ("plan.json", "metadata.json"):
        path = folder / "adaround_cache" / name
        content = json.loads(path.read_bytes())
        del content["boundaries"]
        path.write_text(json.dumps(content))
    (folder / "adaround_cache/samples/0002_002.npz").unlink()
    done = invoke("cache_adaround_data", "--calib-dir", folder, *CACHE, "--resume")
    assert done.exit_code == 0, done.output
    samples = "adaround_cache/samples/0002_002.npz"
    assert (folder / samples).read_bytes() == (everything / samples).read_bytes()
    done = invoke("cache_adaround_data", "--calib-dir", folder, *CACHE, "--resume", "--boundaries", "ends")
    assert done.exit_code == 2 and "--boundaries all, not ends" in done.stderr


# --- the walk -----------------------------------------------------------------------------------------------


def rounding_of(folder, settings, unit="block"):
    manifest = read_manifest(folder)
    opened = run_transformer(manifest)
    cache, schedule = read_cache_metadata(folder), run_schedule(manifest)[0]
    return RoundingRun(opened, opened(), WeightPaths(folder), cache, schedule, settings, unit, BLOCKS)


SETTINGS = Settings(
    iters=10, batch_size=2, lr_activation_scale=5e-3, seed=0, micro_batch=1, activation_rule="token", end_to_end=10
)


@pytest.fixture
def in_files(monkeypatch):
    """Keep boundaries in files, as where they do not fit into memory."""
    monkeypatch.setattr(block_boundaries, "fit_in_memory", lambda num_bytes: False)


def test_boundaries_in_memory_are_those_in_files(copy, monkeypatch):
    rounding = rounding_of(copy, SETTINGS)
    held = rounding.boundaries.samples(rounding.open(), "mm1").batch([0, 3])
    assert not (copy / "adaround_weights/boundaries").exists()
    monkeypatch.setattr(block_boundaries, "fit_in_memory", lambda num_bytes: False)
    again = BlockBoundaries(rounding.cache, rounding.paths, rounding.plan, 1)
    filed = again.samples(rounding.open(), "mm1").batch([0, 3])
    for (_, one), (_, other) in zip(tree_flatten(held), tree_flatten(filed), strict=True):
        assert mx.array_equal(one, other)


def test_the_last_phase_finds_the_memory_of_held_samples_free(copy):
    rounding = rounding_of(copy, replace(SETTINGS, precision="bfloat16"))
    rounding = replace(rounding, place=ON_HOST)
    samples = rounding.boundaries.samples(rounding.open(), "mm1")
    assert isinstance(samples, HeldSamples) and samples.held_bytes
    samples.keep([0, 3])
    samples.batch([0, 3])
    reference = weakref.ref(samples)
    del samples
    gc.disable()
    try:
        rounding.boundaries.finish()
        assert reference() is None
    finally:
        gc.enable()


def test_the_walk_makes_the_boundaries_that_all_holds(copy, everything, in_files):
    rounding = rounding_of(copy, SETTINGS)
    mmdit = rounding.open()
    for block in ("mm0", "mm1", "mm5", "mm7"):
        samples = rounding.boundaries.samples(mmdit, block)
        for index, cached in enumerate(read_cached_block(everything, block)):
            expected = [*cached.inputs, cached.modulation_input, *cached.outputs]
            batch = samples.batch([index])
            for got, wanted in zip([*batch.tokens, batch.modulation, *batch.outputs], expected, strict=True):
                wanted = wanted.astype(np.float32)
                np.testing.assert_allclose(np.array(got), wanted, atol=6e-3 * abs(wanted).max())
        left = sorted(path.name for path in (copy / "adaround_weights/boundaries").iterdir())
        assert left == sorted({block, BLOCKS[max(0, BLOCKS.index(block) - 1)]})  # never more than both sides
    rounding.boundaries.finish()
    assert not (copy / "adaround_weights/boundaries").exists()


def test_a_damaged_boundary_is_made_anew(copy, in_files):
    rounding = rounding_of(copy, SETTINGS)
    rounding.boundaries.samples(rounding.open(), "mm1")
    boundary = copy / "adaround_weights/boundaries/mm1"
    before = folder_bytes(boundary)
    (boundary / "0001_002.npz").write_bytes(b"no")
    (boundary / "0002_000.npz").unlink()
    again = BlockBoundaries(rounding.cache, rounding.paths, rounding.plan, 1)
    again.samples(rounding.open(), "mm1")
    assert folder_bytes(boundary) == before


def test_block_units_and_the_last_phase(copy):
    arguments = ("--unit", "block", "--end-to-end", 12, "--bits", "mm[23456].*=16")
    done = optimize(copy, *arguments)
    assert done.exit_code == 0, done.output
    assert "then 12 end to end" in done.stdout and "\nend to end " in done.stdout
    root = copy / "adaround_weights"
    assert not (root / "boundaries").exists() and not (root / "checkpoint.npz").exists()
    metadata = json.loads((root / "metadata.json").read_bytes())
    last = metadata["end_to_end_losses"]["stages"][0]
    assert last["end"] < last["start"] < last["nearest"] * 1.2 and metadata["end_to_end"] == 12
    moved = 0
    for block in metadata["block_names"]:
        for fields in read_quantized_block(WeightPaths(copy), block).values():
            assert fields["scale_before"].shape == fields["scale"].shape
            moved += not np.array_equal(fields["scale_before"], fields["scale"])
            for key in ("scale", "zero_point"):  # as deployed
                half = np.float32(np.float16(-fields["scale"] * fields["zero_point"]))
                assert (
                    np.array_equal(fields["scale"], np.float32(np.float16(fields["scale"])))
                    and half.shape == fields[key].shape
                )
    assert moved > 25
    before = folder_bytes(root)
    done = optimize(copy, *arguments, "--resume")
    assert done.exit_code == 0 and folder_bytes(root) == before
    (root / "mm1.npz").unlink()  # its first phase again, then the last one: the others know where theirs began
    done = optimize(copy, *arguments, "--resume")
    assert done.exit_code == 0 and folder_bytes(root) == before


@pytest.mark.parametrize("rule", ["token", "static"])
def test_slopes_block_by_block_are_those_of_the_whole(copy, rule):
    """Against the gradients of the whole-model unit, which autograd gives in one piece."""
    settings = replace(SETTINGS, activation_rule=rule, qdrop=0.0)
    rounding = rounding_of(copy, settings, "model")
    job = jobs_of(rounding)[0]
    mmdit = rounding.open()
    samples = job.samples(mmdit)
    training = job.training(mmdit, samples)
    unit = training.unit
    whole = WholeModel.build(mmdit, BLOCKS, samples, settings, trained_layers(training, False))
    whole.start["range"] = dict(training.state["range"])  # to the last bit: a range decides which way a value rounds
    indices = np.array(samples.training[:3])
    codes = unit.codes(training.state, hard=True)
    loss, gradients = unit.gradients(unit.quantized(training.state, codes, True), indices, 3)
    expected = grid_slopes(codes, training.state["scale"], training.state["zero_point"], gradients["weights"])
    expected |= {"bias": gradients["biases"], "ranges": gradients["ranges"], "rest": {}}
    assert not whole.at_once
    in_one = WholeModel(
        mmdit, BLOCKS, samples, settings, trained_layers(training, False), at_once=True, norm=whole.norm
    )
    compare_slopes(whole.slopes(whole.start, indices, 3), loss, expected)
    compare_slopes(in_one.slopes(whole.start, indices, 3), loss, expected)
    assert bool(expected["ranges"]) == (rule == "static")


def compare_slopes(given, loss, expected):
    """Hold (loss, slopes) against those of autograd."""
    found_loss, found = given
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5) and found.keys() == expected.keys()
    for kind, layers in expected.items():
        largest = max((float(mx.abs(array).max()) for array in layers.values()), default=0)
        assert found[kind].keys() == layers.keys()
        for name, array in layers.items():
            np.testing.assert_allclose(
                np.array(found[kind][name]), np.array(array), atol=1e-4 * largest, err_msg=f"{kind} {name}"
            )


@pytest.mark.slow
def test_the_last_phase_in_one_piece_is_that_of_block_by_block(copy, tmp_path, monkeypatch):
    """The last phase of a GPU with room, after blocks: the same codes, and nearly the same grids."""
    whole, arguments = tmp_path / "whole", ("--unit", "block", "--end-to-end", 4, "--bits", "mm[123456].*=16")
    shutil.copytree(copy, whole)
    assert optimize(copy, *arguments).exit_code == 0
    monkeypatch.setattr(FinalPhase, "in_one_piece", True)
    assert optimize(whole, *arguments).exit_code == 0
    for block in ("mm0", "mm7"):
        one, other = (read_quantized_block(WeightPaths(folder), block) for folder in (whole, copy))
        for name, fields in one.items():
            assert np.array_equal(fields["q"], other[name]["q"]) and "scale_before" in fields
            np.testing.assert_allclose(fields["scale"], other[name]["scale"], rtol=2e-3)


def test_kills_in_every_phase_leave_the_same_files(copy):
    command = [*QUICK, "--unit", "block", "--end-to-end", 6, "--checkpoint-seconds", 0.3]
    command += ["--bits", "mm[123456].*=16", "--tune-rest", "--unrolled", 2]
    done = invoke("optimize_adaround", "--calib-dir", copy, *command)
    assert done.exit_code == 0, done.output
    expected = folder_bytes(copy / "adaround_weights")
    shutil.rmtree(copy / "adaround_weights")
    generator, kills = random.Random(3), 0
    for attempt in range(5):
        process = start("optimize_adaround", "--calib-dir", copy, *command, "--resume")
        deadline = time.monotonic() + (generator.uniform(2.5, 7) if attempt < 4 else 600)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0, process.stderr.read()
    assert kills >= 2
    assert folder_bytes(copy / "adaround_weights") == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--end-to-end", 0, "--unrolled", 4), "--unrolled 4 follows the last phase"),
        (("--end-to-end", 5, "--blocks", "mm0"), "--end-to-end needs every block"),
    ],
)
def test_phases_that_cannot_be(copy, arguments, message):
    one_line(optimize(copy, *arguments), message)
    assert not (copy / "adaround_weights").exists()
