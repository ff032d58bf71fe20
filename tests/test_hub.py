"""The hub's loading path: DiffusionKit's own loaders over a hub cache on disk, random weights, original keys."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import invoke
from finished_run import one_line
from PIL import Image
from tiny_hub import LARGE, MEDIUM, run, tiny_hub

pytestmark = pytest.mark.slow

STAGE_1, STAGE_5 = "generate_calibration_data", "export_quantized_model"
QUICK = ("--num-images", 1, "--num-steps", 1, "--latent-size", 8, 8, "--no-t5", "--no-images")
DRAW = ("a red rocket", "--num-steps", 1, "--latent-size", 8, 8, "--no-t5", "--seed", 3)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return tiny_hub(tmp_path_factory.getbasetemp())


def test_the_default_model_from_a_hub_cache(hub, tmp_path):
    arguments = ["--no-t5", "--num-images", 1, "--num-steps", 2, "--latent-size", 8, 8, "--calib-dir", tmp_path / "a"]
    arguments += ["--prompts", tmp_path / "prompts.txt"]
    (tmp_path / "prompts.txt").write_text("a red rocket\n")
    checkpoint = next(hub.rglob("sd3_medium.safetensors"))  # the same file, as --local-checkpoint
    again = (*arguments[:-4], "--calib-dir", tmp_path / "b", *arguments[-2:], "--local-checkpoint", checkpoint)
    done = run(hub, STAGE_1, *arguments, "then", STAGE_1, *again)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "a/manifest.json").read_bytes())
    assert manifest["model_version"] == "argmaxinc/mlx-stable-diffusion-3-medium"
    assert manifest["cfg_scale"] == 5.0 and manifest["use_t5"] is False and manifest["sampler_shift"] == 3.0
    x = np.load(tmp_path / "a/samples/0000_002.npz")["x"]
    assert x.shape == (1, 8, 8, 16) and np.isfinite(x).all()
    assert (tmp_path / "a/images/0000.png").exists()

    assert np.array_equal(np.load(tmp_path / "b/samples/0000_002.npz")["x"], x)
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    done = run(
        hub,
        STAGE_1,
        *arguments[:-4],
        "--calib-dir",
        tmp_path / "c",
        *arguments[-2:],
        "--local-checkpoint",
        tmp_path / "broken.safetensors",
    )
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1 and "broken.safetensors" in done.stderr
    assert not (tmp_path / "c").exists()


def test_t5_is_on_by_default_and_missing_files_are_one_line(hub, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red rocket\n")
    arguments = ["--num-images", 2, "--num-steps", 2, "--latent-size", 8, 8, "--prompts", tmp_path / "prompts.txt"]
    without = ("then", STAGE_1, *arguments, "--calib-dir", tmp_path / "b", "--no-t5")
    done = run(hub, STAGE_1, *arguments, "--calib-dir", tmp_path / "a", *without)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a/manifest.json").read_bytes())["use_t5"] is True
    with_t5, without_t5 = (np.load(tmp_path / name / "samples/0001_002.npz")["x"] for name in "ab")
    assert np.isfinite(with_t5).all() and not np.array_equal(with_t5, without_t5)

    without_file = shutil.copytree(hub, tmp_path / "hub", symlinks=True)  # others use the shared one at the same time
    next(without_file.rglob("t5xxl.safetensors")).unlink()
    done = run(without_file, STAGE_1, *arguments, "--calib-dir", tmp_path / "c")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "HF_HOME" in done.stderr


# --- exports ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(hub, tmp_path_factory):
    """Return a folder with run/ of stage 1, its export based/ (adaLN at 8 bits), and the same with everything: complete/."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "prompts.txt").write_text("a red rocket\n")
    where = ("--calib-dir", folder / "run")
    export = ("then", STAGE_5, *where, "--weights", "w4-rtn", "--rest-bits", 8, "--output")
    done = run(
        hub,
        *(STAGE_1, "--prompts", folder / "prompts.txt", *QUICK, *where),
        *(*export, folder / "based"),
        *(*export, folder / "complete", "--complete"),
    )
    assert done.returncode == 0, done.stderr
    return folder


def files_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "README.md")


