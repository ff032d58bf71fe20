"""LoRAs: every layout gives the sum that its definition says, in float64; stages see the model with it."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import generate, invoke
from finished_run import one_line
from safetensors.numpy import load_file, save_file
from tiny_hub import DEV, LARGE, MEDIUM, SCHNELL, run, tiny_hub

from calibration_store.errors import UserError
from calibration_store.layout import EvaluationPaths
from w4a8.cli.options import Lora
from w4a8.model.catalog import BUNDLED_FOLDER, describe_model, model_fingerprint
from w4a8.model.families import FAMILIES
from w4a8.model.lora import with_loras

SD3, FLUX = FAMILIES["sd3-medium"], FAMILIES["flux.1"]

pytestmark = pytest.mark.slow

HIDDEN, RANK = 8, 2
MM, UNI = "multimodal_transformer_blocks", "unified_transformer_blocks"


def linear(rng, out, width):
    return mx.array(rng.standard_normal((out, width)).astype(np.float16))


@pytest.fixture
def sd3():
    """Weights of a transformer with two blocks, under DiffusionKit's names, float16."""
    rng, weights = np.random.default_rng(0), {}
    for block in range(2):
        for stream in ("image", "text"):
            name = f"{MM}.{block}.{stream}_transformer_block"
            last = block == 1 and stream == "text"
            shapes = {f"attn.{part}_proj": (HIDDEN, HIDDEN) for part in ("qkv" if last else "qkvo")}
            shapes |= {} if last else {"mlp.fc1": (4 * HIDDEN, HIDDEN), "mlp.fc2": (HIDDEN, 4 * HIDDEN)}
            shapes["adaLN_modulation.layers.1"] = ((2 if last else 6) * HIDDEN, HIDDEN)
            weights |= {f"{name}.{part}.weight": linear(rng, *shape) for part, shape in shapes.items()}
    weights["context_embedder.weight"] = linear(rng, HIDDEN, 12)
    weights["final_layer.linear.weight"] = linear(rng, 64, HIDDEN)
    weights["final_layer.adaLN_modulation.layers.1.weight"] = linear(rng, 2 * HIDDEN, HIDDEN)
    weights["x_pos_embedder.pos_embed.weight"] = linear(rng, 16, HIDDEN)
    return weights


@pytest.fixture
def flux(sd3):
    """With unified blocks, and an embedder of patches that is a convolution of one pixel."""
    rng = np.random.default_rng(1)
    weights = {name: array for name, array in sd3.items() if "pos_embed" not in name}
    text = f"{MM}.1.text_transformer_block"
    weights |= {f"{text}.attn.o_proj.weight": linear(rng, HIDDEN, HIDDEN)}
    weights |= {f"{text}.adaLN_modulation.layers.1.weight": linear(rng, 6 * HIDDEN, HIDDEN)}
    name = f"{UNI}.0.transformer_block"
    shapes = {f"attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"}
    shapes |= {"mlp.fc1": (4 * HIDDEN, HIDDEN), "mlp.fc2": (HIDDEN, 4 * HIDDEN)}
    shapes["adaLN_modulation.layers.1"] = (3 * HIDDEN, HIDDEN)
    weights |= {f"{name}.{part}.weight": linear(rng, *shape) for part, shape in shapes.items()}
    weights["x_embedder.proj.weight"] = linear(rng, HIDDEN, 64).reshape(HIDDEN, 1, 1, 64)
    return weights


