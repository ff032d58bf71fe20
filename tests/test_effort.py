"""`--effort`: how much a run takes where no option says so."""

import itertools
import json
import re

import pytest
from conftest import generate, invoke

from calibration_store.choices import EFFORTS
from w4a8.effort import OF_LARGE_MODELS, OF_SMALL_MODELS, SMALL_MODEL, effort_of, late_steps, rounding_effort
from w4a8.generation_plan import with_amount, with_those_of_the_run
from w4a8.model.catalog import describe_model
from w4a8.options import GenerationOptions, RoundingOptions


@pytest.mark.parametrize("size", [1, SMALL_MODEL, SMALL_MODEL + 1, 12_000_000_000])
def test_more_effort_is_more_of_everything(size):
    found = [effort_of(name, size) for name in EFFORTS]
    assert found == list((OF_SMALL_MODELS if size <= SMALL_MODEL else OF_LARGE_MODELS).values())
    for less, more in itertools.pairwise(found):
        assert all(a <= b for a, b in zip(less, more, strict=True)) and more.iters > less.iters


def test_iterations_are_the_given_ones_the_runs_or_the_efforts():
    good = OF_SMALL_MODELS["good"]
    assert rounding_effort(RoundingOptions(), 1, None)[2:] == good[2:]
    assert rounding_effort(RoundingOptions(effort="best"), SMALL_MODEL + 1, None).iters == 900
    given = rounding_effort(RoundingOptions(effort="best", iters=90), 1, None)
    assert given[2:] == (90, 45, 0, 16)
    assert rounding_effort(RoundingOptions(iters=90, end_to_end=0, unrolled=7, batch_size=3), 1, None)[2:] == (
        90,
        0,
        7,
        3,
    )
    assert rounding_effort(RoundingOptions(batch_size=3, end_to_end=4), 1, None)[2:] == (good.iters, 4, 0, 3)
    before = {"iters": 12, "batch_size": 5}
    assert rounding_effort(RoundingOptions(), 1, before)[2:] == (12, 0, 0, 5)
    assert rounding_effort(RoundingOptions(), 1, {**before, "end_to_end": 6, "unrolled": 2})[2:] == (12, 6, 2, 5)
    assert rounding_effort(RoundingOptions(iters=20), 1, before).iters == 20  # which the plan then refuses
    named = RoundingOptions(given=frozenset(["effort"]))
    assert rounding_effort(named, 1, before) == rounding_effort(named, 1, None)  # here, too


def test_steps_are_late_ones_that_were_saved():
    assert late_steps(list(range(20)), 20, 5) == [10, 14, 16, 17, 18]
    assert late_steps(list(range(0, 20, 2)), 20, 5) == [10, 12, 14, 16, 18]
    assert late_steps(list(range(0, 28, 3)), 28, 4) == [15, 18, 21, 24]
    assert late_steps([0, 1], 2, 5) == [0, 1] and late_steps([0], 1, 8) == [0]


def test_images_are_the_given_ones_the_runs_or_the_efforts(tmp_path):
    small, large = describe_model("sd3-emoji"), describe_model("argmaxinc/mlx-stable-diffusion-3-medium")

    def amount(info, **options):
        found = with_amount(with_those_of_the_run(GenerationOptions(calib_dir=tmp_path, **options)), info)
        return found.num_images, found.batch_size

    assert amount(small) == (240, 16) and amount(large) == (512, 1)
    assert amount(small, effort="fast") == (128, 16) and amount(large, effort="fast") == (128, 1)
    assert amount(small, num_images=3) == (3, 1) and amount(small, num_images=3, batch_size=2) == (3, 2)
    done = generate("--num-images", 3, "--batch-size", 2, "--num-steps", 2, "--no-images", "--calib-dir", tmp_path)
    assert done.exit_code == 0
    assert amount(small, resume=True) == (3, 2) and amount(small, resume=True, num_images=5) == (5, 2)
    assert amount(small, resume=True, given=frozenset(["effort"])) == (240, 2)


@pytest.mark.slow
def test_resume_takes_what_is_not_given_from_the_run(tmp_path):
    of_run = ("--seed", 9, "--num-steps", 3, "--cfg-weight", 2, "--latent-size", 4, 8, "--stride", 2, "--no-images")
    more = ("--negative-prompt", "rain", "--dtype", "float16", "--batch-size", 2, "--calib-dir", tmp_path)
    assert generate("--num-images", 3, *of_run, *more).exit_code == 0
    first = json.loads((tmp_path / "manifest.json").read_bytes())
    done = invoke(
        "generate_calibration_data", "--calib-dir", tmp_path, "--latent-size", 4, 8, "--num-images", 4, "--resume"
    )
    assert done.exit_code == 0, done.output
    second = json.loads((tmp_path / "manifest.json").read_bytes())
    growing = ("num_images", "n_completed", "images", "prompts_sha256")
    assert all(second[key] == value for key, value in first.items() if key not in growing)
    assert second["images"][:3] == first["images"] and second["n_completed"] == 4
    done = invoke(
        "generate_calibration_data", "--calib-dir", tmp_path, "--latent-size", 4, 8, "--seed", 42, "--resume"
    )  # the default, but given
    assert done.exit_code and "has --seed 9, not 42" in done.stderr


@pytest.mark.slow
def test_stages_without_numbers(tmp_path, monkeypatch):
    """2W takes all images at late steps, as far as they fit, and --resume goes on with what a run began with."""
    folder = tmp_path / "run"
    assert generate("--num-images", 2, "--num-steps", 10, "--no-images", "--calib-dir", folder).exit_code == 0
    done = invoke("cache_adaround_data", "--calib-dir", folder)
    assert done.exit_code == 0 and "5 steps each, 10 samples" in done.stdout, done.output
    metadata = json.loads((folder / "adaround_cache/metadata.json").read_bytes())
    assert metadata["key_timesteps"] == [5, 6, 7, 8, 9] and "images fit" not in done.stdout
    monkeypatch.setattr("w4a8.passes.MOST_CACHED", 5 * 93_000)
    done = invoke("cache_adaround_data", "--calib-dir", folder, "--force")
    assert "5 samples" in done.stdout and "1 of 2 images fit; a larger --max-bytes allows more." in done.stdout, (
        done.output
    )
    monkeypatch.undo()
    done = invoke("cache_adaround_data", "--calib-dir", folder, "--resume")
    assert done.exit_code == 0 and "5 samples" in done.stdout
    done = invoke("optimize_adaround", "--calib-dir", folder, "--effort", "best", "--dry-run")
    assert re.search(r"700 iterations of 5 \(\d+ at once\), then 350 end to end", done.stdout), done.output
    assert "150 against finished latents" in done.stdout
    done = invoke("optimize_adaround", "--calib-dir", folder, "--effort", "best", "--no-tune-rest", "--dry-run")
    assert "700 iterations" in done.stdout and "end to end" not in done.stdout, done.output
    run = ("optimize_adaround", "--calib-dir", folder, "--no-tune-rest", "--bits", "mm[1-6].*=16")
    assert invoke(*run, "--iters", 10, "--batch-size", 2, "--end-to-end", 3).exit_code == 0
    done = invoke(*run, "--resume")
    assert done.exit_code == 0 and re.search("10 iterations of 2.*, then 3 end to end", done.stdout), done.output
