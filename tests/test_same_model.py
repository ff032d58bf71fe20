"""Files that are made from the same model and run, and the bundled model's padding."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import folder_bytes, generate, invoke
from finished_run import SMALL, finished_run, model_copy, one_line
from safetensors.numpy import load_file, save_file

from calibration_store.errors import StoreError
from calibration_store.model_folder import weights_fingerprint
from w4a8.evaluation.variants import make_variant
from w4a8.model.catalog import describe_model
from w4a8.model.loading import load_pipeline, whole_model
from w4a8.model.prompt_encoder import encode_prompts


@pytest.fixture
def model(tmp_path_factory):
    return model_copy(tmp_path_factory.getbasetemp())


@pytest.fixture
def run(tmp_path_factory, tmp_path):
    return shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), tmp_path / "run")


# --- the bundled model --------------------------------------------------------------------------------------


def test_both_encoders_see_prompts_padded_with_the_end_token(emoji):
    """The features of a caption against CLIPTextModel fed with ids that are padded by hand."""
    text = encode_prompts(emoji, ["computer mouse"], 4.0)
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
    pipeline = load_pipeline(describe_model(str(tmp_path / "model")), whole_model("float32"))
    assert (pipeline.tokenizer_l.pad_with_eos, pipeline.tokenizer_g.pad_with_eos) == expected


# --- made from the same thing -------------------------------------------------------------------------------


def with_another_weight(model, folder):
    """Return a copy of the model in which one weight of the transformer differs."""
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
        ("optimize_adaround", ("--iters", 10, "--batch-size", 2, "--unit", "block", "--no-tune-rest")),
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


@pytest.mark.slow
def test_a_run_that_grows_leaves_finished_stages_valid(run, model):
    more = ("--num-images", 5, "--num-steps", 4)
    done = invoke("generate_calibration_data", "--model", model, *more, "--calib-dir", run, "--resume")
    assert done.exit_code == 0, done.output
    before = folder_bytes(run)
    for script, *arguments in (
        ("cache_adaround_data", "--num-images", 2, "--stride", 2, "--resume"),
        ("collect_layer_activations", "--num-images", 2, "--stride", 2, "--resume"),
        ("optimize_adaround", "--iters", 10, "--batch-size", 2, "--unit", "block", "--no-tune-rest", "--resume"),
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


@pytest.mark.slow
def test_the_negative_prompt_is_inherited_and_printed(tmp_path):
    arguments = ("--num-images", 1, "--num-steps", 1, "--no-images", "--calib-dir", tmp_path / "run")
    negative = "red " * 20 + "rocket"
    done = generate(*arguments, "--negative-prompt", negative)
    assert done.exit_code == 0 and "CLIP reads the first 16 tokens of the negative prompt." in done.stdout, done.output
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
    sigma = config["sigma_map"][key]
    for name, migrated in (("a8", True), ("w4-rtn+a8", False), ("w4-adaround+a8", False)):
        found = make_variant(name, run).rule.entries[sigma][layer]
        assert ("multipliers" in found) == migrated
        assert found["clipping_range"] == entry["clipping_range" if migrated else "unmigrated_clipping_range"]
