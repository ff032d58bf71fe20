"""What blocks and layers are called, and what their names say: the only place that takes a name apart.

    mm0, uni3                    blocks: multimodal, unified
    mm0.img.attn.q_proj          a layer of a multimodal block: block, stream, role
    uni3.mlp.fc2                 a layer of a unified block: block, role

In NPZ files dots become underscores (mm0_img_attn_q_proj); q_proj and its like keep theirs.
"""

import re
from typing import Annotated

from msgspec import Meta

MULTIMODAL, UNIFIED = "mm", "uni"
BlockName = Annotated[str, Meta(pattern="^(mm|uni)[0-9]{1,4}$")]
LayerName = Annotated[str, Meta(pattern=r"^(mm|uni)[0-9]{1,4}(\.[a-z0-9_]+){1,6}$")]
BLOCK = re.compile(r"(mm|uni)(\d{1,4})")
LAYER = re.compile(r"(mm|uni)\d{1,4}(\.[a-z0-9_]+)+")
BLOCK_PATTERN = r"(?:mm|uni)\d+"  # of file names
POST_GELU_SUFFIX = ".mlp.fc2"
SHARED_INPUT = {
    "attn.k_proj": "attn.q_proj",
    "attn.v_proj": "attn.q_proj",
}  # role -> the role whose input it is given, too


def block_kind(block: str) -> tuple[str, int]:
    """mm12 -> ("mm", 12)"""
    kind, number = BLOCK.fullmatch(block).groups()
    return kind, int(number)


def block_of(layer: str) -> str:
    """mm12.img.mlp.fc2 -> mm12"""
    return layer.partition(".")[0]


def layer_kind(layer: str) -> str:
    """mm12.img.mlp.fc2 -> img.mlp.fc2: what layers of different blocks have in common."""
    return layer.partition(".")[2]


def layer_role(layer: str) -> str:
    """mm12.img.mlp.fc2 -> mlp.fc2"""
    return ".".join(layer.split(".")[-2:])


def input_owner(layer: str) -> str:
    """The layer that stands for this one's input: q, k and v of a stream are given the same array."""
    role = layer_role(layer)
    return layer.removesuffix(role) + SHARED_INPUT.get(role, role)


def is_post_gelu(layer: str) -> bool:
    """Whether a layer's input comes from a GELU: TaQ-DiT shifts it."""
    return layer.endswith(POST_GELU_SUFFIX)


def layers_by_kind(layers: list[str]) -> dict[str, list[str]]:
    """Layers of each kind, kinds and blocks in the model's order."""
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(layer_kind(layer), []).append(layer)
    return kinds


def layer_prefix(layer: str) -> str:
    """mm0.img.mlp.fc2 -> mm0_img_mlp_fc2, what its keys in a file begin with."""
    return layer.replace(".", "_")


def layer_key(layer: str, field: str) -> str:
    """The NPZ key of one field of a layer: mm0_img_mlp_fc2__scale"""
    return f"{layer_prefix(layer)}__{field}"


def split_key(key: str) -> tuple[str, str]:
    """A field's layer and name, from its NPZ key: the inverse of `layer_key`."""
    prefix, _, field = key.rpartition("__")
    return re.sub(r"_(?!proj)", ".", prefix), field
