"""export_quantized_model.py --format gguf: what gguf's own reader finds, and what DiffusionKit makes of it."""

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import folder_bytes, generate, invoke
from finished_run import one_line
from mlx.utils import tree_flatten
from test_export import export, latent_of, quantized_paths

from calibration_store.errors import StoreError
from calibration_store.model_folder import read_model_config
from calibration_store.weights import weight_paths
from w4a8 import __version__
from w4a8.evaluation.variants import export_variant, make_variant
from w4a8.model.catalog import BUNDLED_FOLDER
from w4a8.model.diffusionkit import MMDiT, model_io
from w4a8.model.families import FOLDER_FAMILY
from w4a8.model.folder import transformer_config
from w4a8.model.layers import model_layers
from w4a8.options import ExportOptions
from w4a8.quantized.layer import QuantizedLayer

pytestmark = pytest.mark.slow

QUANTIZED_LAYERS = 93


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stage 1 alone: round-to-nearest needs no more."""
    folder = tmp_path_factory.mktemp("gguf") / "run"
    done = generate("--num-images", 1, "--num-steps", 1, "--no-images", "--calib-dir", folder)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def gguf_file(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    done = export(run, "--weights", "w4-rtn-g32", "--format", "gguf", "--output", folder)
    assert done.exit_code == 0, done.output
    (path,) = folder.glob("*.gguf")
    assert path.name == "sd3-emoji-q4_1.gguf" and "misread this file" in done.stdout
    return gguf.GGUFReader(path)


def dequantized(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def test_gguf_says_what_it_is(gguf_file):
    fields = {key: field.contents() for key, field in gguf_file.fields.items()}
    assert fields["general.architecture"] == "sd3"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    assert fields["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert fields["general.name"] == "sd3-emoji w4-rtn-g32" and fields["general.license"] == "apache-2.0"
    assert fields["general.quantized_by"] == f"w4a8 {__version__}" and fields["w4a8.weights"] == "w4-rtn-g32"
    names = {tensor.name for tensor in gguf_file.tensors}
    assert {"pos_embed", "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.linear.bias"} <= names
    assert {"joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.0.context_block.adaLN_modulation.1.bias"} <= names
    assert not [name for name in names if name.startswith("model.") or "_proj" in name or "layers" in name]


def test_gguf_holds_the_codes_and_grids(gguf_file, emoji):
    """q, k and v of a stream are in one tensor; a block is scale, minimum, then codes i and i + 16 in a byte."""
    layers = model_layers(emoji.mmdit)
    wanted = {}
    for name, layer in layers.items():
        _, stream, kind = name.split(".", 2)
        block = f"joint_blocks.{name.split('.')[0][2:]}.{dict(img='x_block', txt='context_block')[stream]}"
        key = f"{block}.{kind.replace('o_proj', 'proj') if 'o_proj' in kind else kind}.weight"
        for part in "qkv":
            key = key.replace(f"{part}_proj", "qkv")
        wanted.setdefault(key, []).append(QuantizedLayer.nearest(np.array(layer.weight), 4, 32))
    packed = {t.name: t for t in gguf_file.tensors if t.tensor_type == gguf.GGMLQuantizationType.Q4_1}
    assert packed.keys() == wanted.keys() and len(packed) < QUANTIZED_LAYERS
    assert {len(parts) for parts in wanted.values()} == {1, 3}
    for key, parts in wanted.items():
        found = dequantized(packed[key])
        assert np.array_equal(found, np.concatenate([part.weight for part in parts])), key
        nibbles = packed[key].data.reshape(len(found), -1, 20)[..., 4:]
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).reshape(found.shape)
        assert np.array_equal(codes, np.concatenate([part.codes for part in parts])), key


def test_diffusionkit_reads_the_gguf(gguf_file, emoji):
    """Its own renaming, then a strict load: everything has its place, and what was not quantized is the original's."""
    half, single = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
    for tensor in gguf_file.tensors:
        assert tensor.tensor_type == (single if len(tensor.shape) == 1 else half) or tensor.name.endswith("weight")
    weights = {FOLDER_FAMILY.checkpoint.prefix + t.name: mx.array(dequantized(t)) for t in gguf_file.tensors}
    weights = model_io.mmdit_state_dict_adjustments(weights, prefix=FOLDER_FAMILY.checkpoint.prefix)
    mmdit = MMDiT(transformer_config(BUNDLED_FOLDER, read_model_config(BUNDLED_FOLDER), mx.float32))
    mmdit.load_weights(list(weights.items()), strict=True)
    quantized = {f"{path}.weight" for path in quantized_paths(emoji.mmdit)}
    found = dict(tree_flatten(mmdit.parameters()))
    for name, original in tree_flatten(emoji.mmdit.parameters()):
        assert mx.array_equal(found[name], original).item() == (name not in quantized), name
    with make_variant("w4-rtn-g32", None).in_place(emoji):
        assert np.array_equal(latent_of(emoji, mmdit), latent_of(emoji))


