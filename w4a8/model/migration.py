"""Migrate wide input channels into the weights of the layers that read them; the model computes what it computed.

A channel of an input is divided by a multiplier, and the weights that read the channel are multiplied by it (SmoothQuant,
Xiao et al. 2023). Whatever makes the input takes the division over: adaLN for q, k, v and fc1, the value projections of
both streams for o_proj. The input of fc2 comes out of a GELU, and stays.
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from w4a8.model.layers import Block, Layer, MultimodalBlock, model_blocks

VALUES = {
    "attn.o_proj": "attn.v_proj",
    "attn2.o_proj": "attn2.v_proj",
}  # what an attention gives -> what makes its values
MODULATED = {
    "attn": (0, 1),
    "mlp": (3, 4),
    "attn2": (6, 7),
}  # where an input's shift and scale stand among adaLN's outputs


def migrated_together(block: Block, kept: Sequence[str] = ()) -> list[list[str]]:
    """Return the groups of a block's layers that share one array of multipliers: q, k and v of a stream; fc1; o_proj.

    Attention mixes the tokens of both streams, so their o_proj share one; a second attention's has one of its own. kept:
    layers whose weights must not change; a group whose input they read or make is left out.
    """
    if not isinstance(block, MultimodalBlock):
        return []
    groups: dict[str, list[str]] = {}
    for layer in block.layers:
        if not layer.is_post_gelu:
            groups.setdefault(VALUES.get(layer.role, layer.input_owner), []).append(layer.name)
    touched = {key: [*names, *(layer.name for layer in makers_of(block, key))] for key, names in groups.items()}
    return [names for key, names in groups.items() if not set(touched[key]) & set(kept)]


def makers_of(block: Block, role: str) -> list[Layer]:
    """Return the layers of a role, such as the value projections whose values an o_proj reads."""
    return [layer for layer in block.layers if layer.role == role]


def migrate(mmdit: nn.Module, multipliers: Mapping[str, np.ndarray]) -> None:
    """Divide the inputs of layers by their multipliers, (inputs,) float32 by layer, and multiply their weights.

    adaLN is rounded as it is deployed.
    """
    half = mx.bfloat16 if mmdit.config.depth_unified else mx.float16
    for block in model_blocks(mmdit).values():
        layers = {layer.name: layer for layer in block.layers}
        for names in migrated_together(block):
            if names[0] not in multipliers:
                continue
            m = mx.array(multipliers[names[0]])
            for name in names:
                module = layers[name].module
                module["weight"] = module["weight"] * m
            role = layers[names[0]].role
            if role in VALUES:
                for layer in makers_of(block, VALUES[role]):
                    layer.module["weight"] = layer.module["weight"] / m[:, None]
                    if layer.bias is not None:
                        layer.module["bias"] = layer.bias / m
            else:
                prefix, part = names[0].rsplit(".", 2)[:2]
                divide_modulated(block.streams[prefix], MODULATED[part], m, half)


def divide_modulated(stream: nn.Module, places: tuple[int, int], m: mx.array, half: mx.Dtype) -> None:
    """Divide (1 + scale)·LN(x) + shift by m (channels,), by changes of adaLN's rows.

    places: where shift and scale stand among adaLN's outputs; half: the precision in which adaLN is deployed.
    """
    linear = stream.adaLN_modulation.layers[1]
    rows, biases = (list(mx.split(linear[key], stream.num_modulation_params)) for key in ("weight", "bias"))
    for place in places:
        rows[place], biases[place] = rows[place] / m[:, None], biases[place] / m
    biases[places[1]] = biases[places[1]] + (1 / m - 1)
    for key, parts in (("weight", rows), ("bias", biases)):
        linear[key] = mx.concatenate(parts).astype(half).astype(linear[key].dtype)
