"""Numbers that are not finite, what people type, and damaged files."""

import json
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, generate, interruptible, invoke, start
from finished_run import SMALL, finished_run, model_copy, one_line
from PIL import Image
from safetensors.numpy import load_file, save_file

from calibration_store.layout import WeightPaths
from tools.campaign_cases import Target
from tools.corruption_campaign import fate_of
from w4a8.evaluation.gate import GateFailure, check_gate
from w4a8.evaluation.variants import default_variants
from w4a8.model.catalog import ModelError
from w4a8.model.sampling import decode_latents
from w4a8.rounding.units import Unit


@pytest.fixture
def model(tmp_path_factory):
    return model_copy(tmp_path_factory.getbasetemp())


@pytest.fixture
def run(tmp_path_factory, tmp_path):
    return shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), tmp_path / "run")


# --- NaN and infinity ---------------------------------------------------------------------------------------


def with_nan(model, folder, part, value=np.nan):
    shutil.copytree(model, folder)
    weights = load_file(folder / f"{part}.safetensors")
    name = sorted(weights)[3]
    weights[name] = weights[name].copy()
    weights[name].reshape(-1)[0] = value
    save_file(weights, folder / f"{part}.safetensors")
    return name


@pytest.mark.parametrize("part", ["decoder", "clip_g", "mmdit"])
def test_a_weight_file_with_nan_is_named(model, tmp_path, part):
    name = with_nan(model, tmp_path / "bad", part)
    done = invoke("generate_calibration_data", "--model", tmp_path / "bad", *SMALL, "--calib-dir", tmp_path / "run")
    one_line(done, f"{part}.safetensors: {name} holds NaN or infinity")
    assert not (tmp_path / "run").exists()


def test_pixels_that_are_not_finite_are_an_error(emoji):
    latent = mx.full((1, 16, 16, 16), 1e38)
    with pytest.raises(ModelError, match="image 7: the decoded pixels hold NaN or infinity; try a smaller"):
        decode_latents(emoji, latent, [7])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_unit_and_iteration_and_resume_goes_on(run, monkeypatch):
    arguments = ("--iters", 10, "--batch-size", 2, "--unit", "block", "--blocks", "mm0,mm1", "--calib-dir", run)
    whole = run.parent / "whole"
    shutil.copytree(run, whole)
    assert invoke("optimize_adaround", *arguments[:-1], whole, "--force").exit_code == 0
    gradients = Unit.gradients

    def diverging(unit, quantized, indices, iteration, near):
        loss, found = gradients(unit, quantized, indices, iteration, near)
        return (loss * mx.nan if iteration == 5 and unit.name == "mm1" else loss), found

    monkeypatch.setattr(Unit, "gradients", diverging)
    done = invoke("optimize_adaround", *arguments, "--force")
    one_line(done, "mm1: the loss is not finite at iteration 5; the last good state, iteration 4, is kept")
    weights = run / "adaround_weights"
    assert (weights / "mm0.npz").exists() and (weights / "checkpoint.npz").exists()
    assert not (weights / "metadata.json").exists()
    monkeypatch.undo()
    slower = run.parent / "slower"
    shutil.copytree(run, slower)
    lower = (*arguments[:-1], slower, "--resume", "--lr-alpha", 1e-3)
    assert invoke("optimize_adaround", *lower).exit_code == 0  # allowed after such a fault
    one_line(
        invoke("optimize_adaround", *arguments[:-1], slower, "--resume", "--lr-alpha", 4e-3),
        "--lr-alpha 0.001, not 0.004",
    )  # and only then
    done = invoke("optimize_adaround", *arguments, "--resume")
    assert done.exit_code == 0, done.output
    found, expected = (np.load(folder / "adaround_weights/mm1.npz") for folder in (run, whole))
    assert all(np.array_equal(found[key], expected[key]) for key in expected.files)


def test_equal_images_pass_the_gate_only_with_equal_latents():
    black = {"w4-rtn": {"psnr": {"mean": None}, "max_step_error": 0.3}}
    with pytest.raises(GateFailure, match="every image equals the original's, but the latents"):
        check_gate(black, 30, None)
    check_gate({"fp": {"psnr": {"mean": None}, "max_step_error": 0.0}}, 30, None)


# --- what people type ---------------------------------------------------------------------------------------


def test_a_users_own_picture_is_never_deleted(tmp_path):
    arguments = ("--num-images", 2, "--num-steps", 1, "--calib-dir", tmp_path / "run")
    assert generate(*arguments).exit_code == 0
    mine = tmp_path / "run/images/0007.png"
    Image.new("RGB", (64, 64), "red").save(mine)
    assert generate(*arguments, "--force").exit_code == 0
    assert Image.open(mine).getpixel((0, 0)) == (255, 0, 0)
    done = generate("--num-images", 9, "--num-steps", 1, "--calib-dir", tmp_path / "run", "--resume")
    one_line(done, "0007.png: not written by this stage; move it")
    assert Image.open(mine).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.slow
