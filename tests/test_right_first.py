"""Files that are made from the same thing, numbers that are finite, and the bundled model's padding."""

import json
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, folder_bytes, generate, invoke, start
from PIL import Image
from safetensors.numpy import load_file, save_file

import diffusion
import evaluate_quantization
import optimize_adaround
from calibration_store import StoreError, WeightPaths, read_manifest, weights_fingerprint

SMALL = ("--num-images", 3, "--num-steps", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A copy of the bundled model in a folder of its own."""
    folder = tmp_path_factory.mktemp("models") / "emoji"
    shutil.copytree(diffusion.BUNDLED_FOLDER, folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """Every stage before evaluation, on that copy."""
    folder = tmp_path_factory.mktemp("right") / "run"
    for script, *arguments in (
        ("generate_calibration_data", "--model", model, *SMALL),
        ("cache_adaround_data", "--num-images", 2, "--stride", 2),
        ("collect_layer_activations", "--num-images", 2, "--stride", 2),
        ("analyze_activations", "--plot"),
        ("optimize_adaround", "--iters", 10, "--batch-size", 2, "--unit", "layer"),
    ):
        done = invoke(script, *arguments, "--calib-dir", folder)
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def one_line(done, message):
    assert done.exit_code != 0 and message in done.stderr and "Traceback" not in done.output, done.output
    assert done.stderr.count("Error: ") == 1


# --- the bundled model --------------------------------------------------------------------------------------


def test_both_encoders_see_prompts_padded_with_the_end_token(emoji):
    """The features of a caption against CLIPTextModel fed with ids that are padded by hand."""
    text = diffusion.encode_prompts(emoji, ["computer mouse"], 4.0)
    for tokenizer, encoder, first in ((emoji.tokenizer_l, emoji.clip_l, 0), (emoji.tokenizer_g, emoji.clip_g, 128)):
        ids = tokenizer.tokenize("computer mouse")
        padded = mx.array([ids + [tokenizer.vocab["<|endoftext|>"]] * (16 - len(ids))])
        expected = encoder(padded)
        width = expected.hidden_states[-2].shape[-1]
        found = np.array(text.tokens[0, :16, first : first + width])
        np.testing.assert_allclose(found, np.array(expected.hidden_states[-2][0]), atol=1e-5)
        pooled = np.array(text.pooled[0, first : first + width])
        np.testing.assert_allclose(pooled, np.array(expected.pooled_output[0]), atol=1e-5)


@pytest.mark.parametrize(("setting", "expected"), [(None, (True, False)), ((False, True), (False, True))])
def test_padding_follows_the_config(model, tmp_path, setting, expected):
    """Absent: as DiffusionKit pads SD3."""
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for key, value in zip(("tokenizer_l", "tokenizer_g"), setting or (None, None), strict=True):
        config.pop(key)
        config |= {} if value is None else {key: {"pad_with_eos": value}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    pipeline = diffusion.load_pipeline(diffusion.describe_model(str(tmp_path / "model")), "float32")
    assert (pipeline.tokenizer_l.pad_with_eos, pipeline.tokenizer_g.pad_with_eos) == expected


# --- made from the same thing -------------------------------------------------------------------------------


def with_another_weight(model, folder):
    """A copy of the model in which one weight of the transformer differs."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "mmdit.safetensors")
    name = sorted(weights)[100]
    weights[name] = weights[name].copy()
    weights[name].reshape(-1)[-1] += 1
    save_file(weights, folder / "mmdit.safetensors")
    return folder


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("generate_calibration_data", SMALL),
        ("cache_adaround_data", ("--num-images", 2, "--stride", 2)),
        ("collect_layer_activations", ("--num-images", 2, "--stride", 2)),
        ("optimize_adaround", ("--iters", 10, "--batch-size", 2, "--unit", "layer")),
    ],
)
def test_another_models_weights_are_refused_and_a_moved_folder_is_fine(run, model, tmp_path, script, arguments):
    before = folder_bytes(run)
    other = with_another_weight(model, tmp_path / "other")
    one_line(invoke(script, *arguments, "--model", other, "--calib-dir", run, "--resume"), "weights")
    assert folder_bytes(run) == before
    shutil.copytree(model, tmp_path / "moved")
    done = invoke(script, *arguments, "--model", tmp_path / "moved", "--calib-dir", run, "--resume")
    assert done.exit_code == 0, done.output
    after = folder_bytes(run)
    assert {name for name in before if before[name] != after[name]} <= {"manifest.json"}  # notes where the model is


def test_evaluation_refuses_what_was_made_of_another_models_weights(run, model, tmp_path):
    other = with_another_weight(model, tmp_path / "other")
    quick = ("--num-images", 1, "--num-steps", 1, "--calib-dir", run)
    for variant in ("w4-adaround", "a8"):
        one_line(invoke("evaluate_quantization", *quick, "--model", other, "--variants", variant), "other weights")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"model_version": str(other)}))
    one_line(invoke("evaluate_quantization", *quick, "--variants", "w4-rtn"), "its weights are not those that the")


