"""Names of blocks and layers, and the functions that take them apart; no other module does.

    mm0, uni3                    blocks: multimodal, unified
    mm0.img.attn.q_proj          a layer of a multimodal block: block, stream, role
    mm0.img.attn2.q_proj         a layer of the second attention (SD3.5-Medium)
    uni3.mlp.fc2                 a layer of a unified block: block, role

In NPZ files dots become underscores (mm0_img_attn_q_proj); the underscore of q_proj and its like stays one.
"""

import re
from typing import Annotated

from msgspec import Meta

MULTIMODAL, UNIFIED = "mm", "uni"
BlockName = Annotated[str, Meta(pattern="^(mm|uni)[0-9]{1,4}$")]
LayerName = Annotated[str, Meta(pattern=r"^(mm|uni)[0-9]{1,4}(\.[a-z0-9_]+){1,6}$")]
BLOCK = re.compile(r"(mm|uni)(\d{1,4})")
LAYER = re.compile(r"(mm|uni)\d{1,4}(\.[a-z0-9_]+)+")
BLOCK_PATTERN = r"(?:mm|uni)\d+"  # part of the patterns of file names
POST_GELU_SUFFIX = ".mlp.fc2"
SHARED_INPUT = {
    "attn.k_proj": "attn.q_proj",
    "attn.v_proj": "attn.q_proj",
    "attn2.k_proj": "attn2.q_proj",
    "attn2.v_proj": "attn2.q_proj",
}  # role -> the role whose input this one shares


def block_kind(block: str) -> tuple[str, int]:
    """Split a block's name into its kind and its number: mm12 -> ("mm", 12). Raises ValueError for another name."""
    match = BLOCK.fullmatch(block)
    if match is None:
        raise ValueError(f"{block!r} is not the name of a block")
    kind, number = match.groups()
    return kind, int(number)


def block_of(layer: str) -> str:
    """Return the block of a layer: mm12.img.mlp.fc2 -> mm12."""
    return layer.partition(".")[0]


def layer_kind(layer: str) -> str:
    """Return the name of a layer within its block, the same in every block: mm12.img.mlp.fc2 -> img.mlp.fc2."""
    return layer.partition(".")[2]


def layer_role(layer: str) -> str:
    """Return the role of a layer within its stream: mm12.img.mlp.fc2 -> mlp.fc2."""
    return ".".join(layer.split(".")[-2:])


def input_owner(layer: str) -> str:
    """Return the layer that a layer's input is noted for: q, for q, k and v of a stream, which share one input."""
    role = layer_role(layer)
    return layer.removesuffix(role) + SHARED_INPUT.get(role, role)


def is_post_gelu(layer: str) -> bool:
    """Return whether a layer's input comes from a GELU; TaQ-DiT shifts such inputs."""
    return layer.endswith(POST_GELU_SUFFIX)


def layers_by_kind(layers: list[str]) -> dict[str, list[str]]:
    """Return {kind: its layers}; kinds and layers keep the order in which they are given, the model's."""
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(layer_kind(layer), []).append(layer)
    return kinds


def layer_prefix(layer: str) -> str:
    """Return the beginning of a layer's NPZ keys: mm0.img.mlp.fc2 -> mm0_img_mlp_fc2."""
    return layer.replace(".", "_")


def layer_key(layer: str, field: str) -> str:
    """Return the NPZ key of one field of a layer: mm0_img_mlp_fc2__scale."""
    return f"{layer_prefix(layer)}__{field}"


def split_key(key: str) -> tuple[str, str]:
    """Return (layer, field) of an NPZ key: the inverse of `layer_key`."""
    prefix, _, field = key.rpartition("__")
    return re.sub(r"_(?!proj)", ".", prefix), field
