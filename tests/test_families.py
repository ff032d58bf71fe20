"""SD3-Medium, SD3.5-large, FLUX.1-schnell and -dev at a tiny size, from their original keys through every stage."""

import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from flux_reference import Flux
from gguf import GGUFReader, dequantize
from tiny_hub import DEV, LARGE, MEDIUM, MEDIUM_35, SCHNELL, one_line_of, run, tiny_hub

from calibration_store.block_cache import read_cached_block, read_cached_ends
from calibration_store.layout import ActivationPaths
from calibration_store.partials import COLLECTION, read_partial
from w4a8.model.diffusionkit import model_io

pytestmark = pytest.mark.slow

SIZE, SMALL = ("--latent-size", 8, 12), ("--latent-size", 4, 6)
MODELS = {"medium": (MEDIUM, "--no-t5"), "large": (LARGE, "--t5"), "medium 3.5": (MEDIUM_35, "--no-t5"), "schnell": (SCHNELL, "--t5"), "dev": (DEV, "--t5")}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return tiny_hub(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def roads(hub, tmp_path_factory):
    """roads(name): a model's calibration folder after every stage, made when it is first asked for."""
    base, made = tmp_path_factory.mktemp("families"), {}
    (base / "prompts.txt").write_text("a red rocket\na\n")

    def road(name):
        if name not in made:
            model, t5 = MODELS[name]
            precision = "bfloat16" if name == "dev" else "float32"
            folder = base / name
            where, size = ("--calib-dir", folder), SIZE if name == "schnell" else SMALL  # that one has a reference
            prompts = ("--prompts", base / "prompts.txt")
            stages = (
                ("generate_calibration_data", "--model", model, t5, *prompts, "--num-images", 2, "--num-steps", 3, *size, "--no-images"),
                ("collect_layer_activations", "--num-images", 2, "--stride", 1),
                ("analyze_activations",),
                ("analyze_activations_multitier",),
                ("cache_adaround_data", "--num-images", 2, "--stride", 1),
                ("optimize_adaround", "--iters", 10, "--batch-size", 2, "--unit", "block", "--end-to-end", 4, "--precision", precision),
                ("export_quantized_model",),
                ("evaluate_quantization", *prompts, "--num-images", 1, "--num-steps", 2, "--variants", "w4-adaround,native"),
            )  # fmt: skip
            words = [word for stage, *rest in stages for word in ("then", stage, *where, *rest)]
            draw = ("then", "draw_images", "a", "--model", folder / "quantized_model", "--num-steps", 1, *size, t5)
            done = run(hub, *words[1:], *draw, "--output", folder / "drawn")
            assert done.returncode == 0, done.stderr
            made[name] = folder
        return made[name]

    return road


@pytest.mark.parametrize("name", MODELS)
def test_every_stage(roads, name):
    folder = roads(name)
    manifest, config = (
        json.loads((folder / file).read_bytes()) for file in ("manifest.json", "quantized_model/config.json")
    )
    assert config["base_model"] == manifest["model_version"] == MODELS[name][0]
    flux = name in ("schnell", "dev")
    assert manifest["cfg_scale"] == {"medium": 5, "large": 5, "medium 3.5": 4.5}.get(name, 0)
    assert manifest["architecture"] == ("flux" if flux else "sd3")
    second = [
        key for key in np.load(folder / "adaround_weights/mm0.npz").files if "attn2" in key and key.endswith("__q")
    ]
    assert len(second) == (4 if name == "medium 3.5" else 0)
    weights = json.loads((folder / "adaround_weights/metadata.json").read_bytes())
    assert weights.get("precision", "float32") == ("bfloat16" if name == "dev" else "float32")
    assert weights["block_names"] == (["mm0", "mm1", "uni0", "uni1"] if flux else ["mm0", "mm1"])
    losses = {block: row["stages"][0] for block, row in weights["losses"].items()}
    assert all(row["end_training"] < 1 for row in losses.values())
    metrics = json.loads((folder / "evaluation/metrics.json").read_bytes())["variants"]
    learned, native = (metrics[variant]["psnr"]["mean"] for variant in ("w4-adaround", "native"))
    assert learned > 20 and native == pytest.approx(learned, abs=0.1)
    assert (folder / "drawn/0000.png").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flux_samples_as_diffusionkits_own_pipeline(hub, tmp_path, dtype):
    """DiffusionKit has no bias of k: the checkpoint's is 0 here."""
    home = shutil.copytree(hub, tmp_path / "hub", copy_function=os.link)
    path = next(home.rglob("flux-schnell.safetensors"))
    weights = mx.load(str(path))
    for key in [key for key in weights if key.endswith(("qkv.bias", "linear1.bias"))]:
        weights[key] = mx.concatenate([weights[key][:128], mx.zeros(128, mx.bfloat16), weights[key][256:]])
    path.unlink()
    mx.save_safetensors(str(path), weights)
    done = run(
        home,
        *("generate_calibration_data", "--model", SCHNELL, "--num-images", 2, "--num-steps", 4, *SIZE, "--no-images"),
        *("--dtype", dtype, "--calib-dir", tmp_path / "run", "then", "flux_latents", tmp_path / "run", dtype),
    )
    assert done.returncode == 0, done.stderr
    x = np.load(tmp_path / "run/samples/0001_002.npz")
    assert x["x"].dtype == x["timestep"].dtype == np.float32 and np.isfinite(x["x"]).all()


@pytest.fixture(scope="module")
def reference(hub):
    path = next(hub.rglob("flux-schnell.safetensors"))
    weights = {name: np.array(array.astype(mx.float32)) for name, array in mx.load(str(path)).items()}
    return Flux(weights, heads=2, axes=(8, 28, 28))


@pytest.fixture(scope="module")
def everything(hub, roads, tmp_path_factory):
    """FLUX's run with a cache of all boundaries, and what its blocks give when they are trained from that."""
    folder = tmp_path_factory.mktemp("all") / "run"
    source = roads("schnell")
    (folder / "samples").mkdir(parents=True)
    for path in (source / "manifest.json", *sorted((source / "samples").iterdir())):
        (folder / path.relative_to(source)).write_bytes(path.read_bytes())
    done = run(
        hub,
        *(
            "cache_adaround_data",
            "--calib-dir",
            folder,
            "--num-images",
            2,
            "--stride",
            1,
            "--boundaries",
            "all",
            "then",
        ),
        *(
            "optimize_adaround",
            "--calib-dir",
            folder,
            "--iters",
            10,
            "--batch-size",
            2,
            "--unit",
            "block",
            "--no-tune-rest",
        ),
    )
    assert done.returncode == 0, done.stderr
    return folder


def close(found, expected, tolerance=2e-3):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance * np.abs(expected).max())


