"""Read the original checkpoints of hub models lazily, and locate DiffusionKit's parameters in them."""

import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from calibration_store.errors import UserError
from calibration_store.model_folder import check_weight_file
from w4a8.model.diffusionkit import MMDiTConfig
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


def read_original_checkpoint(path: Path, family: Family, config: MMDiTConfig) -> dict[str, mx.array]:
    """Open a checkpoint's transformer under DiffusionKit's names; each array is read when it is used.

    Raises UserError for a file in another layout, or whose weights are packed.
    """
    check_weight_file(path)
    original = load_arrays(path)
    if any(".scales" in key for key in original):
        raise UserError(f"{path}: its weights are packed already; quantize the original model's")
    bare = [key.removeprefix("transformer.") for key in original]
    if any(key.startswith(("transformer_blocks.", "single_transformer_blocks.")) for key in bare):
        raise UserError(
            f"{path}: in the layout of diffusers (transformer_blocks. …), which DiffusionKit does not read; "
            f"give the checkpoint in the original layout ({original_example(family)} …)"
        )
    return family.weights(original, config)


def original_example(family: Family) -> str:
    """Return how keys of the original layout begin, for messages."""
    return f"{family.prefix}joint_blocks." if family is SD3 else "double_blocks."