IMAGE, TEXT, LAST = (
    f"{MM}.0.image_transformer_block",
    f"{MM}.0.text_transformer_block",
    f"{MM}.1.text_transformer_block",
)
SINGLE = f"{UNI}.0.transformer_block"
H = HIDDEN
# family, module of a LoRA, its (rows, columns), and where its product goes: weight -> (first row, first column)
CASES = [
    (SD3, "joint_blocks.0.x_block.attn.qkv", (3 * H, H), {f"{IMAGE}.attn.{p}_proj": (i * H, 0) for i, p in enumerate("qkv")}),
    (SD3, "joint_blocks.0.context_block.mlp.fc2", (H, 4 * H), {f"{TEXT}.mlp.fc2": (0, 0)}),
    (SD3, "joint_blocks.1.context_block.adaLN_modulation.1", (2 * H, H), {f"{LAST}.adaLN_modulation.layers.1": (0, 0)}),
    (SD3, "transformer_blocks.0.attn.to_k", (H, H), {f"{IMAGE}.attn.k_proj": (0, 0)}),
    (SD3, "transformer_blocks.0.attn.add_v_proj", (H, H), {f"{TEXT}.attn.v_proj": (0, 0)}),
    (SD3, "transformer_blocks.0.attn.to_out.0", (H, H), {f"{IMAGE}.attn.o_proj": (0, 0)}),
    (SD3, "transformer_blocks.0.attn.to_add_out", (H, H), {f"{TEXT}.attn.o_proj": (0, 0)}),
    (SD3, "transformer_blocks.0.ff_context.net.0.proj", (4 * H, H), {f"{TEXT}.mlp.fc1": (0, 0)}),
    (SD3, "transformer_blocks.0.norm1.linear", (6 * H, H), {f"{IMAGE}.adaLN_modulation.layers.1": (0, 0)}),
    (SD3, "proj_out", (64, H), {"final_layer.linear": (0, 0)}),
    (FLUX, "double_blocks.0.txt_attn.qkv", (3 * H, H), {f"{TEXT}.attn.{p}_proj": (i * H, 0) for i, p in enumerate("qkv")}),
    (FLUX, "double_blocks.0.img_mlp.0", (4 * H, H), {f"{IMAGE}.mlp.fc1": (0, 0)}),
    (FLUX, "double_blocks.1.txt_mod.lin", (6 * H, H), {f"{LAST}.adaLN_modulation.layers.1": (0, 0)}),
    (FLUX, "single_blocks.0.linear1", (7 * H, H),
     {f"{SINGLE}.attn.{p}_proj": (i * H, 0) for i, p in enumerate("qkv")} | {f"{SINGLE}.mlp.fc1": (3 * H, 0)}),
    (FLUX, "single_blocks.0.linear2", (H, 5 * H), {f"{SINGLE}.attn.o_proj": (0, 0), f"{SINGLE}.mlp.fc2": (0, H)}),
    (FLUX, "single_blocks.0.modulation.lin", (3 * H, H), {f"{SINGLE}.adaLN_modulation.layers.1": (0, 0)}),
    (FLUX, "single_transformer_blocks.0.attn.to_v", (H, H), {f"{SINGLE}.attn.v_proj": (0, 0)}),
    (FLUX, "single_transformer_blocks.0.proj_mlp", (4 * H, H), {f"{SINGLE}.mlp.fc1": (0, 0)}),
    (FLUX, "single_transformer_blocks.0.proj_out", (H, 5 * H), {f"{SINGLE}.attn.o_proj": (0, 0), f"{SINGLE}.mlp.fc2": (0, H)}),
    (FLUX, "single_transformer_blocks.0.norm.linear", (3 * H, H), {f"{SINGLE}.adaLN_modulation.layers.1": (0, 0)}),
    (FLUX, "img_in", (H, 64), {"x_embedder.proj": (0, 0)}),
    (FLUX, "txt_in", (H, 12), {"context_embedder": (0, 0)}),
]  # fmt: skip
LAYOUTS = {
    "PEFT": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight"),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
}


def lora_file(path, module, rows, columns, layout, alpha=None, seed=2):
    rng, named = np.random.default_rng(seed), module.replace(".", "_") if layout == "kohya" else module
    down, up = rng.standard_normal((RANK, columns)), rng.standard_normal((rows, RANK))
    keys = [key.format(named) for key in LAYOUTS[layout]]
    arrays = {keys[0]: down.astype(np.float16), keys[1]: up.astype(np.float16)}
    if alpha is not None:
        arrays[keys[0].replace("lora_down.weight", "alpha")] = np.float32(alpha)
    save_file({key: np.asarray(array) for key, array in arrays.items()}, path)
    return up.astype(np.float16).astype(np.float64) @ down.astype(np.float16).astype(np.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1])