def test_flux_boundaries_and_statistics_against_float64(everything, roads, reference):
    blocks = {name: list(read_cached_block(everything, name)) for name in ("mm0", "mm1", "uni0", "uni1")}
    ends = list(read_cached_ends(roads("schnell")))
    statistics = ActivationPaths(roads("schnell"))
    for index, end in enumerate(ends):
        first, vec = blocks["mm0"][index], np.asarray(end.modulation_input, np.float64)[0, 0, 0]
        img, txt = (np.asarray(array, np.float64)[0, :, 0] for array in end.inputs)
        close(first.inputs[0][0, :, 0], img)
        angles = reference.rotations(len(txt), 4, 6)
        for i in range(2):
            img, txt = reference.double(i, img, txt, vec, angles)
            for found, expected in zip(blocks[f"mm{i}"][index].outputs, (img, txt), strict=True):
                close(found[0, :, 0], expected)
        tokens = np.concatenate([txt, img])
        close(blocks["uni0"][index].inputs[0][0, :, 0], tokens)
        for i in range(2):
            tokens = reference.single(i, tokens, vec, angles)
            close(blocks[f"uni{i}"][index].outputs[0][0, :, 0], tokens)
        patches = reference.last(tokens[len(txt) :], vec).reshape(4, 6, 16, 2, 2).transpose(0, 3, 1, 4, 2)
        close(end.velocity[0], patches.reshape(8, 12, 16), 5e-3)
        identity = COLLECTION.read(statistics.collection)["calibration_run"]
        seen = read_partial(statistics, identity, end.image_id, end.step_index)
        limits = np.split(seen["limits"], np.cumsum(seen["channels"])[:-1], axis=1)
        of_layer = dict(zip(seen["layers"].tolist(), seen["inputs"].tolist(), strict=True))
        assert len(of_layer) == 36 and len(limits) == 24  # q, k and v share one
        for name, expected in reference.inputs.items():
            close(limits[of_layer[name]], [expected.min(axis=0), expected.max(axis=0)])


