"""evaluate_quantization.py: nothing leaks, configs are followed, metrics are right, the gate holds."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import folder_bytes, generate, invoke
from finished_run import one_line
from mlx.utils import tree_flatten
from PIL import Image

from calibration_store.layout import WeightPaths
from calibration_store.manifest import read_manifest
from calibration_store.weights import read_quantized_block
from w4a8.evaluation.drawn_images import plan_evaluation, sample
from w4a8.evaluation.gate import GateFailure, check_gate
from w4a8.evaluation.metrics import bootstrap_interval
from w4a8.evaluation.variants import default_variants, make_variant
from w4a8.model.catalog import describe_model
from w4a8.model.layers import model_layers
from w4a8.model.parts import TRANSFORMER, whole_model
from w4a8.model.prompt_encoder import PromptEncoder
from w4a8.model.runs import load_run_pipeline
from w4a8.options import EvaluationOptions
from w4a8.quantized.arithmetic import min_max_grid, nearest_codes
from w4a8.quantized.dynamic_rules import DynamicPerTensor
from w4a8.quantized.layer import deployed_grid

pytestmark = pytest.mark.slow

QUICK = ("--num-images", 2, "--num-steps", 3, "--batch-size", 2)


class NoBar:
    def update(self, count=1):
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a calibration run with everything that the variants need."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    where = ("--calib-dir", folder)
    for script, *arguments in (
        ("generate_calibration_data", "--model", "sd3-emoji", "--num-images", 3, "--num-steps", 4, "--no-images"),
        ("cache_adaround_data", "--num-images", 3, "--stride", 2),
        ("collect_layer_activations", "--num-images", 3, "--stride", 2),
        ("optimize_adaround", "--iters", 10, "--batch-size", 2, "--unit", "block", "--no-tune-rest"),
        ("analyze_activations",),
        ("analyze_activations_multitier",),
    ):
        done = invoke(script, *arguments, *where)
        assert done.exit_code == 0, done.output
    return folder


def evaluate(folder, *arguments):
    return invoke("evaluate_quantization", "--calib-dir", folder, *QUICK, *arguments)


def plan_of(manifest):
    info, fingerprint = describe_model("sd3-emoji"), manifest["weights_fingerprint"]
    options = EvaluationOptions(num_steps=3, seed=5, batch_size=2)
    return plan_evaluation(options, manifest, info, fingerprint, False, ["rocket", "swan"])


@pytest.fixture(scope="module")
def results(run):
    """Every kind of variant in one process, the original first and last."""
    variants = "fp,w4-rtn,w8-rtn-g0,w4-adaround,a8,a6-dynamic,a8-token,a8-learned,multitier,w4-adaround+a8"
    done = evaluate(run, "--variants", variants)
    assert done.exit_code == 0, done.output
    return done, json.loads((run / "evaluation/metrics.json").read_bytes())


def test_metrics_and_files(run, results):
    done, metrics = results
    assert metrics["format"] == "evaluation_v1" and len(metrics["variants"]) == 10
    assert metrics["variants"]["fp"]["equal_images"] == 2 and metrics["variants"]["fp"]["psnr"]["mean"] is None
    assert max(metrics["variants"]["fp"]["step_error"]["mean"]) == 0
    order = [metrics["variants"][name]["psnr"]["mean"] for name in ("w8-rtn-g0", "w4-rtn", "multitier")]
    assert order == sorted(order, reverse=True)
    assert "simulated" in done.stdout and "0 of the prompts were used in calibration" in done.stdout
    row = metrics["variants"]["w4-rtn"]
    low, high = row["psnr"]["interval"]
    assert low <= row["psnr"]["mean"] <= high and row["psnr"]["worst"] == row["worst_prompts"][0]["psnr"]
    assert len(row["step_error"]["mean"]) == 4 and row["step_error"]["mean"][0] == 0 < row["step_error"]["mean"][-1]
    for name in ("grid", "error_over_steps"):
        assert (run / f"evaluation/{name}.png").read_bytes().startswith(b"\x89PNG")
    for variant in ("fp", "w4-rtn"):
        (path,) = (run / "evaluation/runs").glob(f"{variant}_*.npz")
        for index, pixels in enumerate(np.load(path)["images"]):
            with Image.open(run / f"evaluation/images/{variant}/{index:04d}.png") as picture:
                assert (
                    np.array_equal(np.asarray(picture), pixels) and picture.text["caption"] == metrics["prompts"][index]
                )
    calibration = {image["prompt"] for image in read_manifest(run)["images"]}
    assert not calibration & set(metrics["prompts"])


def test_images_of_an_earlier_run_go_and_a_users_stay(run, tmp_path):
    folder = tmp_path / "out"
    evaluate = (
        "evaluate_quantization",
        "--calib-dir",
        run,
        "--output",
        folder,
        "--num-steps",
        1,
        "--variants",
        "w8-rtn",
    )
    assert invoke(*evaluate, "--num-images", 2).exit_code == 0
    assert (folder / "images/w8-rtn/0001.png").exists()
    (folder / "images/mine").mkdir()
    mine = folder / "images/mine/0000.png"
    Image.new("RGB", (2, 2)).save(mine)
    before = folder_bytes(folder)
    held = f"{folder}: holds an evaluation already, 2 images of 1 steps of w8-rtn; --output FOLDER leaves it alone"
    for more in (("--num-images", 1), ("--num-images", 1, "--resume"), ("--num-images", 2, "--seed", 3)):
        one_line(invoke(*evaluate, *more), held)
    one_line(invoke(*evaluate[:-1], "w4-rtn", "--num-images", 2), held)
    assert folder_bytes(folder) == before
    done = invoke(*evaluate, "--num-images", 1, "--force")
    assert done.exit_code == 0 and mine.exists(), done.output
    assert [path.name for path in (folder / "images/w8-rtn").iterdir()] == ["0000.png"]
    Image.new("RGB", (2, 2)).save(folder / "images/w8-rtn/0000.png")
    one_line(invoke(*evaluate, "--num-images", 1), "w8-rtn/0000.png: not written by this stage")
    (folder / "images/w8-rtn/0000.png").unlink()
    assert invoke(*evaluate, "--num-images", 2).exit_code == 0  # more images: nothing is lost


def test_metrics_against_numpy(run, results):
    arrays = {path.name.rsplit("_", 1)[0]: np.load(path) for path in (run / "evaluation/runs").glob("*.npz")}
    original, quantized = arrays["fp"], arrays["w4-rtn"]
    error = np.square(original["images"].astype(float) - quantized["images"]).reshape(2, -1).mean(axis=1)
    psnr = [image["psnr"] for image in results[1]["variants"]["w4-rtn"]["images"]]
    np.testing.assert_allclose(psnr, 10 * np.log10(255**2 / error))
    flat = original["latents"].astype(float).reshape(2, 4, -1), quantized["latents"].astype(float).reshape(2, 4, -1)
    relative = np.linalg.norm(flat[1] - flat[0], axis=2) / np.linalg.norm(flat[0], axis=2)
    np.testing.assert_allclose(results[1]["variants"]["w4-rtn"]["step_error"]["mean"], relative.mean(axis=0))


def test_original_is_bit_for_bit_the_same_after_every_variant(run, results):
    """In one process: original, all variants, original; the parameter tree keeps names, order and bytes."""
    manifest = read_manifest(run)
    pipeline = load_run_pipeline(manifest, whole_model("float32"))
    before = [(name, array, np.array(array)) for name, array in tree_flatten(pipeline.mmdit.parameters())]
    plan = plan_of(manifest)
    texts = PromptEncoder(pipeline, plan.prompts, plan.cfg_weight, plan.negative_prompt, None)
    first = sample(pipeline, texts, plan, make_variant("fp", run), NoBar())
    for name in results[1]["variants"]:
        found = sample(pipeline, texts, plan, make_variant(name, run), NoBar())
        assert np.array_equal(found["latents"], first["latents"]) == (name == "fp"), name
    last = sample(pipeline, texts, plan, make_variant("fp", run), NoBar())
    assert all(np.array_equal(first[key], last[key]) for key in first)
    after = tree_flatten(pipeline.mmdit.parameters())
    assert [name for name, *_ in before] == [name for name, _ in after]
    assert all(np.array_equal(old, np.array(new)) for (_, _, old), (_, new) in zip(before, after, strict=True))


def assert_on_grid(layer, codes, scale, zero_point):
    """Return the layer's weight is scale·(code − zero point), where the minimum −scale·zero point is rounded to float16."""
    minimum = (-scale * zero_point).astype(np.float16).astype(np.float32)
    expected = codes.astype(np.float32).reshape(*scale.shape, -1) * scale[..., None] + minimum[..., None]
    assert np.array_equal(np.array(layer.weight), expected.reshape(codes.shape))