def test_every_module_of_every_layout_against_float64(sd3, flux, tmp_path, layout, case):
    family, module, (rows, columns), where = case
    weights = sd3 if family is SD3 else flux
    alpha = 4.0 if layout == "kohya" else None
    change = (
        0.5 * (alpha or RANK) / RANK * lora_file(tmp_path / "lora.safetensors", module, rows, columns, layout, alpha)
    )
    found = with_loras(weights, family, [Lora(tmp_path / "lora.safetensors", 0.5)])
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        place = where.get(name.removesuffix(".weight"))
        if place is None:
            assert found[name] is array
            continue
        (row, column), flat = place, np.array(array, np.float64).reshape(len(array), -1)
        part = change[row : row + flat.shape[0], column : column + flat.shape[1]]
        np.testing.assert_allclose(np.array(found[name]).reshape(flat.shape), flat + part, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module, name", [
    ("norm_out.linear", "final_layer.adaLN_modulation.layers.1"), ("transformer_blocks.1.norm1_context.linear", f"{LAST}.adaLN_modulation.layers.1"),
])  # fmt: skip
def test_diffusers_keeps_scale_before_shift(sd3, tmp_path, module, name):
    change = lora_file(tmp_path / "lora.safetensors", module, 2 * H, H, "diffusers")
    found = with_loras(sd3, SD3, [Lora(tmp_path / "lora.safetensors")])[f"{name}.weight"]
    expected = np.array(sd3[f"{name}.weight"], np.float64) + np.concatenate([change[H:], change[:H]])
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config, factor", [
    ({"transformer.lora_alpha": 8, "transformer.r": RANK}, 8 / RANK),
    ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, 8 / RANK**0.5),
    ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"transformer_blocks.0.attn.to_q": 2}}, 2 / RANK),
    ({"transformer.lora_alpha": None}, 1.0),
])  # fmt: skip
def test_the_alpha_that_diffusers_notes(sd3, tmp_path, config, factor):
    path, name = tmp_path / "lora.safetensors", f"{IMAGE}.attn.q_proj.weight"
    change = lora_file(path, "transformer_blocks.0.attn.to_q", H, H, "diffusers")
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(config)})
    expected = np.array(sd3[name], np.float64) + factor * change
    np.testing.assert_allclose(np.array(with_loras(sd3, SD3, [Lora(path)])[name]), expected, rtol=1e-5, atol=1e-5)
    save_file(load_file(path), path, {"lora_adapter_metadata": "[]"})
    with pytest.raises(UserError, match="is not the config of an adapter"):
        with_loras(sd3, SD3, [Lora(path)])


