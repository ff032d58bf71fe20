"""w4a8/model: what a layer and a block are, and loading only the parts that are asked for, packed weights included."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import invoke
from mlx.utils import tree_flatten
from safetensors.numpy import load_file
from test_hooks import tiny_flux

from calibration_store.errors import OptionError, StoreError
from calibration_store.names import block_of, input_owner, is_post_gelu, layer_key, layer_kind, split_key
from w4a8.model.catalog import BUNDLED_FOLDER, FolderModel, HubModel, describe_model
from w4a8.model.layers import MultimodalBlock, UnifiedBlock, model_blocks, model_layers, note_latent_size
from w4a8.model.loading import DECODER, TEXT, TRANSFORMER, load_pipeline, whole_model
from w4a8.quantized.model import NearestWeights, put_in_place


def test_names_and_keys_are_exact_both_ways(emoji):
    for name, layer in model_layers(emoji.mmdit).items():
        assert split_key(layer_key(name, "act_scale")) == (name, "act_scale")
        assert name == f"{block_of(name)}.{layer_kind(name)}" and layer.block == block_of(name)
        assert layer.is_post_gelu == is_post_gelu(name) == name.endswith("fc2")
    assert input_owner("mm3.txt.attn.v_proj") == "mm3.txt.attn.q_proj"
    assert input_owner("uni3.attn.k_proj") == "uni3.attn.q_proj" and input_owner("uni3.mlp.fc1") == "uni3.mlp.fc1"
    assert split_key("uni12_attn_o_proj__zero_point") == ("uni12.attn.o_proj", "zero_point")


def test_layers_are_the_models_linears(emoji):
    for name, layer in model_layers(emoji.mmdit).items():
        assert isinstance(layer.module, nn.Linear) and layer.weight.shape == layer.shape
        assert layer.role in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2")
        assert (layer.bias is not None) == ("k_proj" not in name)


def test_unified_blocks_run_on_their_own():
    """As the block runs inside DiffusionKit's FLUX: the same modulation, the same positions."""
    flux = tiny_flux()
    blocks = model_blocks(flux)
    assert [type(block) for block in blocks.values()] == [MultimodalBlock] * 2 + [UnifiedBlock] * 3
    block = blocks["uni1"]
    assert [layer.name for layer in block.layers][:2] == ["uni1.attn.q_proj", "uni1.attn.k_proj"]
    tokens, modulation = mx.random.normal((1, 12, 1, 256)), mx.random.normal((1, 1, 1, 256))
    rope = flux.pre_sdpa_rope(text_sequence_length=4, latent_image_resolution=(2, 4))
    with pytest.raises(RuntimeError, match="note_latent_size says which latent size the tokens are of"):
        block.run([tokens], modulation)
    note_latent_size(flux, (4, 8))
    alone = block.run([tokens], modulation)
    stream = block.module.transformer_block
    stream["_modulation_params"] = {7.0: stream.adaLN_modulation(modulation)}
    inside = block.module(tokens, mx.array([7.0]), positional_encodings=rope)
    assert len(alone) == 1 and mx.array_equal(alone[0], inside)


def test_a_models_class_says_where_its_parts_are():
    bundled, hub = describe_model("sd3-emoji"), describe_model("argmaxinc/mlx-FLUX.1-schnell")
    assert type(bundled) is FolderModel
    assert bundled.folder == BUNDLED_FOLDER
    assert bundled.hub_id is None
    assert type(hub) is HubModel
    assert hub.folder is None
    assert hub.hub_id == hub.version


@pytest.mark.parametrize("part, has", [(TRANSFORMER, "mmdit"), (TEXT, "clip_g"), (DECODER, "decoder")])
def test_only_the_asked_parts_are_loaded_in_their_precision(part, has):
    pipeline = load_pipeline(describe_model("sd3-emoji"), {part: "float16"})
    assert [name for name in ("mmdit", "clip_g", "decoder") if hasattr(pipeline, name)] == [has]
    dtypes = {array.dtype for _, array in tree_flatten(getattr(pipeline, has).parameters())}
    assert dtypes == {mx.float16} and pipeline.activation_dtype == mx.float16
    mixed = load_pipeline(describe_model("sd3-emoji"), {part: "float16", TRANSFORMER: "float32"})
    assert mixed.activation_dtype == mx.float32


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Return the bundled model with the linears of its blocks packed by MLX: 4 bits, groups of 64, fc1 of mm0 at 8."""
    folder = shutil.copytree(BUNDLED_FOLDER, tmp_path_factory.mktemp("packed") / "model")
    weights = {name: mx.array(array) for name, array in load_file(folder / "mmdit.safetensors").items()}
    entry = {"group_size": 64, "bits": 4, "mode": "affine"}
    for name in [n.removesuffix(".weight") for n in weights if "adaLN" not in n and n.endswith((".weight",))]:
        if not any(part in name for part in (".attn.", ".mlp.fc")):
            continue
        own = {"group_size": 64, "bits": 8} if "blocks.0.image_transformer_block.mlp.fc1" in name else entry
        if own is not entry:
            entry[name] = own
        found = mx.quantize(weights[f"{name}.weight"].astype(mx.float32), own["group_size"], own["bits"])
        weights |= dict(zip((f"{name}.weight", f"{name}.scales", f"{name}.biases"), found, strict=True))
    mx.save_safetensors(str(folder / "mmdit.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": entry}))
    return folder


def test_packed_weights_stay_packed_and_compute_what_they_unpack_to(packed, emoji):
    mmdit = load_pipeline(describe_model(str(packed)), {TRANSFORMER: "float32"}).mmdit
    layers, original = model_layers(mmdit), model_layers(emoji.mmdit)
    assert layers.keys() == original.keys() and all(layer.is_packed for layer in layers.values())
    assert {name for name, layer in layers.items() if layer.module.bits == 8} == {"mm0.img.mlp.fc1"}
    for name, layer in layers.items():
        assert layer.shape == original[name].shape == layer.weight.shape
        step = np.abs(np.array(original[name].weight)).max() * 2 / 15
        assert np.abs(np.array(layer.weight) - np.array(original[name].weight)).max() < step
    layer, x = layers["mm3.txt.attn.o_proj"], mx.random.normal((5, 192), key=mx.random.key(0))
    expected = np.array(x, np.float64) @ np.array(layer.weight, np.float64).T + np.array(layer.bias)
    np.testing.assert_allclose(np.array(layer.module(x)), expected, atol=1e-4)
    with pytest.raises(OptionError, match="packed already"):
        put_in_place(mmdit, NearestWeights(4, 64))


def test_packed_model_samples(packed, tmp_path):
    done = invoke(
        "generate_calibration_data",
        "--model",
        packed,
        *("--num-images", 1, "--num-steps", 2, "--calib-dir", tmp_path / "run"),
    )
    assert done.exit_code == 0 and (tmp_path / "run/images/0000.png").exists(), done.output


def test_impossible_quantization_entries_are_one_line(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for change in ({"bits": 7}, {"group_size": 50}, {"mm": {"bits": 4, "group_size": 1}}):
        (folder / "config.json").write_text(json.dumps(config | {"quantization": config["quantization"] | change}))
        with pytest.raises(StoreError, match="quantization"):
            load_pipeline(describe_model(str(folder)), whole_model("float32"))