def test_weights_are_those_of_the_files(run):
    pipeline = load_run_pipeline(read_manifest(run), {TRANSFORMER: "float32"})
    original = {name: np.array(layer.weight) for name, layer in model_layers(pipeline.mmdit).items()}
    with make_variant("w4-adaround", run).in_place(pipeline):
        for name, fields in read_quantized_block(WeightPaths(run), "mm5").items():
            assert_on_grid(model_layers(pipeline.mmdit)[name], fields["q"], fields["scale"], fields["zero_point"])
    with make_variant("w8-rtn-g0", run).in_place(pipeline):
        weight = original["mm1.img.mlp.fc2"]
        grid = deployed_grid(*min_max_grid(weight, 8, 0))
        layer = model_layers(pipeline.mmdit)["mm1.img.mlp.fc2"]
        assert_on_grid(layer, nearest_codes(weight, *grid, 8), *grid)
    layers = model_layers(pipeline.mmdit)
    assert all(np.array_equal(np.array(layers[name].weight), original[name]) for name in layers)


@pytest.mark.parametrize(
    "name, config_file", [("a8", "quant_config.json"), ("multitier", "quant_config_multitier.json")]
)
def test_config_is_followed(run, name, config_file):
    """The step of the nearest sigma, shift, multipliers, clipping range: against the README's five lines."""
    config = json.loads((run / "activations" / config_file).read_bytes())
    migrated = next(iter(config["outlier_config"]), "mm2.txt.mlp.fc2")
    rule = make_variant(name, run).rule
    for layer in {migrated, "mm2.txt.mlp.fc2", "mm0.img.attn.q_proj"}:
        for key, sigma in config["sigma_map"].items():
            entry = config["per_timestep"][key][layer]
            x = np.random.default_rng(0).normal(0, entry["scale"] / 2, (2, 5, 1, 768 if "fc2" in layer else 192))
            n = 2 ** (entry["bits"] - 1) - 1
            shift = np.array(entry.get("shift", 0.0))
            m = np.array(config["outlier_config"].get(layer, {}).get("multiplier_vector", 1))
            step = entry["clipping_range"] / n
            position = (x - shift) / m / step
            expected = m * step * np.clip(np.rint(position), -n, n) + shift
            found = np.array(rule.at(sigma + 0.01, 2)(layer, mx.array(x.astype(np.float32))))
            near_half = abs(position - np.rint(position)) > 0.499
            np.testing.assert_allclose(found[~near_half], expected[~near_half], atol=1e-5)


