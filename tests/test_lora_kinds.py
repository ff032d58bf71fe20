"""Every kind of adapter against its formula in float64: LoHa, LoKr, DoRA, differences, convolutions, CLIP's part."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

from calibration_store.errors import UserError
from w4a8.model.diffusionkit import CLIPTextModel, CLIPTextModelConfig
from w4a8.model.families import FAMILIES
from w4a8.model.location import Lora
from w4a8.model.lora import fuse_text_encoder, with_loras

SD3, FLUX = FAMILIES["sd3-medium"], FAMILIES["flux.1"]

HIDDEN, RANK, SCALE = 8, 2, 0.7
NAME = "multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj"
FLAT, DOTTED = "transformer_blocks_0_attn_to_q", "transformer_blocks.0.attn.to_q"


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {
        f"{NAME}.weight": mx.array(rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float16)),
        f"{NAME}.bias": mx.array(rng.standard_normal(HIDDEN).astype(np.float16)),
        "context_embedder.weight": mx.array(rng.standard_normal((HIDDEN, 12)).astype(np.float16)),
        "x_embedder.proj.weight": mx.array(rng.standard_normal((HIDDEN, 2, 2, 16)).astype(np.float16)),
        "x_embedder.proj.bias": mx.array(rng.standard_normal(HIDDEN).astype(np.float16)),
    }


def drawn(*shape, seed=1):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def fused(weights, arrays, path, family=SD3):
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path)
    return {
        name: np.array(array.astype(mx.float32), np.float64)
        for name, array in with_loras(weights, family, [Lora(path, SCALE)]).items()
    }


def wide(array):
    return np.array(array, np.float64)


def check(found, weights, name, change):
    before = np.array(weights[name].astype(mx.float32), np.float64)
    np.testing.assert_allclose(found[name], before + change.reshape(before.shape), rtol=1e-5, atol=1e-5)


def test_hadamard(weights, tmp_path):
    halves = {
        f"hada_w{h}_{s}": drawn(*((HIDDEN, RANK) if s == "a" else (RANK, HIDDEN)), seed=h) for h in (1, 2) for s in "ab"
    }
    arrays = {f"lycoris_{FLAT}.{kind}": array for kind, array in halves.items()} | {
        f"lycoris_{FLAT}.alpha": np.float32(1)
    }
    change = (
        SCALE
        / RANK
        * (wide(halves["hada_w1_a"]) @ halves["hada_w1_b"])
        * (wide(halves["hada_w2_a"]) @ halves["hada_w2_b"])
    )
    check(fused(weights, arrays, tmp_path / "a.safetensors"), weights, f"{NAME}.weight", change)


@pytest.mark.parametrize("split", [False, True])
def test_kronecker(weights, tmp_path, split):
    """alpha counts only where a factor is a product itself."""
    small, a, b = drawn(2, 2), drawn(4, RANK), drawn(RANK, 4)
    second = {"lokr_w2_a": a, "lokr_w2_b": b} if split else {"lokr_w2": (wide(a) @ b).astype(np.float32)}
    arrays = {f"lora_unet_{FLAT}.{kind}": array for kind, array in ({"lokr_w1": small} | second).items()}
    arrays[f"lora_unet_{FLAT}.alpha"] = np.float32(3)
    change = SCALE * (3 / RANK if split else 1) * np.kron(wide(small), wide(a) @ b)
    check(fused(weights, arrays, tmp_path / "a.safetensors"), weights, f"{NAME}.weight", change)


@pytest.mark.parametrize("by_row", [True, False])
def test_decomposed(weights, tmp_path, by_row):
    down, up, magnitude = drawn(RANK, HIDDEN), drawn(HIDDEN, RANK), np.abs(drawn(HIDDEN)) + 1
    arrays = {f"lora_unet_{FLAT}.lora_down.weight": down, f"lora_unet_{FLAT}.lora_up.weight": up}
    if by_row:
        arrays = {f"transformer.{DOTTED}.lora_A.weight": down, f"transformer.{DOTTED}.lora_B.weight": up}
        arrays[f"transformer.{DOTTED}.lora_magnitude_vector"] = magnitude
    else:
        arrays[f"lora_unet_{FLAT}.dora_scale"] = magnitude[None]
    weight = np.array(weights[f"{NAME}.weight"], np.float64)
    moved = weight + wide(up) @ down
    norm = np.linalg.norm(moved, axis=1 if by_row else 0, keepdims=True)
    change = SCALE * ((magnitude[:, None] if by_row else magnitude[None]) * moved / norm - weight)
    found = fused(weights, arrays, tmp_path / "a.safetensors")
    if magnitude.size == HIDDEN and not by_row:  # (1, in): one value a column
        assert not np.allclose(found[f"{NAME}.weight"], weight)
    check(found, weights, f"{NAME}.weight", change)


def test_differences_and_biases(weights, tmp_path):
    key = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    more = dict(weights)
    for part in "kv":
        for end in ("weight", "bias"):
            more[NAME.replace("q_proj", f"{part}_proj") + f".{end}"] = weights[f"{NAME}.{end}"] * 2
    diff, bias = drawn(3 * HIDDEN, HIDDEN), drawn(3 * HIDDEN)
    found = fused(more, {f"{key}.diff": diff, f"{key}.diff_b": bias}, tmp_path / "a.safetensors")
    for row, part in enumerate("qkv"):
        rows, name = slice(row * HIDDEN, (row + 1) * HIDDEN), NAME.replace("q_proj", f"{part}_proj")
        check(found, more, f"{name}.weight", SCALE * wide(diff)[rows])
        check(found, more, f"{name}.bias", SCALE * wide(bias)[rows])


def test_a_convolution(weights, tmp_path):
    """Files have a kernel as (out, in, height, width); DiffusionKit keeps (out, height, width, in)."""
    down, up = drawn(RANK, 16, 2, 2), drawn(HIDDEN, RANK, 1, 1)
    change = SCALE * np.einsum("or,rihw->ohwi", wide(up)[:, :, 0, 0], wide(down))
    for prefix in ("lora_unet_x_embedder_proj.lora_{}.weight", "transformer.pos_embed.proj.lora_{}.weight"):
        names = ("down", "up") if "unet" in prefix else ("A", "B")
        arrays = dict(zip(map(prefix.format, names), (down, up), strict=True))
        check(fused(weights, arrays, tmp_path / "a.safetensors"), weights, "x_embedder.proj.weight", change)


def test_a_module_in_two_spellings_adds_up(weights, tmp_path):
    pairs = [(drawn(RANK, HIDDEN, seed=seed), drawn(HIDDEN, RANK, seed=seed)) for seed in (1, 2)]
    arrays = {f"transformer.{DOTTED}.lora_A.weight": pairs[0][0], f"transformer.{DOTTED}.lora_B.weight": pairs[0][1]}
    arrays |= {f"lora_unet_{FLAT}.lora_down.weight": pairs[1][0], f"lora_unet_{FLAT}.lora_up.weight": pairs[1][1]}
    change = SCALE * sum(wide(up) @ down for down, up in pairs)
    check(fused(weights, arrays, tmp_path / "a.safetensors"), weights, f"{NAME}.weight", change)


def test_x_flux_names_its_streams_by_number(weights, tmp_path):
    more = dict(weights)
    for stream in ("image", "text"):
        for part in "qkv":
            more[f"multimodal_transformer_blocks.0.{stream}_transformer_block.attn.{part}_proj.weight"] = weights[
                f"{NAME}.weight"
            ]
    down, up = drawn(RANK, HIDDEN), drawn(3 * HIDDEN, RANK)
    for number, stream in ((1, "image"), (2, "text")):
        key = f"double_blocks.0.processor.qkv_lora{number}"
        found = fused(more, {f"{key}.down.weight": down, f"{key}.up.weight": up}, tmp_path / "a.safetensors", FLUX)
        name = f"multimodal_transformer_blocks.0.{stream}_transformer_block.attn.v_proj.weight"
        check(found, more, name, SCALE * (wide(up) @ down)[2 * HIDDEN :])
        other = name.replace(stream, "text" if stream == "image" else "image")
        check(found, more, other, np.zeros((HIDDEN, HIDDEN)))


CLIP = CLIPTextModelConfig(
    num_layers=1, model_dims=HIDDEN, num_heads=2, max_length=77, vocab_size=10, projection_dim=HIDDEN
)


@pytest.mark.parametrize("family, encoder, prefix", [
    (SD3, "clip_l", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight"),
    (SD3, "clip_g", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight"),
    (SD3, "clip_l", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"),
    (FLUX, "clip_l", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight"),
])  # fmt: skip
def test_the_part_of_a_text_encoder(tmp_path, family, encoder, prefix):
    model: nn.Module = CLIPTextModel(CLIP)
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    down, up, names = drawn(RANK, HIDDEN), drawn(HIDDEN, RANK), ("down", "up") if "te" in prefix[:8] else ("A", "B")
    names = ("A", "B") if prefix.startswith("text_encoder") else names
    path = tmp_path / "a.safetensors"
    save_file(dict(zip(map(prefix.format, names), (down, up), strict=True)), path)
    fuse_text_encoder(model, encoder, family, [Lora(path, SCALE)])
    for name, array in tree_flatten(model.parameters()):
        change = SCALE * (wide(up) @ down) if name == "layers.0.attention.query_proj.weight" else 0
        np.testing.assert_allclose(np.array(array), before[name] + change, rtol=1e-5, atol=1e-5, err_msg=name)
    other = "clip_g" if encoder == "clip_l" else "clip_l"
    again = CLIPTextModel(CLIP)
    kept = {name: np.array(array) for name, array in tree_flatten(again.parameters())}
    fuse_text_encoder(again, other, SD3, [Lora(path, SCALE)])
    assert all(np.array_equal(np.array(array), kept[name]) for name, array in tree_flatten(again.parameters()))


def test_parts_that_no_encoder_has_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for key, family, message in (
        ("lora_te1_text_model_encoder_layers_9_mlp_fc1.lora_down.weight", SD3, "is no layer of clip_l"),
    ):
        save_file({key: drawn(RANK, HIDDEN)}, path)
        with pytest.raises(UserError, match=message):
            fuse_text_encoder(CLIPTextModel(CLIP), "clip_l", family, [Lora(path, SCALE)])
