"""Read the transformers of diffusers' checkpoints: diffusers' name of every parameter, and the original arrays.

The names and the order of (scale, shift) are those of diffusers' SD3Transformer2DModel and FluxTransformer2DModel, and
of its scripts/convert_sd3_to_diffusers.py and convert_flux_to_diffusers.py.
"""

import re
from collections.abc import Mapping

import mlx.core as mx

from calibration_store.errors import UserError
from w4a8.model.families import SD3, Family

MULTIMODAL_BLOCK = re.compile(r"multimodal_transformer_blocks\.(\d+)\.")
# The parts of DiffusionKit's names -> those of diffusers.
DIFFUSERS_PARTS = (
    ("multimodal_transformer_blocks", "transformer_blocks"),
    ("unified_transformer_blocks", "single_transformer_blocks"),
    (".image_transformer_block.qk_norm.q_norm", ".attn.norm_q"),
    (".image_transformer_block.qk_norm.k_norm", ".attn.norm_k"),
    (".text_transformer_block.qk_norm.q_norm", ".attn.norm_added_q"),
    (".text_transformer_block.qk_norm.k_norm", ".attn.norm_added_k"),
    (".transformer_block.qk_norm.q_norm", ".attn.norm_q"),
    (".transformer_block.qk_norm.k_norm", ".attn.norm_k"),
    (".transformer_block.attn.o_proj", ".proj_out"),
    (".transformer_block.mlp.fc1", ".proj_mlp"),
    (".transformer_block.mlp.fc2", ".proj_out"),
    (".transformer_block.adaLN_modulation.layers.1", ".norm.linear"),
    (".transformer_block.attn.", ".attn.to_"),
    (".image_transformer_block.attn.o_proj", ".attn.to_out.0"),
    (".text_transformer_block.attn.o_proj", ".attn.to_add_out"),
    (".image_transformer_block.attn.", ".attn.to_"),
    (".text_transformer_block.attn.", ".attn.add_"),
    ("to_q_proj", "to_q"), ("to_k_proj", "to_k"), ("to_v_proj", "to_v"),
    (".image_transformer_block.mlp.", ".ff."),
    (".text_transformer_block.mlp.", ".ff_context."),
    (".image_transformer_block.adaLN_modulation.layers.1", ".norm1.linear"),
    (".text_transformer_block.adaLN_modulation.layers.1", ".norm1_context.linear"),
    ("ff.fc1", "ff.net.0.proj"), ("ff.fc2", "ff.net.2"),
    ("ff_context.fc1", "ff_context.net.0.proj"), ("ff_context.fc2", "ff_context.net.2"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.layers.1", "norm_out.linear"),
    ("t_embedder.mlp.layers.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.layers.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.guidance_in.mlp.layers.0", "time_text_embed.guidance_embedder.linear_1"),
    ("y_embedder.guidance_in.mlp.layers.2", "time_text_embed.guidance_embedder.linear_2"),
    ("y_embedder.mlp.layers.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.layers.2", "time_text_embed.text_embedder.linear_2"),
    ("x_pos_embedder.pos_embed.weight", "pos_embed.pos_embed"),
    ("x_embedder.proj", "x_embedder"),
)  # fmt: skip


def diffusers_name(family: Family, name: str) -> str:
    """Return diffusers' name of a parameter or a module, from DiffusionKit's."""
    theirs = "pos_embed.proj".join(name.split("x_embedder.proj")) if family is SD3 else name
    for ours, other in DIFFUSERS_PARTS:
        theirs = theirs.replace(ours, other)
    return theirs


def is_swapped(family: Family, module: str, last: int) -> bool:
    """Return whether diffusers keeps (scale, shift) where the original has (shift, scale). last: the last joint block."""
    text_of_last = family is SD3 and module == f"transformer_blocks.{last}.norm1_context.linear"
    return module == "norm_out.linear" or text_of_last


def last_block(names: Mapping[str, object]) -> int:
    """Return the number of the last joint block, from DiffusionKit's names."""
    return max(int(found[1]) for found in map(MULTIMODAL_BLOCK.match, names) if found)


def original_arrays(
    arrays: Mapping[str, mx.array], family: Family, originals: Mapping[str, list[str]]
) -> dict[str, mx.array]:
    """Return the arrays of diffusers' checkpoint under the original keys, lazily: q, k and v joined, halves swapped.

    originals: the original key of each array -> DiffusionKit's names of its parts, in their order. Keys that are not
    used stay, so that they can be named. Raises UserError where arrays of one key do not fit beside each other.
    """
    left, found = dict(arrays), {}
    last = last_block({name: None for names in originals.values() for name in names})
    for key, names in originals.items():
        wanted = list(dict.fromkeys(diffusers_name(family, name) for name in names))
        if not all(name in arrays for name in wanted):
            continue
        parts = [arrays[name] for name in wanted]
        for name in wanted:
            left.pop(name, None)
        try:
            whole = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        except ValueError:
            raise UserError(f"{', '.join(wanted)}: their shapes do not fit beside each other") from None
        if is_swapped(family, wanted[0].removesuffix(".weight").removesuffix(".bias"), last):
            half = whole.shape[0] // 2
            whole = mx.concatenate([whole[half:], whole[:half]])
        found[key] = whole
    return found | {key: array for key, array in left.items() if "guidance_embedder." not in key}