def test_prompts_that_are_not_used_are_counted(tmp_path, run):
    (tmp_path / "p.tsv").write_text("id\tCaption\n1\trocket\n2\tswan\n3\tgiraffe\n")
    done = generate("--prompts", tmp_path / "p.tsv", "--num-images", 2, "--num-steps", 1, "--calib-dir", tmp_path / "x")
    assert done.exit_code == 0 and "2 of 3 prompts used" in done.stdout
    quick = ("--num-steps", 1, "--variants", "w4-rtn", "--calib-dir", run, "--prompts", tmp_path / "p.tsv")
    done = invoke("evaluate_quantization", *quick)
    assert done.exit_code == 0 and "3 prompts in the file: 3 images instead of 16" in done.stdout, done.output


def test_default_variants_follow_the_bits_of_the_files(run):
    path = WeightPaths(run).metadata
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"weight_bits": 3}))
    assert default_variants(run) == ["w3-rtn", "w3-adaround", "a8", "w3-adaround+a8"]


@pytest.mark.slow
def test_dry_runs_and_estimates_of_a_resumed_run_speak_of_what_is_left(run):
    for script, *arguments in (
        ("cache_adaround_data", "--num-images", 2, "--stride", 2),
        ("collect_layer_activations", "--num-images", 2, "--stride", 2),
    ):
        done = invoke(script, *arguments, "--resume", "--dry-run", "--calib-dir", run)
        assert done.exit_code == 0 and "to do: 0 of 4" in done.stdout, done.output
    (run / "activations/partial/0000_000.npz").unlink()
    done = invoke(
        "collect_layer_activations", "--num-images", 2, "--stride", 2, "--resume", "--dry-run", "--calib-dir", run
    )
    assert "to do: 1 of 4" in done.stdout
    arguments = ("--iters", 10, "--batch-size", 2, "--unit", "block", "--calib-dir", run, "--resume", "--dry-run")
    assert "nothing to do: all 8 units are finished" in invoke("optimize_adaround", *arguments).stdout
    (run / "adaround_weights/mm3.npz").unlink()
    assert "to do: 1 of 8 units, 10 iterations" in invoke("optimize_adaround", *arguments).stdout


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_ctrl_c_finishes_the_iteration_and_a_second_one_ends_at_once(run, twice):
    arguments = ("--iters", 5000, "--batch-size", 2, "--unit", "block", "--checkpoint-seconds", 9999)
    process = start("optimize_adaround", *arguments, "--calib-dir", run, "--force", preexec_fn=interruptible)
    plan = WeightPaths(run).plan
    while not plan.exists() or json.loads(plan.read_text())["iters"] != 5000:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    if twice:
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    checkpoint = WeightPaths(run).root / "checkpoint.npz"
    if not twice:
        assert "finishing the iteration" in stderr and "interrupted: a checkpoint kept in" in stderr, stderr
        position = json.loads(np.load(checkpoint)["position"].tobytes())
        assert position["job"] == "mm0" and position["iteration"] >= 1
    else:  # before the first iteration began, between two, or within one
        assert "Interrupted again: ended at once." in stderr or "nothing was finished" in stderr or checkpoint.exists()


def test_an_unreadable_file_says_so(run):
    path = run / "activations/timestep_stats/step_0.npz"
    path.unlink()
    path.mkdir()
    one_line(invoke("analyze_activations", "--calib-dir", run), "step_0.npz: cannot be read (Is a directory)")
    path.rmdir()
    path.symlink_to(path.name)
    one_line(invoke("analyze_activations", "--calib-dir", run), "step_0.npz: a link that leads back to itself")
    path.unlink()
    path.symlink_to("gone")
    one_line(invoke("analyze_activations", "--calib-dir", run), "step_0.npz: a link to gone, which does not exist")


# --- damaged files ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_spread_of_the_corruption_campaign():
    command = [sys.executable, "tools/corruption_campaign.py", "--limit", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    line = "5 damaged files: 0 tracebacks, 0 accepted, 0 kept by --resume, 0 above 60 s"
    assert done.returncode == 0 and line in done.stdout, done.stdout + done.stderr


def test_the_campaign_notices_what_is_lost(run):
    """Nothing damaged: read as good is `accepted`; a file that --resume leaves, but not as it was, is `kept`."""
    reads, resumes = Target("run", "manifest.json", ("x",)), Target("run", "manifest.json", ("x",), resume=True)
    other = run.parent / "clean/run"
    shutil.copytree(run, other)
    assert fate_of(reads, run, other.parent, 0, "") == "accepted"
    assert fate_of(reads, run, other.parent, 2, "Error: x\n") == "fine"
    assert fate_of(reads, run, other.parent, 1, "Traceback (most recent call last)") == "traceback"
    assert (
        fate_of(reads, run, other.parent, -11, "") == "traceback"
        and fate_of(reads, run, other.parent, None, "") == "hung"
    )
    assert fate_of(resumes, run, other.parent, 0, "") == "fine"
    (run / "manifest.json").write_text("{}")
    assert fate_of(resumes, run, other.parent, 0, "") == "kept"