def test_a_model_that_is_not_there_is_one_line_with_the_option(run, tmp_path):
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"model_version": str(tmp_path / "gone")}))
    done = invoke("collect_layer_activations", "--num-images", 2, "--stride", 2, "--calib-dir", run, "--resume")
    one_line(done, "the calibration run's model is not there; --model says where it is now")
    (run / "manifest.json").write_text(json.dumps(manifest | {"local_checkpoint": str(tmp_path / "gone.safetensors")}))
    done = invoke("cache_adaround_data", "--num-images", 2, "--stride", 2, "--calib-dir", run, "--resume")
    one_line(done, "the calibration run's local checkpoint is not there; --local-checkpoint FILE says where it is now")


def test_a_fingerprint_knows_contents_not_places(tmp_path):
    big = np.random.default_rng(0).bytes(65 * 2**20)  # above what is hashed as a whole
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x").write_bytes(big)
    first, moved = (weights_fingerprint({"mmdit": tmp_path / folder / "x"}) for folder in ("a", "b"))
    assert first == moved != weights_fingerprint({"vae": tmp_path / "a/x"})
    (tmp_path / "b/x").write_bytes(big + b"1")
    assert weights_fingerprint({"mmdit": tmp_path / "b/x"}) != first
    with pytest.raises(StoreError, match="not found"):
        weights_fingerprint({"mmdit": tmp_path / "c"})


def test_a_run_that_grows_leaves_finished_stages_valid(run, model):
    done = invoke(
        "generate_calibration_data",
        "--model",
        model,
        "--num-images",
        5,
        "--num-steps",
        4,
        "--calib-dir",
        run,
        "--resume",
    )
    assert done.exit_code == 0, done.output
    before = folder_bytes(run)
    for script, *arguments in (
        ("cache_adaround_data", "--num-images", 2, "--stride", 2, "--resume"),
        ("collect_layer_activations", "--num-images", 2, "--stride", 2, "--resume"),
        ("optimize_adaround", "--iters", 10, "--batch-size", 2, "--unit", "layer", "--resume"),
    ):
        done = invoke(script, *arguments, "--calib-dir", run)
        assert done.exit_code == 0, done.output
    assert folder_bytes(run) == before
    quick = ("--num-images", 1, "--num-steps", 1, "--variants", "w4-adaround+a8")
    assert invoke("evaluate_quantization", *quick, "--calib-dir", run).exit_code == 0
    fresh = invoke("collect_layer_activations", "--num-images", 5, "--stride", 2, "--calib-dir", run, "--force")
    assert fresh.exit_code == 0 and "images [0, 1, 2, 3, 4]" in fresh.stdout


def test_a_config_of_another_run_is_refused(run):
    path = run / "activations/quant_config.json"
    config = json.loads(path.read_text())
    assert config["metadata"]["calibration_run"] and config["metadata"]["scale_meaning"] == "range"
    config["metadata"]["calibration_run"] = "0" * 64
    path.write_text(json.dumps(config))
    quick = ("--num-images", 1, "--num-steps", 1, "--variants", "a8", "--calib-dir", run)
    one_line(invoke("evaluate_quantization", *quick), "quant_config.json: made from another calibration run")


def test_forced_statistics_leave_no_stale_config(run):
    activations = run / "activations"
    assert (activations / "scale_map.png").exists()
    (activations / "mine.png").write_bytes(b"kept")
    done = invoke("collect_layer_activations", "--num-images", 3, "--stride", 4, "--calib-dir", run, "--force")
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in activations.iterdir())
    assert names == ["layer_statistics.json", "mine.png", "partial", "timestep_stats"]


def test_the_negative_prompt_is_inherited_and_printed(tmp_path):
    arguments = ("--num-images", 1, "--num-steps", 1, "--no-images", "--calib-dir", tmp_path / "run")
    negative = "red " * 20 + "rocket"
    done = generate(*arguments, "--negative-prompt", negative)
    assert done.exit_code == 0 and "The negative prompt is longer than" in done.stdout, done.output
    quick = ("--num-images", 1, "--num-steps", 1, "--variants", "w4-rtn", "--calib-dir", tmp_path / "run")
    done = invoke("evaluate_quantization", *quick)
    assert done.exit_code == 0 and f"negative prompt {negative}" in done.stdout, done.output
    metrics = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert metrics["negative_prompt"] == negative