def test_dynamic_ranges_are_each_images_own():
    x = (
        np.random.default_rng(0).normal(size=(4, 6, 1, 8)).astype(np.float32)
    )  # rows: conditional of images 0, 1, then unconditional
    x[1], x[3] = x[1] * 10, x[3] * 10
    found = np.array(DynamicPerTensor(8).at(0.5, 2)("mm0.img.mlp.fc2", mx.array(x)))
    for image in (0, 1):
        own = x[[image, 2 + image]].astype(float)
        flat = own.reshape(-1, 8)
        shift = (flat.min(axis=0) + flat.max(axis=0)) / 2
        step = abs(own - shift).max() / 127
        expected = np.rint((own - shift) / step) * step + shift
        assert (abs(found[[image, 2 + image]] - expected) < 1e-5 * (1 + 9 * image)).mean() > 0.98  # but for ties


@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_are_quantized_each_on_its_own_grid(bits):
    """a8-token against float64: 2^bits levels from a token's minimum to its maximum, 0 among them."""
    x = np.random.default_rng(0).normal(0.3, 1, (2, 6, 1, 16)).astype(np.float32)
    x[0, 1] *= 100  # a wide token costs the others nothing
    x[0, 2], x[1, 3] = np.abs(x[0, 2]), 0
    found = np.array(make_variant(f"a{bits}-token", None).rule.at(0.5, 2)("mm0.img.mlp.fc1", mx.array(x)))
    for token, rebuilt in zip(x.reshape(-1, 16).astype(float), found.reshape(-1, 16), strict=True):
        low, high = min(token.min(), 0), max(token.max(), 0)
        step = (high - low) / (2**bits - 1) or 1
        zero_point = np.rint(-low / step)
        expected = (np.clip(np.rint(token / step) + zero_point, 0, 2**bits - 1) - zero_point) * step
        near_half = abs(token / step - np.rint(token / step)) > 0.499
        np.testing.assert_allclose(rebuilt[~near_half], expected[~near_half], atol=1e-5 * (high - low + 1))
        assert abs(rebuilt - token).max() <= step * 1.01