def test_an_export_names_the_hub_model_or_holds_all_of_it(exported):
    config, complete = (json.loads((exported / name / "config.json").read_bytes()) for name in ("based", "complete"))
    assert files_of(exported / "based") == ["config.json", "mmdit.safetensors"]
    assert config["base_model"] == MEDIUM and "clip_l" not in config and config["use_t5"] is False
    weights = ["clip_g.safetensors", "clip_l.safetensors", "decoder.safetensors", "mmdit.safetensors"]
    assert files_of(exported / "complete") == sorted([*weights, "config.json", "merges.txt", "vocab.json"])
    assert "base_model" not in complete and complete["quantization"] == config["quantization"]
    assert complete["mmdit"]["hidden_size"] == 128 and complete["default_cfg_weight"] == 5.0
    assert config["export"]["model_version"] == MEDIUM == complete["export"]["model_version"]
    mmdit = [(exported / name / "mmdit.safetensors").read_bytes() for name in ("based", "complete")]
    assert mmdit[0] == mmdit[1]


def test_an_export_is_a_model_beside_the_hub_or_without_it(hub, exported, tmp_path):
    """Stage 1 and draw_images.py take what the folder lacks from the hub's cache; DiffusionKit's own pipeline draws the same."""
    seed = json.loads((exported / "run/manifest.json").read_bytes())["images"][0]["seed"]
    done = run(
        hub,
        *(STAGE_1, "--model", exported / "based", "--prompts", exported / "prompts.txt", *QUICK),
        *("--calib-dir", tmp_path / "run", "then", "draw_images", *(word for word in DRAW if word != "--no-t5")),
        *("--model", exported / "based", "--output", tmp_path / "based"),  # without T5, as the calibration
        *("then", "denoise", exported / "based", "a red rocket", seed),
        tmp_path / "latents.npz",
    )
    assert done.returncode == 0, done.stderr
    original, x = (np.load(folder / "run/samples/0000_001.npz")["x"] for folder in (exported, tmp_path))
    assert np.isfinite(x).all() and not np.array_equal(original, x)
    found = np.load(tmp_path / "latents.npz")
    assert found["native"].all() and len(found["native"]) == 21
    assert np.array_equal(found["latents"][0], found["latents"][1])  # adaLN is unloaded, and read again
    np.testing.assert_allclose(found["latents"][0], x, atol=1e-4)
    done = invoke("draw_images", *DRAW, "--model", exported / "complete", "--output", tmp_path / "complete")
    assert done.exit_code == 0, done.output
    pictures = [np.asarray(Image.open(tmp_path / name / "0000.png")) for name in ("based", "complete")]
    assert pictures[0].shape == (64, 64, 3) and np.array_equal(*pictures)