def test_files_of_other_bits_lie_side_by_side(run, tmp_path):
    for bits, force in ((4, ()), (5, ("--force",))):
        done = export(run, "--weights", f"w{bits}-rtn-g32", "--format", "gguf", "--output", tmp_path, *force)
        assert done.exit_code == 0, done.output
    reader = gguf.GGUFReader(tmp_path / "sd3-emoji-q5_1.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q5_1
    assert {t.tensor_type.name for t in reader.tensors} == {"F16", "F32", "Q5_1"}
    assert (tmp_path / "sd3-emoji-q4_1.gguf").exists()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n") and "`sd3-emoji-q5_1.gguf`" in card and "5-bit weights" in card
    for bits in (4, 5):
        assert f"original names: w{bits}-rtn-g32, not measured |" in card
    assert "--variants w5-rtn-g32 --output FOLDER/evaluation_w5-rtn-g32" in card
    done = export(run, "--weights", "w4-rtn", "--output", tmp_path, "--force")
    assert done.exit_code == 0, done.output
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in card for name in ("mmdit.safetensors", "sd3-emoji-q4_1.gguf", "sd3-emoji-q5_1.gguf"))
    (tmp_path / "README.md").write_text(edited := card.replace("| file |", "My notes.\n\n| file |"))
    done = export(run, "--weights", "w4-rtn-g32", "--format", "gguf", "--output", tmp_path, "--force")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == edited
    (tmp_path / "README.md").write_text("my own notes")
    one_line(
        export(run, "--weights", "w4-rtn-g32", "--format", "gguf", "--output", tmp_path, "--force"), "holds README.md"
    )


def test_what_gguf_cannot_hold_is_one_line(run, tmp_path):
    done = export(run, "--format", "gguf", "--weights", "w4-rtn", "--output", tmp_path / "out")
    one_line(done, "--group-size 32")
    done = export(run, "--format", "gguf", "--weights", "w4-rtn-g32", "--rest-bits", 8, "--output", tmp_path / "out")
    one_line(done, "leave --rest-bits and --all-linears out")
    assert not (tmp_path / "out").exists()


def test_weights_of_other_groups_stand_side_by_side(tmp_path):
    """--group-size 32 keeps the weights of groups of 64; variants and exports find both, and GGUF takes those of 32."""
    where = ("--calib-dir", tmp_path / "run")
    quick = ("--iters", 10, "--batch-size", 2, "--unit", "block", "--blocks", "mm0", "--end-to-end", 0, *where)
    assert generate("--num-images", 2, "--num-steps", 2, "--no-images", *where).exit_code == 0
    assert invoke("cache_adaround_data", "--num-images", 2, "--stride", 1, *where).exit_code == 0
    for group in (64, 32):
        before = folder_bytes(tmp_path / "run/adaround_weights")
        done = invoke("optimize_adaround", *quick, "--group-size", group, *(("--force",) if group == 32 else ()))
        assert done.exit_code == 0, done.output
    assert before and folder_bytes(tmp_path / "run/adaround_weights") == before
    roots = [weight_paths(tmp_path / "run", group).root.name for group in (None, 64, 32)]
    assert roots == ["adaround_weights", "adaround_weights", "adaround_weights_g32"]
    one_line(invoke("optimize_adaround", *quick, "--group-size", 0, "--resume"), "has --group-size 64, not 0")
    for name, group in (("w4-adaround", 64), ("w4-adaround-g64", 64), ("w4-adaround-g32", 32)):
        weights = make_variant(name, tmp_path / "run").weights
        assert weights.group_size == weights.metadata["group_size"] == group
        assert weights.paths.root == weight_paths(tmp_path / "run", group).root
    with pytest.raises(StoreError, match="adaround_weights_g128/metadata.json: not found"):
        make_variant("w4-adaround-g128", tmp_path / "run")
    for layout, name in (("gguf", "w4-adaround-g32"), ("mlx", "w4-adaround")):
        options = ExportOptions(calib_dir=tmp_path / "run", layout=layout, activations="none")
        assert export_variant(options)[0].name == name