def test_second_run_takes_the_original_over(run, results):
    runs = run / "evaluation/runs"
    times = {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert evaluate(run, "--variants", "w4-rtn", "--force").exit_code == 0
    again = {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}
    changed = [name for name in times if times[name] != again[name]]
    assert len(changed) == 1 and changed[0].startswith("w4-rtn_")
    assert evaluate(run, "--variants", "w4-rtn,a8", "--resume").exit_code == 0
    assert again == {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}


def test_other_pictures_as_reference(run, results, tmp_path):
    """The original's own pictures give the figures that are there anyway; others give theirs; a missing one is named."""
    pictures = sorted((run / "evaluation/images/fp").glob("*.png"))
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in pictures:
        shutil.copyfile(path, folder / path.name)
    again = ("--output", tmp_path / "again", "--variants", "w4-rtn", "--reference", folder)
    done = evaluate(run, *again)
    assert done.exit_code == 0 and "w4-rtn against --reference: " in done.stdout, done.output
    row = json.loads((tmp_path / "again/metrics.json").read_bytes())["variants"]["w4-rtn"]
    for key in ("psnr", "ssim"):
        assert row["reference"][key]["mean"] == row[key]["mean"] and row["reference"][key]["worst"] == row[key]["worst"]
    with Image.open(pictures[0]) as picture:
        picture.resize((8, 8)).save(folder / pictures[1].name)
    one_line(evaluate(run, *again), f"{pictures[1].name}: 8 x 8 pixels, and the variants have 64 x 64")
    (folder / pictures[0].name).unlink()
    one_line(evaluate(run, *again), f"{pictures[0].name}: no picture that can be read")


def test_gate(run, results):
    done = evaluate(run, "--variants", "w4-rtn", "--resume", "--force", "--min-psnr", 90, "--max-step-error", 0)
    assert done.exit_code == 1
    assert "w4-rtn: mean PSNR" in done.stderr and "is below --min-psnr 90" in done.stderr
    assert "is above --max-step-error 0" in done.stderr
    assert (
        evaluate(run, "--variants", "w4-rtn", "--resume", "--force", "--min-psnr", 5, "--max-step-error", 9).exit_code
        == 0
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variants", "w4"], "--variants: 'w4' is not known; there are fp, w4-adaround"),
        (["--variants", "w4-adaronud+a8"], "is not known (did you mean w4-adaround?); there are"),
        (["--variants", "w4-rtn+w8-rtn"], "is not known"),
        (["--variants", "w4-adaround-g32"], "adaround_weights_g32/metadata.json: not found"),
        (["--variants", "w4-rtn-g100"], "is not known"),
        (["--variants", "w4-rtn-g128"], "groups of 128 do not divide the 192 inputs"),
        (["--variants", "a4-learned"], "holds 8 bits"),
        (["--variants", "w3-adaround"], "holds 4 bits"),
        (["--num-images", 9999], "--num-images 9999: there are"),
    ],
)
def test_bad_options(run, arguments, message):
    done = evaluate(run, *arguments)
    assert done.exit_code == 2 and message in done.stderr and done.stderr.strip().count("\n") <= 2, done.output