def test_files_of_an_older_version_are_one_line(run):
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["weights_fingerprint"], manifest["batch_option"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    for script in ("cache_adaround_data", "collect_layer_activations", "optimize_adaround", "evaluate_quantization"):
        done = invoke(script, "--calib-dir", run)
        one_line(done, "of version 0.2.0 or older")
        assert "run generate_calibration_data.py with --force" in done.stderr


def test_migration_stays_out_of_variants_whose_weights_took_no_part(run):
    path = run / "activations/quant_config.json"
    config = json.loads(path.read_text())
    layer = next(iter(config["outlier_config"]))
    key = next(iter(config["per_timestep"]))
    entry = config["per_timestep"][key][layer]
    manifest = read_manifest(run)
    sigma = config["sigma_map"][key]
    for name, migrated in (("a8", True), ("w4-rtn+a8", False), ("w4-adaround+a8", False)):
        quantization = evaluate_quantization.Quantization(evaluate_quantization.parse_variant(name), run, manifest)
        found = quantization._entries[sigma][layer]
        assert ("multipliers" in found) == migrated
        assert found["clipping_range"] == entry["clipping_range" if migrated else "unmigrated_clipping_range"]


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
    with pytest.raises(diffusion.ModelError, match="image 7: the decoded pixels hold NaN or infinity; try a smaller"):
        diffusion.decode_latents(emoji, latent, [7])


def test_a_loss_that_is_not_finite_names_unit_and_iteration_and_resume_goes_on(run, monkeypatch):
    arguments = ("--iters", 10, "--batch-size", 2, "--unit", "block", "--blocks", "mm0,mm1", "--calib-dir", run)
    whole = run.parent / "whole"
    shutil.copytree(run, whole)
    assert invoke("optimize_adaround", *arguments[:-1], whole, "--force").exit_code == 0
    gradients = optimize_adaround.Unit.gradients

    def diverging(unit, quantized, indices, iteration):
        loss, found = gradients(unit, quantized, indices, iteration)
        return (loss * mx.nan if iteration == 5 and unit.job.name == "mm1" else loss), found

    monkeypatch.setattr(optimize_adaround.Unit, "gradients", diverging)
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
        invoke("optimize_adaround", *arguments[:-1], slower, "--resume"), "--lr-alpha 0.001, not 0.004"
    )  # and only then
    done = invoke("optimize_adaround", *arguments, "--resume")
    assert done.exit_code == 0, done.output
    found, expected = (np.load(folder / "adaround_weights/mm1.npz") for folder in (run, whole))
    assert all(np.array_equal(found[key], expected[key]) for key in expected.files)


def test_equal_images_pass_the_gate_only_with_equal_latents():
    black = {"w4-rtn": {"psnr": {"mean": None}, "max_step_error": 0.3}}
    with pytest.raises(evaluate_quantization.GateFailure, match="every image equals the original's, but the latents"):
        evaluate_quantization.check_gate(black, 30, None)
    evaluate_quantization.check_gate({"fp": {"psnr": {"mean": None}, "max_step_error": 0.0}}, 30, None)


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


def test_prompts_that_are_not_used_are_counted(tmp_path, run):
    (tmp_path / "p.tsv").write_text("id\tCaption\n1\trocket\n2\tswan\n3\tgiraffe\n")
    done = generate("--prompts", tmp_path / "p.tsv", "--num-images", 2, "--num-steps", 1, "--calib-dir", tmp_path / "x")
    assert done.exit_code == 0 and "2 of 3 prompts used" in done.stdout
    quick = ("--num-steps", 1, "--variants", "w4-rtn", "--calib-dir", run, "--prompts", tmp_path / "p.tsv")
    done = invoke("evaluate_quantization", *quick)
    assert done.exit_code == 0 and "3 prompts in the file: 3 images instead of 16" in done.stdout, done.output


def test_default_variants_follow_the_bits_of_the_files(run):
    arguments = ("--iters", 10, "--batch-size", 2, "--unit", "layer", "--weight-bits", 3, "--force")
    assert invoke("optimize_adaround", *arguments, "--calib-dir", run).exit_code == 0
    assert evaluate_quantization.default_variants(run) == ["w3-rtn", "w3-adaround", "a8", "w3-adaround+a8"]


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
    arguments = ("--iters", 10, "--batch-size", 2, "--unit", "layer", "--calib-dir", run, "--resume", "--dry-run")
    assert "nothing to do: all 8 units are finished" in invoke("optimize_adaround", *arguments).stdout
    (run / "adaround_weights/mm3.npz").unlink()
    assert "to do: 1 of 8 units, 10 iterations" in invoke("optimize_adaround", *arguments).stdout


def test_ctrl_c_before_the_first_checkpoint_promises_none(run):
    arguments = (
        "--iters",
        5000,
        "--batch-size",
        2,
        "--unit",
        "block",
        "--checkpoint-seconds",
        9999,
        "--calib-dir",
        run,
        "--force",
    )

    def interruptible():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = start("optimize_adaround", *arguments, preexec_fn=interruptible)
    plan = WeightPaths(run).plan
    while not plan.exists() or json.loads(plan.read_text())["iters"] != 5000:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "nothing was finished, and no checkpoint written, yet" in stderr, stderr


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


def test_a_spread_of_the_corruption_campaign():
    command = [sys.executable, "tools/corruption_campaign.py", "--limit", "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    line = "30 damaged files: 0 tracebacks, 0 accepted, 0 kept by --resume, 0 above 60 s"
    assert done.returncode == 0 and line in done.stdout, done.stdout + done.stderr


def test_the_campaign_notices_what_is_lost(run):
    """Nothing damaged: read as good is `accepted`; a file that --resume leaves as it is, but not as it was, is `kept`."""
    from tools.campaign_cases import Target
    from tools.corruption_campaign import fate_of

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