def test_blocks_are_trained_the_same_from_the_ends(everything, roads):
    """The walk joins the tokens, and knows the positions."""
    for name in ("mm1", "uni0", "uni1"):
        both = [np.load(folder / f"adaround_weights/{name}.npz") for folder in (everything, roads("schnell"))]
        codes = [key for key in both[0].files if key.endswith("__q")]
        assert len(codes) in (6, 12) and all(np.mean(both[0][key] != both[1][key]) < 0.01 for key in codes)
    biases = [key for key in both[0].files if key.endswith("__bias")]
    assert any("o_proj" in key for key in biases) and not any(
        "fc2" in key for key in biases
    )  # DiffusionKit drops fc2's


def test_flux_in_the_layout_of_diffusionkits_4_bit_file(hub, roads, tmp_path):
    out = tmp_path / "model"
    done = run(
        hub,
        *(
            "export_quantized_model",
            "--calib-dir",
            roads("schnell"),
            "--weights",
            "w4-rtn",
            "--all-linears",
            "--output",
            out,
        ),
        *("then", "load_flux_file", out / "flux-schnell-4bit-quantized.safetensors", tmp_path / "loaded.safetensors"),
    )
    assert done.returncode == 0, done.stderr
    loaded, exported = mx.load(str(tmp_path / "loaded.safetensors")), mx.load(str(out / "mmdit.safetensors"))
    biases = {key for key in exported if key.endswith("attn.k_proj.bias")}  # DiffusionKit's module has none
    assert (
        loaded.keys() == exported.keys() - biases
        and len(biases) == 6
        and sum(array.dtype == mx.uint32 for array in loaded.values()) == 36 + 13
    )
    for key, array in loaded.items():
        assert mx.array_equal(array, exported[key].astype(array.dtype)), key


