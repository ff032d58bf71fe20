"""Read the original checkpoints of hub models lazily, and locate DiffusionKit's parameters in them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import mlx.core as mx
import orjson
from mlx.utils import tree_flatten

from calibration_store.errors import UserError
from calibration_store.safetensors_header import weight_dtypes
from w4a8.model.diffusionkit import MMDiT
from w4a8.model.families import SD3, Family
from w4a8.model.weight_files import load_arrays

# The parts of DiffusionKit's names -> those of the original checkpoints.
SD3_PARTS = (
    ("multimodal_transformer_blocks", "joint_blocks"),
    ("image_transformer_block", "x_block"),
    ("text_transformer_block", "context_block"),
    ("x_pos_embedder.pos_embed.weight", "pos_embed"),
    ("qk_norm.q_norm", "attn.ln_q"),
    ("qk_norm.k_norm", "attn.ln_k"),
    ("attn.o_proj", "attn.proj"),
    (".layers.", "."),
)
FLUX_PARTS = (
    ("multimodal_transformer_blocks", "double_blocks"),
    ("unified_transformer_blocks", "single_blocks"),
    (".image_transformer_block.", ".img_"),
    (".text_transformer_block.", ".txt_"),
    (".transformer_block.attn.o_proj", ".linear2"),
    (".transformer_block.mlp.fc2", ".linear2"),
    (".transformer_block.mlp.fc1", ".linear1"),
    (".transformer_block.attn.qkv", ".linear1"),
    (".transformer_block.adaLN_modulation.layers.1", ".modulation.lin"),
    (".transformer_block.qk_norm", ".norm"),
    ("_qk_norm", "_attn.norm"),
    ("q_norm.weight", "query_norm.scale"),
    ("k_norm.weight", "key_norm.scale"),
    ("attn.o_proj", "attn.proj"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("g_adaLN_modulation.layers.1", "g_mod.lin"),
    ("t_adaLN_modulation.layers.1", "t_mod.lin"),
    ("x_embedder.proj", "img_in"),
    ("context_embedder", "txt_in"),
    ("t_embedder", "time_in"),
    ("y_embedder", "vector_in"),
    ("mlp.layers.0", "in_layer"),
    ("mlp.layers.2", "out_layer"),
    (".layers.", "."),
)
QKV = re.compile(r"attn\.([qkv])_proj")


@dataclass(frozen=True, order=True)
class CheckpointSlice:
    """The location of a DiffusionKit parameter in an original checkpoint: a tensor, and its first row and column."""

    key: str  # without the family's prefix
    row: int = 0
    column: int = 0


def checkpoint_slice(family: Family, name: str, hidden: int) -> CheckpointSlice:
    """Locate a parameter by its name in DiffusionKit. hidden: the transformer's width.

    q, k and v are one tensor in a checkpoint, and in FLUX's unified blocks fc1 is part of it, too.
    """
    joined = QKV.search(name)
    row = "qkv".index(joined[1]) * hidden if joined else 0
    column, key = 0, QKV.sub("attn.qkv", name)
    for ours, theirs in SD3_PARTS if family is SD3 else FLUX_PARTS:
        key = key.replace(ours, theirs)
    if "unified" in name and name.endswith(("mlp.fc1.weight", "mlp.fc1.bias")):
        row = 3 * hidden
    if "unified" in name and name.endswith("mlp.fc2.weight"):
        column = hidden
    return CheckpointSlice(key, row, column)


TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
OTHER_PARTS = (  # how keys of a whole model's other parts begin
    "text_encoders.", "first_stage_model.", "vae.", "model_ema.", "conditioner.", "cond_stage_model.",
)  # fmt: skip
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
# A part of a key that only one model has -> the model, for checkpoints that are none of ours.
STRANGERS = (
    (".attn2.", "SD3.5-Medium"),
    ("distilled_guidance_layer.", "Chroma"),
    ("double_stream_modulation", "FLUX.2"),
    ("noise_refiner.", "Z-Image"),
    ("transformer_blocks.0.img_mod.", "Qwen-Image"),
    ("input_blocks.", "a U-Net (SDXL or SD1.5)"),
    ("caption_projection.", "PixArt or Sana"),
)
FLUX_INPUTS = {384: "FLUX.1-Fill", 128: "FLUX.1-Canny or -Depth"}  # channels of img_in's input: 64 in the plain model


def read_original_checkpoint(path: Path, family: Family, model: MMDiT) -> dict[str, mx.array]:
    """Open a checkpoint's transformer under the names of DiffusionKit's `model`; each array is read when it is used.

    Keys may have one of TRANSFORMER_PREFIXES; keys of other parts of a model are left out. An index of several files
    reads all of them. Raises UserError for a file in another layout, of another model, or whose weights are packed.
    """
    shard = SHARD.search(path.name)
    if shard:
        raise UserError(f"{path}: one of {int(shard[1])} files of a model; give its index, …safetensors.index.json")
    original, config = transformer_arrays(path, family), model.config
    first = "joint_blocks.0." if family is SD3 else "double_blocks.0."
    if not any(key.startswith(first) for key in original):
        refuse_stranger(path, original, family)
    for mark, name in STRANGERS:
        if any(mark in key for key in original):
            raise UserError(f"{path}: this is {name}, which this toolkit does not know; it knows {ours(family)}")
    table = original.get("pos_embed")
    if table is not None and table.shape[1] != config.max_latent_resolution**2:
        side = round(table.shape[1] ** 0.5)
        raise UserError(
            f"{path}: its table of positions is {side} x {side}, and the model's {config.max_latent_resolution} x {config.max_latent_resolution}; --model names another model"
        )
    inputs = original.get("img_in.weight")
    if inputs is not None and inputs.shape[-1] in FLUX_INPUTS:
        raise UserError(f"{path}: this is {FLUX_INPUTS[inputs.shape[-1]]}, not FLUX.1-schnell or -dev")
    refuse_other_sizes(path, original, family, model)
    return family.weights({family.prefix + key: array for key, array in original.items()}, config)


def refuse_other_sizes(path: Path, original: Mapping[str, mx.array], family: Family, model: MMDiT) -> None:
    """Raise UserError where a checkpoint has other arrays than the model, or another width, before any is read."""
    width = model.config.hidden_size
    needed = {checkpoint_slice(family, name, width).key for name in dict(tree_flatten(model.parameters()))}
    given = {key for key in original if not key.startswith(family.ignored)}
    lacking, unknown = sorted(needed - given), sorted(given - needed)
    if lacking or unknown:
        faults = [f"{word} {some(keys)}" for word, keys in (("lacks", lacking), ("also has", unknown)) if keys]
        raise UserError(
            f"{path}: not the transformer that --model names ({', '.join(faults)}); name the model that it is of, "
            "or download it again"
        )
    joined = next(key for key in needed if key.endswith("attn.qkv.weight"))
    if original[joined].shape != (3 * width, width):
        shape = " x ".join(map(str, original[joined].shape))
        raise UserError(
            f"{path}: {joined} is {shape}, and that of the model {3 * width} x {width}; --model names another model"
        )


def some(keys: Sequence[str]) -> str:
    """Return the number of keys and the first of them, for messages."""
    return f"{len(keys)} arrays, {keys[0]} …" if len(keys) > 1 else keys[0]


def transformer_arrays(path: Path, family: Family) -> dict[str, mx.array]:
    """Return a checkpoint's transformer by its original keys, without a prefix. Raises UserError."""
    files = indexed_files(path) if path.name.endswith(".index.json") else [path]
    arrays = {key: array for file in files for key, array in load_arrays(file).items()}
    first = "joint_blocks.0." if family is SD3 else "double_blocks.0."
    prefix = next(
        (prefix for prefix in TRANSFORMER_PREFIXES if any(key.startswith(prefix + first) for key in arrays)), ""
    )
    return {
        key.removeprefix(prefix): array
        for key, array in arrays.items()
        if key.startswith(prefix) and (prefix or not key.startswith(OTHER_PARTS))
    }