@pytest.fixture(scope="module")
def with_t5(hub, tmp_path_factory):
    """Return a folder with run/ of stage 1 with T5, complete exports of it whose T5 has 16 and 8 bits, and hub/ with a picture of based/."""
    folder = tmp_path_factory.mktemp("with_t5")
    where = ("--calib-dir", folder / "run")
    export = ("then", STAGE_5, *where, "--weights", "w4-rtn", "--complete", "--output")
    begin = ("--num-images", 1, "--num-steps", 1, "--latent-size", 8, 8, "--no-images")
    done = run(
        hub,
        *(STAGE_1, *begin, *where),
        *(*export, folder / "16"),
        *(*export, folder / "8", "--text-bits", 8),
        *("then", STAGE_5, *where, "--weights", "w4-rtn", "--output", folder / "based"),
        *("then", "draw_images", *(word for word in DRAW if word != "--no-t5")),
        *("--model", folder / "based", "--output", folder / "hub"),
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_a_complete_export_brings_t5(hub, with_t5, tmp_path):
    """Without a hub it draws what the export on the hub's T5 draws; packed layers of T5 move the picture."""
    sizes = {bits: (with_t5 / f"{bits}/t5.safetensors").stat().st_size for bits in (16, 8)}
    assert sizes[16] > sizes[8] and (with_t5 / "16/spiece.model").exists()
    config = json.loads((with_t5 / "8/config.json").read_bytes())
    assert config["use_t5"] and config["t5"]["max_length"] == 512 and config["t5"]["quantization"]["bits"] == 8
    assert {"t5", "spiece.model"} <= config["export"]["files"].keys()
    draw = [word for word in DRAW if word != "--no-t5"]
    pictures = {}
    for name, model, more in (("16", "16", ()), ("8", "8", ()), ("off", "16", ("--no-t5",))):
        done = invoke("draw_images", *draw, *more, "--model", with_t5 / model, "--output", tmp_path / name)
        assert done.exit_code == 0, done.output
        pictures[name] = np.asarray(Image.open(tmp_path / name / "0000.png"), np.float64)
    assert np.array_equal(pictures["16"], np.asarray(Image.open(with_t5 / "hub/0000.png")))
    off = {name: np.abs(picture - pictures["16"]).mean() for name, picture in pictures.items()}
    assert off["8"] > 0 and off["off"] > 0


def test_damaged_files_of_t5_are_one_line(hub, with_t5, tmp_path):
    draw = [word for word in DRAW if word != "--no-t5"]

    def refused(message, change):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(with_t5 / "8", tmp_path / "model")
        change(tmp_path / "model")
        one_line(invoke("draw_images", *draw, "--model", tmp_path / "model", "--output", tmp_path / "out"), message)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.png"))

    def edited(**changes):
        def change(folder):
            config = json.loads((folder / "config.json").read_bytes())
            config["t5"] |= changes
            (folder / "config.json").write_text(json.dumps(config))

        return change

    refused("no spiece.model", lambda folder: (folder / "spiece.model").unlink())
    refused("no t5.safetensors", lambda folder: (folder / "t5.safetensors").unlink())
    refused("no SentencePiece model", lambda folder: (folder / "spiece.model").write_bytes(b"pieces"))
    refused("t5.safetensors", lambda folder: (folder / "t5.safetensors").write_bytes(b"weights"))
    refused("d_model", edited(d_model=64))
    refused("'colour'", edited(colour=1))
    refused("quantization", edited(quantization={"bits": 7, "group_size": 64}))
    refused("vocab_size", edited(vocab_size=1))
    refused("t5.safetensors", edited(num_layers=2))
    one_line(invoke("draw_images", *draw, "--text-bits", 8, "--model", with_t5 / "8", "--output", tmp_path / "out"),
             "brings its T5 at the bits that it has")  # fmt: skip
    where = ("--calib-dir", with_t5 / "run", "--weights", "w4-rtn", "--output", tmp_path / "x", "--text-bits", 8)
    done = run(hub, STAGE_5, *where)
    assert done.returncode == 2 and "no T5 is written" in done.stderr


def test_a_base_that_is_not_known_is_one_line(exported, tmp_path):
    shutil.copytree(exported / "based", tmp_path / "based")
    config = json.loads((tmp_path / "based/config.json").read_bytes())
    (tmp_path / "based/config.json").write_text(json.dumps(config | {"base_model": "somebody/else"}))
    done = invoke("draw_images", *DRAW, "--model", tmp_path / "based", "--output", tmp_path / "out")
    one_line(done, "base_model somebody/else is none of")


def test_every_linear_layer_in_the_layout_of_diffusionkits_4_bit_file(hub, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red rocket\n")
    where = ("--calib-dir", tmp_path / "run")
    name = tmp_path / "run/quantized_model/sd3.5_large_4bit_quantized.safetensors"
    done = run(
        hub,
        *(STAGE_1, "--model", LARGE, "--prompts", tmp_path / "prompts.txt", *QUICK, *where),
        *("then", STAGE_5, *where, "--weights", "w4-rtn", "--all-linears"),
        *("then", "load_hub_file", name, tmp_path / "loaded.safetensors"),
    )
    assert done.returncode == 0, done.stderr
    loaded = mx.load(str(tmp_path / "loaded.safetensors"))
    exported = mx.load(str(tmp_path / "run/quantized_model/mmdit.safetensors"))
    biases = {key for key in exported if key.endswith("attn.k_proj.bias")}  # DiffusionKit's module has none
    assert len(biases) == 4 and loaded.keys() == exported.keys() - biases and any("qk_norm" in key for key in loaded)
    assert all(mx.array_equal(loaded[key], exported[key]).item() for key in loaded)
    assert sum(array.dtype == mx.uint32 for array in loaded.values()) == 21 + 11