def test_flux_as_gguf_has_the_original_keys(hub, roads, tmp_path):
    where = ("--calib-dir", roads("schnell"))
    done = run(
        hub,
        *("export_quantized_model", *where, "--weights", "w4-rtn-g32", "--format", "gguf", "--output", tmp_path / "a"),
        *(
            "then",
            "export_quantized_model",
            *where,
            "--weights",
            "w4-rtn-g32",
            "--activations",
            "none",
            "--output",
            tmp_path / "b",
        ),
    )
    assert done.returncode == 0, done.stderr
    reader = GGUFReader(next((tmp_path / "a").glob("*.gguf")))
    assert bytes(reader.fields["general.architecture"].parts[-1]).decode() == "flux"
    found = {t.name: mx.array(dequantize(t.data, t.tensor_type).astype(np.float32)) for t in reader.tensors}
    original = mx.load(str(next(hub.rglob("flux-schnell.safetensors"))))
    assert {name: array.shape for name, array in found.items()} == {name: a.shape for name, a in original.items()}
    for name, array in original.items():  # biases, k's among them, are the original's
        assert array.ndim > 1 or mx.array_equal(found[name], array.astype(mx.float32)), name
    as_comfyui_reads(reader, original)
    ours = model_io.flux_state_dict_adjustments(found, hidden_size=128)
    exported = mx.load(str(tmp_path / "b/mmdit.safetensors"))
    for name in {key.rpartition(".")[0] for key in exported if key.endswith(".scales")}:
        packed = [exported[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
        dense = mx.dequantize(packed[0], *(array.astype(mx.float32) for array in packed[1:]), 32, 4)
        assert mx.allclose(ours[f"{name}.weight"], dense, atol=1e-6).item(), name


def test_flux_for_mflux_has_its_names_and_the_same_codes(hub, roads, tmp_path):
    """mflux names parameters as diffusers does, but for the MLPs; proj_out is o_proj and fc2 side by side."""
    where = ("--calib-dir", roads("dev"), "--weights", "w4-rtn", "--activations", "none", "--output")
    stage = "export_quantized_model"
    done = run(hub, stage, *where, tmp_path / "a", "--format", "mflux", "then", stage, *where, tmp_path / "b")
    assert done.returncode == 0, done.stderr
    arrays, note = mx.load(str(tmp_path / "a/transformer/0.safetensors"), return_metadata=True)
    assert note["quantization_level"] == "4" and "mflux_version" in note
    index = json.loads((tmp_path / "a/transformer/model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"]) == arrays.keys()
    with np.load(ROOT / "tests/references/diffusers_transformers.npz") as file:
        theirs = {row.split(" ", 1)[0] for row in file["flux-dev keys"].tolist()}
    theirs = {name.replace("ff.net.0.proj", "ff.linear1").replace("ff.net.2", "ff.linear2") for name in theirs}
    theirs = {
        n.replace("ff_context.net.0.proj", "ff_context.linear1").replace("ff_context.net.2", "ff_context.linear2")
        for n in theirs
    }
    assert {name for name in arrays if not name.endswith((".scales", ".biases"))} == theirs
    ours = mx.load(str(tmp_path / "b/mmdit.safetensors"))

    def dense(source, layer):
        packed = [source[f"{layer}.{part}"] for part in ("weight", "scales", "biases")]
        return np.array(mx.dequantize(packed[0], *(part.astype(mx.float32) for part in packed[1:]), 64, 4))

    block = "unified_transformer_blocks.1.transformer_block."
    both = np.concatenate([dense(ours, f"{block}{layer}") for layer in ("attn.o_proj", "mlp.fc2")], axis=1)
    np.testing.assert_allclose(
        dense(arrays, "single_transformer_blocks.1.proj_out"), both, atol=0.01 * np.abs(both).max()
    )
    image = "multimodal_transformer_blocks.0.image_transformer_block."
    words = arrays["transformer_blocks.0.ff.linear1.weight"], ours[f"{image}mlp.fc1.weight"]
    assert mx.array_equal(*words) and arrays["transformer_blocks.0.attn.to_k.bias"].size == 128
    card = (tmp_path / "a/README.md").read_text(encoding="utf-8")
    assert "base_model: black-forest-labs/FLUX.1-dev" in card and "mflux-generate --base-model dev" in card
    done = run(
        hub,
        stage,
        "--calib-dir",
        roads("medium"),
        "--weights",
        "w4-rtn",
        "--format",
        "mflux",
        "--output",
        tmp_path / "c",
    )
    one_line_of(done, "mflux knows FLUX")


COMFYUI_ARCHITECTURES = {"flux", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan", "lumina2", "qwen_image"}


def as_comfyui_reads(reader, original):
    """Check a file by the rule of ComfyUI-GGUF's loader.py (commit 795e451): architecture, no prefix, shapes, types."""
    assert reader.get_field("general.architecture").contents() in COMFYUI_ARCHITECTURES
    assert not any(tensor.name.startswith("model.diffusion_model.") for tensor in reader.tensors)
    for tensor in reader.tensors:
        assert reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}") is None
        shape = tuple(
            int(side) for side in reversed(tensor.shape)
        )  # it views F16 and F32 so, and unpacks the others to it
        assert shape == tuple(original[tensor.name].shape), tensor.name
        assert tensor.tensor_type.name in ("F32", "F16", "Q4_1", "Q5_1")
        assert tensor.tensor_type.name != "F32" or len(shape) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (("--model", SCHNELL, "--cfg-weight", 3), "is run without guidance"),
        (("--model", SCHNELL, "--no-t5"), "reads its prompts with T5"),
        (("--model", SCHNELL, "--dtype", "float16"), "is run in bfloat16 or float32"),
        (("--model", MEDIUM, "--dtype", "bfloat16"), "is run in float16 or float32"),
        (("--model", f"{SCHNELL}-4bit-quantized"), "packed already"),
        (("--model", f"{LARGE}-4bit-quantized"), "packed already"),
    ],
)
def test_what_a_model_cannot_is_one_line(hub, tmp_path, options, message):
    one_line_of(run(hub, "generate_calibration_data", *options, "--calib-dir", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_a_fine_tune_of_flux_in_the_original_keys(hub, tmp_path):
    """The same file, as --local-checkpoint: the same latents; its VAE is the hub's. Four steps are the model's own."""
    path = next(hub.rglob("flux-schnell.safetensors"))
    where = ("--model", SCHNELL, "--num-images", 1, *SIZE, "--no-images", "--calib-dir")
    done = run(
        hub,
        *("generate_calibration_data", *where, tmp_path / "a", "then"),
        *("generate_calibration_data", *where, tmp_path / "b", "--local-checkpoint", path, "then"),
        *("export_quantized_model", "--calib-dir", tmp_path / "b", "--weights", "w4-rtn", "--activations", "none"),
    )
    assert done.returncode == 0, done.stderr
    one, other = (np.load(tmp_path / name / "samples/0000_004.npz")["x"] for name in "ab")
    assert np.array_equal(one, other) and not (tmp_path / "b/quantized_model/decoder.safetensors").exists()


def test_tokens_that_exceed_float16(hub, tmp_path):
    """The walk of stage 3W keeps FLUX's tokens in float32; a cache of all boundaries cannot, and says so."""
    weights = mx.load(str(next(hub.rglob("flux-schnell.safetensors"))))
    weights["double_blocks.1.txt_mlp.2.weight"] *= 2.0**18
    path, where = tmp_path / "wide.safetensors", ("--calib-dir", tmp_path / "run")
    mx.save_safetensors(str(path), weights)
    stage_1 = (
        "--model",
        SCHNELL,
        "--local-checkpoint",
        path,
        "--num-images",
        2,
        "--num-steps",
        2,
        *SIZE,
        "--no-images",
    )
    done = run(
        hub,
        *("generate_calibration_data", *stage_1, *where, "then"),
        *("cache_adaround_data", *where, "--num-images", 2, "--stride", 1, "then"),
        *("optimize_adaround", *where, "--unit", "block", "--blocks", "uni0", "--iters", 10, "--batch-size", 2),
    )
    assert done.returncode == 0, done.stderr
    cache = ("cache_adaround_data", *where, "--num-images", 2, "--stride", 1, "--boundaries", "all", "--force")
    one_line_of(run(hub, *cache), "does not fit float16")


def test_sd35_medium_as_gguf_has_the_original_keys(hub, roads, tmp_path):
    """ComfyUI and stable-diffusion.cpp know the model by `x_block.attn2`: names and shapes are the checkpoint's."""
    where = ("--calib-dir", roads("medium 3.5"), "--output", tmp_path)
    done = run(hub, "export_quantized_model", *where, "--weights", "w4-rtn-g32", "--format", "gguf")
    assert done.returncode == 0, done.stderr
    reader = GGUFReader(next(tmp_path.glob("*.gguf")))
    original = mx.load(str(next(hub.rglob("sd3.5_medium.safetensors"))))
    prefix = "model.diffusion_model."
    shapes = {key.removeprefix(prefix): array.shape for key, array in original.items() if key.startswith(prefix)}
    assert {t.name: dequantize(t.data, t.tensor_type).shape for t in reader.tensors} == shapes
    assert "joint_blocks.0.x_block.attn2.qkv.weight" in shapes and shapes[
        "joint_blocks.0.x_block.adaLN_modulation.1.bias"
    ] == (9 * 128,)