def indexed_files(path: Path) -> list[Path]:
    """Return the files that an index names, which lie beside it. Raises UserError."""
    try:
        names = sorted(set(orjson.loads(path.read_bytes())["weight_map"].values()))
        files = [path.parent / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not the index of a model in several files; give one, or the file itself") from None
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UserError(f"{path}: {missing[0]} is not beside it; download all {len(files)} files")
    return files


def holds_vae(path: Path, family: Family) -> bool:
    """Return whether a checkpoint holds a VAE under the family's prefix, from its header."""
    files = indexed_files(path) if path.name.endswith(".index.json") else [path]
    return any(name.startswith(f"{family.vae_prefix}decoder.") for file in files for name in weight_dtypes(file))


def ours(family: Family) -> str:
    """Return the models of a family, for messages."""
    return "SD3-Medium and SD3.5-large" if family is SD3 else "FLUX.1-schnell and -dev"


def refuse_stranger(path: Path, keys: Iterable[str], family: Family) -> NoReturn:
    """Raise UserError that says what a file is which holds no transformer of this family in the original layout."""
    bare = [key.removeprefix("transformer.") for key in keys]
    for mark, name in STRANGERS:
        if any(mark in key for key in bare):
            raise UserError(f"{path}: this is {name}, which this toolkit does not know; it knows {ours(family)}")
    if any(key.startswith(("transformer_blocks.", "single_transformer_blocks.")) for key in bare):
        raise UserError(
            f"{path}: in the layout of diffusers (transformer_blocks. …), which DiffusionKit does not read; "
            f"give the checkpoint in the original layout ({original_example(family)} …)"
        )
    other = "double_blocks." if family is SD3 else "joint_blocks."
    if any(other in key for key in bare):
        raise UserError(f"{path}: a transformer of {'FLUX' if family is SD3 else 'SD3'}; --model names another family")
    raise UserError(f"{path}: holds no transformer ({original_example(family)} …)")


def original_example(family: Family) -> str:
    """Return how keys of the original layout begin, for messages."""
    return f"{family.prefix}joint_blocks." if family is SD3 else "double_blocks."