def test_loras_add_up_and_scale_0_changes_nothing(sd3, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    module = "transformer_blocks.0.attn.to_q"
    changes = [lora_file(path, module, H, H, "diffusers", seed=seed) for seed, path in enumerate(files)]
    name = f"{IMAGE}.attn.q_proj.weight"
    both = with_loras(sd3, SD3, [Lora(files[0], 2.0), Lora(files[1], -1.0)])[name]
    expected = np.array(sd3[name], np.float64) + 2 * changes[0] - changes[1]
    np.testing.assert_allclose(np.array(both), expected, rtol=1e-5, atol=1e-5)
    assert both.dtype == mx.float32
    assert all(array is sd3[key] for key, array in with_loras(sd3, SD3, [Lora(files[0], 0.0)]).items())


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"transformer.transformer_blocks.0.attn.to_q.dora_scale": (8,)}, r"dora_scale"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (2, 8)}, "has no A and B"),
        ({f"transformer.transformer_blocks.0.attn.to_q.{p}.weight": (16, 16) for p in ("lora_A", "lora_B")}, "made for another model"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (2, 8),
          "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": (8, 2)}, "2 of its keys"),
    ],
)  # fmt: skip
def test_what_is_no_lora_of_this_model_is_one_line(sd3, tmp_path, arrays, message):
    save_file({key: np.zeros(shape, np.float32) for key, shape in arrays.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        with_loras(sd3, SD3, [Lora(tmp_path / "lora.safetensors")])
    assert "\n" not in str(caught.value)


TO_K = "transformer.transformer_blocks.0.attn.to_k"
A, B = np.ones((2, HIDDEN), np.float32), np.ones((HIDDEN, 2), np.float32)


def with_first(array, value):
    changed = array.copy()
    changed.reshape(-1)[0] = value
    return changed


@pytest.mark.parametrize(
    ("down", "up", "alpha", "message"),
    [
        (A[:0], B[:, :0], None, "has rank 0"),
        (with_first(A, np.nan), B, None, "changes weights by up to nan: it holds NaN, infinity, or is damaged"),
        (A, with_first(B, -np.inf), None, "changes weights by up to .*: it holds NaN, infinity"),
        (A, np.full_like(B, 1e30), None, r"changes weights by up to 2e\+30"),
        (A, B, np.float32(np.nan), "has an alpha of nan"),
        (A, B, np.float32(1e38), r"has an alpha of 1e\+38; it must be a number of at most 1e\+06"),
        (A, B, np.float32([1, 2]), "alpha has 2 values, not one"),
    ],
)
def test_a_lora_of_no_use_is_named_with_its_key(sd3, tmp_path, down, up, alpha, message):
    arrays = {f"{TO_K}.lora_A.weight": down, f"{TO_K}.lora_B.weight": up}
    path = tmp_path / "lora.safetensors"
    save_file(arrays | ({} if alpha is None else {f"{TO_K}.alpha": np.asarray(alpha)}), path)
    with pytest.raises(UserError, match=f"--lora {path}: {TO_K}.*{message}") as caught:
        with_loras(sd3, SD3, [Lora(path)])
    assert "\n" not in str(caught.value)


# --- through the stages -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji_lora(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "emoji.safetensors"
    lora_file(path, "transformer_blocks.3.attn.to_q", 192, 192, "diffusers")
    return path


SMALL = ("--model", "sd3-emoji", "--num-images", 2, "--num-steps", 2, "--no-images")


def test_a_run_is_of_the_model_with_its_loras(emoji_lora, tmp_path):
    folder, plain = tmp_path / "run", tmp_path / "plain"
    for where, *lora in (
        (folder, "--lora", f"{emoji_lora}:0.1"),
        (plain,),
        (tmp_path / "zero", "--lora", f"{emoji_lora}:0"),
    ):
        done = invoke("generate_calibration_data", *SMALL, *lora, "--calib-dir", where)
        assert done.exit_code == 0, done.output
    samples = [np.load(where / "samples/0000_002.npz")["x"].tobytes() for where in (folder, plain, tmp_path / "zero")]
    assert samples[0] != samples[1] and samples[1] == samples[2]
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["loras"] == [{"file": str(emoji_lora), "scale": 0.1}]
    fingerprints = [
        model_fingerprint(describe_model("sd3-emoji", loras), False) for loras in ([], [Lora(emoji_lora, 0.1)])
    ]
    assert len({*fingerprints, model_fingerprint(describe_model("sd3-emoji", [Lora(emoji_lora, 0.2)]), False)}) == 3
    assert manifest["weights_fingerprint"] == fingerprints[1]
    for stage, *options in (
        ("cache_adaround_data", "--num-images", 2, "--stride", 1, "--boundaries", "all"),
        ("optimize_adaround", "--iters", 10, "--batch-size", 2, "--unit", "block", "--blocks", "mm3"),
        ("export_quantized_model", "--weights", "w8-rtn", "--rest-bits", 8),
        ("evaluate_quantization", "--num-images", 1, "--num-steps", 2, "--variants", "w8-rtn,native"),
    ):
        done = invoke(stage, *options, "--calib-dir", folder)
        assert done.exit_code == 0, done.output
    metrics = json.loads((folder / "evaluation/metrics.json").read_bytes())["variants"]
    assert metrics["w8-rtn"]["psnr"]["mean"] > 40 and metrics["native"]["psnr"]["mean"] > 38


def test_a_lora_that_moved_or_changed_is_one_line(emoji_lora, tmp_path):
    mine, folder = tmp_path / "mine.safetensors", tmp_path / "run"
    shutil.copy(emoji_lora, mine)
    done = invoke("generate_calibration_data", *SMALL, "--lora", f"{mine}:0.1", "--calib-dir", folder)
    assert done.exit_code == 0, done.output
    cache = ("cache_adaround_data", "--num-images", 1, "--calib-dir", folder)
    resumed = invoke("generate_calibration_data", *SMALL, "--resume", "--calib-dir", folder)
    one_line(resumed, f"has --model sd3-emoji --lora {mine}:0.1, and the weights of --model sd3-emoji are not its")
    moved = mine.rename(tmp_path / "moved.safetensors")
    one_line(invoke(*cache), f"{mine}: the calibration run's LoRA is not there; --lora FILE:0.1")
    one_line(invoke(*cache, "--lora", moved), "its weights are not those that the calibration run was made with")
    done = invoke(*cache, "--lora", f"{moved}:0.1")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "given, message", [("none.safetensors", "no such file"), ("{}:x", "no scale"), ("{}:1e9", "from -1000 to 1000")]
)
def test_a_wrong_option_is_one_line(emoji_lora, tmp_path, given, message):
    done = invoke(
        "draw_images", "x", "--model", "sd3-emoji", "--lora", given.format(emoji_lora), "--output", tmp_path / "out"
    )
    assert done.exit_code == 2 and message in done.stderr and not (tmp_path / "out").exists()


def test_packed_weights_take_no_lora(emoji_lora, tmp_path):
    folder = shutil.copytree(BUNDLED_FOLDER, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"quantization": {"group_size": 64, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    done = invoke("draw_images", "x", "--model", folder, "--lora", emoji_lora, "--output", tmp_path / "out")
    one_line(done, "packed already")


@pytest.mark.parametrize("model, module", [(MEDIUM, "joint_blocks_1_x_block_mlp_fc1"), (LARGE, "joint_blocks_0_context_block_attn_proj"),
                                           (SCHNELL, "single_blocks_1_linear1"), (DEV, "double_blocks_0_img_attn_qkv")])  # fmt: skip
def test_every_family_takes_one(tmp_path, tmp_path_factory, model, module):
    shape = {"mlp_fc1": (512, 128), "attn_proj": (128, 128), "linear1": (896, 128), "attn_qkv": (384, 128)}
    rows, columns = next(shape[part] for part in shape if module.endswith(part))
    lora_file(tmp_path / "lora.safetensors", module, rows, columns, "kohya", alpha=1.0)
    where = ("--model", model, "--num-images", 1, "--num-steps", 1, "--latent-size", 8, 8, "--no-images", "--calib-dir")
    done = run(
        tiny_hub(tmp_path_factory.getbasetemp()),
        *("generate_calibration_data", *where, tmp_path / "a", "then"),
        *("generate_calibration_data", *where, tmp_path / "b", "--lora", tmp_path / "lora.safetensors"),
    )
    assert done.returncode == 0, done.stderr
    before, after = (np.load(tmp_path / name / "samples/0000_001.npz")["x"] for name in "ab")
    assert np.isfinite(after).all() and not np.array_equal(before, after)


@pytest.mark.slow
def test_a_loras_effect_before_and_after_rounding(emoji_lora, tmp_path):
    """The cosine in metrics.json is that of the stored latents; a small LoRA drowns at 4 bits, and this is said."""
    where = ("--calib-dir", tmp_path / "run")
    lora = ("--lora", f"{emoji_lora}:0.02")
    done = generate("--num-images", 1, "--num-steps", 2, "--no-images", *lora, *where)
    assert done.exit_code == 0, done.output
    quick = ("--num-images", 2, "--num-steps", 2, "--variants", "w4-rtn,w8-rtn,no-lora", *where)
    done = invoke("evaluate_quantization", *quick)
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "run/evaluation/metrics.json").read_bytes())["variants"]
    latents = {}
    for name in ("fp", "no-lora", "w4-rtn", "w8-rtn"):
        with np.load(next(iter(EvaluationPaths(tmp_path / "run/evaluation").runs_of(name)))) as file:
            latents[name] = file["latents"][:, -1].astype(np.float64).reshape(2, -1)
    before = latents["fp"] - latents["no-lora"]
    for name in ("w4-rtn", "w8-rtn"):
        after = latents[name] - latents["no-lora"]
        cosines = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
        assert metrics[name]["lora_effect"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert "lora_effect" not in metrics["no-lora"]
    assert (
        metrics["w4-rtn"]["lora_effect"] < 0.9 and "w4-rtn: below 0.9, rounding drowns the LoRA's effect" in done.stdout
    )
    plain = ("--num-images", 1, "--num-steps", 1, "--no-images", "--calib-dir", tmp_path / "plain")
    assert generate(*plain).exit_code == 0
    done = invoke("evaluate_quantization", "--variants", "no-lora", "--calib-dir", tmp_path / "plain")
    assert done.exit_code == 2 and "the model has no LoRA" in done.stderr