def test_a_partial_run_is_not_scored_as_the_whole_model(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    arguments = ("--iters", 10, "--batch-size", 2, "--unit", "block", "--blocks", "mm0", "--force")
    assert invoke("optimize_adaround", "--calib-dir", tmp_path / "run", *arguments).exit_code == 0
    for variant in ("w4-adaround", "a8-learned"):
        done = evaluate(tmp_path / "run", "--variants", variant)
        assert done.exit_code == 2 and f"{variant}: 81 of 93 layers are missing" in done.stderr, done.output
    metadata = WeightPaths(tmp_path / "run").metadata
    noted = json.loads(metadata.read_text())
    metadata.write_text(json.dumps(noted | {"calibration_run": "0" * 64}))
    done = evaluate(tmp_path / "run", "--variants", "w4-adaround")
    assert done.exit_code == 2 and "made from another calibration run" in done.stderr


def test_config_of_another_tool(run, tmp_path):
    """Bare v4: no clipping_range, no outlier_config, a range of 0: clipped at scale, shifted where it says so."""
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/activations/quant_config.json"
    config = json.loads(path.read_bytes())
    for layers in config["per_timestep"].values():
        for entry in layers.values():
            del entry["clipping_range"]
    next(iter(config["per_timestep"].values()))["mm0.img.attn.o_proj"]["scale"] = 0
    del config["outlier_config"], config["metadata"]
    path.write_text(json.dumps(config))
    done = evaluate(tmp_path / "run", "--variants", "a8")
    assert done.exit_code == 2 and "say --scale-is range or --scale-is step" in done.stderr
    assert evaluate(tmp_path / "run", "--variants", "a8", "--force", "--scale-is", "range").exit_code == 0
    as_range = json.loads((tmp_path / "run/evaluation/metrics.json").read_bytes())["variants"]["a8"]["psnr"]
    for layers in config["per_timestep"].values():
        for entry in layers.values():
            entry |= {key: entry[key] / 127 for key in ("scale", "shifted_scale") if key in entry}
    path.write_text(json.dumps(config))
    assert evaluate(tmp_path / "run", "--variants", "a8", "--force", "--scale-is", "step").exit_code == 0
    as_step = json.loads((tmp_path / "run/evaluation/metrics.json").read_bytes())["variants"]["a8"]["psnr"]
    assert as_step["mean"] == pytest.approx(as_range["mean"], abs=0.5)
    assert evaluate(tmp_path / "run", "--variants", "a8", "--force", "--scale-is", "range").exit_code == 0
    misread = json.loads((tmp_path / "run/evaluation/metrics.json").read_bytes())["variants"]["a8"]["psnr"]
    assert misread["mean"] < as_range["mean"] - 10
    del next(iter(config["per_timestep"].values()))["mm0.img.attn.o_proj"]
    path.write_text(json.dumps(config))
    done = evaluate(tmp_path / "run", "--variants", "a8", "--force", "--scale-is", "range")
    assert done.exit_code == 2 and "a8: 1 of 93 layers are missing (sigma " in done.stderr
    del config["sigma_map"]
    path.write_text(json.dumps(config))
    done = evaluate(tmp_path / "run", "--variants", "a8")
    assert done.exit_code == 2 and "Object missing required field `sigma_map`" in done.stderr


@pytest.mark.parametrize(
    "psnr, error, passes",
    [(None, 0.0, True), (31.0, 0.1, True), (29.0, 0.1, False), (31.0, None, False), (float("nan"), 0.1, False)],
)
def test_gate_holds_for_infinite_and_broken_figures(psnr, error, passes):
    results = {"w4-rtn": {"psnr": {"mean": psnr}, "max_step_error": error}}
    if passes:
        check_gate(results, 30, 0.2)
    else:
        with pytest.raises(GateFailure):
            check_gate(results, 30, 0.2)


def test_missing_files_are_named(run, tmp_path):
    shutil.copy(run / "manifest.json", tmp_path)
    for variant, script in (
        ("w4-adaround", "optimize_adaround.py"),
        ("a8", "analyze_activations.py"),
        ("multitier", "analyze_activations_multitier.py"),
    ):
        done = evaluate(tmp_path, "--variants", variant)
        assert done.exit_code == 2 and script in done.stderr and "not found" in done.stderr
    assert not (tmp_path / "evaluation").exists()


def test_prompts_of_a_file_and_their_overlap(run, tmp_path):
    used = read_manifest(run)["images"][0]["prompt"]
    (tmp_path / "prompts.txt").write_text(f"{used}\nrocket\n")
    done = evaluate(run, "--variants", "w8-rtn", "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "out")
    assert done.exit_code == 0 and "1 of the prompts were used in calibration" in done.stdout
    assert json.loads((tmp_path / "out/metrics.json").read_bytes())["overlap_with_calibration"] == 1


def test_bootstrap_interval_covers_the_mean():
    values = np.random.default_rng(0).normal(30, 4, 64)
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * 4 / 8, rel=0.25) and low < values.mean() < high


def test_without_files_there_is_round_to_nearest(tmp_path):
    assert generate("--num-images", 1, "--num-steps", 1, "--no-images", "--calib-dir", tmp_path / "x").exit_code == 0
    assert default_variants(tmp_path / "x") == ["w4-rtn"]
