"""draw_images.py: pictures that say what they are, the same bytes again, two models side by side, simulated activations."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import folder_bytes, invoke
from finished_run import finished_run, one_line
from PIL import Image

from calibration_store.layout import QuantizedModelPaths
from calibration_store.model_folder import weights_fingerprint
from calibration_store.quantized_model import read_activations
from w4a8.evaluation.metrics import image_metrics
from w4a8.evaluation.variants import make_variant
from w4a8.model.layers import model_layers
from w4a8.quantized.exported import rule_of_export

PROMPTS = ("red heart", "rocket")
QUICK = ("--num-steps", 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """Activation part -> an exported folder that has its ranges."""
    folders = {}
    for part in ("a8", "a4", "a8-learned", "a8-token", "a8-block", "none"):
        folders[part] = tmp_path_factory.mktemp("draw") / part
        done = invoke("export_quantized_model", "--calib-dir", run, "--activations", part, "--output", folders[part])
        assert done.exit_code == 0, done.output
    return folders


def draw(output, *arguments, prompts=PROMPTS):
    return invoke("draw_images", *prompts, *QUICK, "--output", output, *arguments)


def drawn(output, *arguments, prompts=PROMPTS):
    """Return the files that a drawing leaves."""
    done = draw(output, *arguments, prompts=prompts)
    assert done.exit_code == 0, done.output
    return folder_bytes(output)


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


# --- sizes, seeds, one file ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_prompt_with_each_of_the_seeds(tmp_path):
    several = drawn(tmp_path / "several", "--seeds", "7, 3", "--batch-size", 3)
    assert len(several) == 4
    for index, (prompt, seed) in enumerate((prompt, seed) for prompt in PROMPTS for seed in (7, 3)):
        drawn(tmp_path / f"{index}", "--seed", seed, prompts=(prompt,))
        with Image.open(tmp_path / f"several/{index:04d}.png") as picture:
            assert picture.text["seed"] == str(seed) and picture.text["caption"] == prompt
        found, alone = (pixels(tmp_path / folder) for folder in (f"several/{index:04d}.png", f"{index}/0000.png"))
        assert np.abs(found.astype(int) - alone).max() <= 1  # a batch sums in another order


def test_the_size_in_pixels(tmp_path):
    drawn(tmp_path / "a", "--width", 48, prompts=("rocket",))
    drawn(tmp_path / "b", "--height", 32, "--width", 48, prompts=("rocket",))
    assert pixels(tmp_path / "a/0000.png").shape == (64, 48, 3) and pixels(tmp_path / "b/0000.png").shape == (32, 48, 3)


def test_one_picture_in_a_file(tmp_path):
    path = tmp_path / "new/heart.png"
    done = draw(path, prompts=("rocket",))
    assert done.exit_code == 0 and f"wrote {path}" in done.stdout and list(path.parent.iterdir()) == [path]
    drawn(tmp_path / "folder", prompts=("rocket",))
    assert path.read_bytes() == (tmp_path / "folder/0000.png").read_bytes()
    assert draw(path, prompts=("rocket",)).exit_code == 0  # our own picture is drawn anew
    one_line(draw(path), f"--output {path}: one picture, and 2 images are drawn; give the name of a folder")
    one_line(draw(path, "--compare", "sd3-emoji", prompts=("rocket",)), "one picture, and two models draw")
    Image.new("RGB", (8, 8)).save(path)
    before = path.read_bytes()
    one_line(draw(path, prompts=("rocket",)), f"{path}: not drawn by draw_images.py")
    assert path.read_bytes() == before


def test_guidance_1_is_no_guidance(tmp_path):
    one, none = (drawn(tmp_path / value, "--cfg-weight", value) for value in ("1", "0"))
    assert one == none
    with Image.open(tmp_path / "1/0000.png") as picture:
        assert "CFG scale: 1," in picture.text["parameters"] and picture.text["cfg_weight"] == "0"


# --- one model ----------------------------------------------------------------------------------------------


def test_pictures_say_what_they_are(tmp_path):
    done = draw(tmp_path / "out", "--seed", 7, "--negative-prompt", "green")
    assert done.exit_code == 0 and f"wrote 2 images to {tmp_path / 'out'}" in done.stdout, done.output
    assert "sd3-emoji: " in done.stdout and "s an image" in done.stdout and "the transformer's file has" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000.png", "0001.png"]
    for index, prompt in enumerate(PROMPTS):
        with Image.open(tmp_path / f"out/{index:04d}.png") as picture:
            assert picture.size == (64, 64) and picture.mode == "RGB"
            text = picture.text
        assert (text["caption"], text["seed"], text["model"]) == (prompt, str(7 + index), "sd3-emoji")
        assert (text["num_steps"], text["cfg_weight"], text["negative_prompt"]) == ("2", "4", "green")
        first, negative, settings = text["parameters"].split("\n")
        assert (first, negative) == (prompt, "Negative prompt: green")
        assert settings == (f"Steps: 2, Sampler: Euler, CFG scale: 4, Seed: {7 + index}, Size: 64x64, Model: sd3-emoji")


@pytest.mark.slow
def test_the_same_again_whatever_is_drawn_beside_it(tmp_path):
    first = drawn(tmp_path / "a", "--seed", 3)
    assert drawn(tmp_path / "a", "--seed", 3) == first == drawn(tmp_path / "b", "--seed", 3)
    drawn(tmp_path / "c", "--seed", 4, prompts=PROMPTS[1:])
    assert np.array_equal(pixels(tmp_path / "a/0001.png"), pixels(tmp_path / "c/0000.png"))
    drawn(tmp_path / "d", "--seed", 4, prompts=PROMPTS[:1])
    assert not np.array_equal(pixels(tmp_path / "a/0000.png"), pixels(tmp_path / "d/0000.png"))
    drawn(tmp_path / "e", "--seed", 3, "--batch-size", 2)  # other sums in a batch: a level at most
    assert abs(pixels(tmp_path / "e/0001.png").astype(int) - pixels(tmp_path / "a/0001.png")).max() <= 1
    drawn(tmp_path / "f", "--seed", 3, "--cfg-weight", 0, prompts=PROMPTS[:1])
    assert not np.array_equal(pixels(tmp_path / "a/0000.png"), pixels(tmp_path / "f/0000.png"))


@pytest.mark.slow
def test_it_is_what_stage_1_draws(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    where = ("--prompts", tmp_path / "prompts.txt", "--calib-dir", tmp_path / "run", "--seed", 3, "--batch-size", 1)
    done = invoke("generate_calibration_data", "--model", "sd3-emoji", "--num-images", 2, *QUICK, *where)
    assert done.exit_code == 0, done.output
    images = json.loads((tmp_path / "run/manifest.json").read_bytes())["images"]
    for image in images:
        name = image["filename"].rpartition("/")[2]
        drawn(tmp_path / "out", "--seed", image["seed"], prompts=(image["prompt"],))
        assert np.array_equal(pixels(tmp_path / "out/0000.png"), pixels(tmp_path / "run/images" / name))


def test_prompts_of_a_file_come_after_the_command_lines(tmp_path):
    (tmp_path / "prompts.csv").write_text('name,prompt\na,"red heart"\nb,swan\n')
    done = draw(tmp_path / "out", "--prompts", tmp_path / "prompts.csv", "--num-steps", 1, prompts=("rocket",))
    assert done.exit_code == 0 and "wrote 3 images" in done.stdout, done.output
    prompts = []
    for index in range(3):
        with Image.open(tmp_path / f"out/{index:04d}.png") as picture:
            prompts.append(picture.text["caption"])
    assert prompts == ["rocket", "red heart", "swan"]


@pytest.mark.slow
def test_another_latent_size_and_precision(tmp_path):
    drawn(tmp_path / "out", "--latent-size", 8, 12, "--dtype", "float16", "--num-steps", 1, prompts=PROMPTS[:1])
    assert pixels(tmp_path / "out/0000.png").shape == (32, 48, 3)


# --- two models ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_models_side_by_side(exports, tmp_path):
    done = draw(tmp_path / "out", "--model", exports["none"], "--compare", "sd3-emoji")
    assert done.exit_code == 0, done.output
    names = ["0000.png", "0000_sd3-emoji.png", "0001.png", "0001_sd3-emoji.png", "compare.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    alone = tmp_path / "alone"
    drawn(alone)
    rows = []
    for index, prompt in enumerate(PROMPTS):
        own, compared = pixels(tmp_path / f"out/{index:04d}.png"), pixels(tmp_path / f"out/{index:04d}_sd3-emoji.png")
        assert np.array_equal(compared, pixels(alone / f"{index:04d}.png"))
        found = image_metrics(compared[None], own[None])
        assert 5 < found["psnr"][0] < 60
        rows.append(f"{found['psnr'][0]:6.1f} dB  SSIM {found['ssim'][0]:.4f}  {prompt}")
        error = np.square(own.astype(float) - compared).mean()
        assert found["psnr"][0] == pytest.approx(10 * np.log10(255**2 / error))
    assert all(row in done.stdout for row in rows) and "mean" in done.stdout, done.stdout
    with Image.open(tmp_path / "out/compare.png") as sheet:
        assert sheet.text["models"] == f"sd3-emoji, {exports['none']}" and sheet.size[0] > 3 * 192
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100
    again = draw(tmp_path / "out", "--model", exports["none"], "--compare", "sd3-emoji")  # its own files: replaced
    assert again.exit_code == 0, again.output


@pytest.mark.slow
def test_a_model_is_equal_to_itself(tmp_path):
    done = draw(tmp_path / "out", "--compare", "sd3-emoji", "--num-steps", 1)
    assert done.exit_code == 0 and "inf dB  SSIM 1.0000  red heart" in done.stdout, done.output


# --- activations --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(exports, tmp_path_factory):
    """Return what an export without ranges draws."""
    folder = tmp_path_factory.mktemp("plain")
    drawn(folder, "--model", exports["none"], prompts=PROMPTS[:1])
    return pixels(folder / "0000.png")


@pytest.mark.parametrize("part", ["a8", "a4", "a8-learned", "a8-token", "a8-block"])
def test_simulated_activations_change_the_image(exports, plain, tmp_path, part):
    arguments = ("--model", exports[part], "--activations")
    done = draw(tmp_path, *arguments, prompts=PROMPTS[:1])
    assert done.exit_code == 0 and f"quantized in simulation (A{part[1]})" in done.stdout, done.output
    simulated = pixels(tmp_path / "0000.png")
    assert not np.array_equal(simulated, plain)
    assert (image_metrics(simulated[None], plain[None])["psnr"][0] < 20) == (part == "a4")


def test_without_the_option_ranges_change_nothing(exports, plain, tmp_path):
    done = draw(tmp_path, "--model", exports["a4"], prompts=PROMPTS[:1])
    assert done.exit_code == 0 and "simulation" not in done.stdout, done.output
    assert np.array_equal(pixels(tmp_path / "0000.png"), plain)


@pytest.mark.parametrize("part", ["a8", "a4", "a8-learned", "a8-token", "a8-block"])
def test_an_exported_rule_quantizes_as_the_original_does(run, exports, emoji, part):
    original = make_variant(f"w4-adaround+{part}", run).rule
    paths = QuantizedModelPaths(exports[part])
    exported = rule_of_export(read_activations(paths.root), paths.activations)
    exported.check("--activations", model_layers(emoji.mmdit))
    sigmas = getattr(original, "entries", None) or [1.0]
    changed = 0
    for sigma in sigmas:
        for name in ("mm0.img.attn.q_proj", "mm2.txt.mlp.fc2", "mm5.img.mlp.fc2", "mm7.img.mlp.fc1"):
            x = np.random.default_rng(0).normal(0.2, 1, (2, 5, 1, 768 if "fc2" in name else 192)).astype(np.float32)
            expected, found = (rule.at(sigma + 0.001, 2)(name, mx.array(x)) for rule in (original, exported))
            assert mx.array_equal(found, expected), (name, sigma)
            changed += not np.array_equal(np.array(found), x)
    assert changed == 4 * len(sigmas)
    assert rule_of_export(exported.exported(), paths.activations).exported().keys() == exported.exported().keys()


# --- refused ------------------------------------------------------------------------------------------------


def test_foreign_pictures_are_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (8, 8)).save(out / "0001.png")
    before = folder_bytes(out)
    one_line(draw(out), "0001.png: not drawn by draw_images.py")
    assert folder_bytes(out) == before
    (out / "0001.png").rename(out / "photo.png")  # beside them anything may lie
    assert draw(out).exit_code == 0 and before["0001.png"] == (out / "photo.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "prompts", "message"),
    [
        ((), (), "no prompt: give some, or --prompts FILE"),
        (("--model", "no-such-model"), PROMPTS, "--model no-such-model: no such folder, and not one of sd3-emoji"),
        (("--compare", "no-such-model"), PROMPTS, "no-such-model: no such folder"),
        (("--activations",), PROMPTS, "--activations: sd3-emoji has no activations.json"),
        (("--latent-size", 7, 8), PROMPTS, "latent"),
        (("--negative-prompt", "red", "--cfg-weight", 1), PROMPTS, "--negative-prompt needs --cfg-weight above 1"),
        (("--width", 60), PROMPTS, "--width 60: sd3-emoji draws multiples of 8 pixels up to 64"),
        (("--height", 72), PROMPTS, "--height 72: sd3-emoji draws multiples of 8 pixels up to 64"),
        (("--height", 64, "--latent-size", 8, 8), PROMPTS, "--latent-size and --width or --height exclude each other"),
        (("--seeds", "1,x"), PROMPTS, "'1,x' is not a list of seeds"),
        (("--seeds", "1,,2"), PROMPTS, "'1,,2' is not a list of seeds"),
        (("--seeds", 2**64), PROMPTS, "is not a list of seeds from 0 to 2^64 - 1"),
        (("--seeds", 1, "--seed", 2), PROMPTS, "--seeds and --seed exclude each other"),
        (("--t5",), PROMPTS, "has no T5 text encoder"),
        (("--prompts", "/no/such/file"), PROMPTS, "does not exist"),
    ],
)
def test_bad_options(tmp_path, arguments, prompts, message):
    one_line(draw(tmp_path / "out", *arguments, prompts=prompts), message)
    assert not (tmp_path / "out").exists()


def test_a_model_one_folder_further_down_is_named(tmp_path):
    (tmp_path / "demo/quantized_model").mkdir(parents=True)
    done = draw(tmp_path / "out", "--model", tmp_path / "quantized_model", prompts=PROMPTS)
    one_line(done, "demo/quantized_model")


def without_a_layer(content):
    del content["layers"]["mm3.img.mlp.fc1"]


def with_one_shift(content):
    content["layers"]["mm3.img.mlp.fc2"]["shift"] = [0.5]


def with_one_shift_at_a_step(content):
    next(iter(content["per_timestep"].values()))["mm3.img.mlp.fc2"]["shift"] = [0.5]


def with_another_rule(content):
    content["rule"] = "by guess"


def without_layers(content):
    del content["layers"]


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("a8-learned", without_a_layer, "1 of 93 layers are missing"),
        ("a8-learned", with_one_shift, "mm3.img.mlp.fc2: 1 values of shift for 768 channels; run export_quantized"),
        ("a8-learned", without_layers, "activations.json: no layers"),
        ("a8", with_one_shift_at_a_step, "1 values of shift for 768 channels; run export_quantized_model.py"),
        ("a8-token", with_another_rule, "activations.json: "),
    ],
)
def test_ranges_that_do_not_fit_are_one_line(exports, tmp_path, part, damage, message):
    folder = shutil.copytree(exports[part], tmp_path / "model")
    content = json.loads((folder / "activations.json").read_bytes())
    damage(content)
    (folder / "activations.json").write_text(json.dumps(content))
    config = json.loads((folder / "config.json").read_bytes())
    config["export"]["files"]["activations.json"] = weights_fingerprint(
        {"activations.json": folder / "activations.json"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    one_line(draw(tmp_path / "out", "--model", folder, "--activations"), message)
    assert not (tmp_path / "out").exists()


def test_an_export_without_ranges_is_one_line(exports, tmp_path):
    done = draw(tmp_path / "out", "--model", exports["none"], "--activations")
    one_line(done, "has no activations.json, which stage 5 writes")


def test_seed_minus_one_draws_a_seed_and_prints_it(tmp_path):
    drawn = []
    for name in "ab":
        done = draw(tmp_path / name, "--num-steps", 1, "--seed", -1, prompts=PROMPTS[:1])
        assert done.exit_code == 0, done.output
        with Image.open(tmp_path / name / "0000.png") as picture:
            assert f"seed {picture.text['seed']}\n" in done.stdout
        drawn.append(int(picture.text["seed"]))
    assert drawn[0] != drawn[1] and min(drawn) >= 0
