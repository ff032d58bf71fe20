"""Fuse LoRAs (Hu et al. 2021), W + scale · alpha / rank · B·A, into the dense weights when a model is read.

Files may be in the layout of PEFT and diffusers (transformer_blocks.0.attn.to_q.lora_A.weight), in that of kohya
(lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight), and in either with the other's module names;
`lora_adapters` reads them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from calibration_store.errors import UserError
from w4a8.backend.words import shortened
from w4a8.model.diffusers_layout import diffusers_name, is_swapped, last_block
from w4a8.model.families import Family
from w4a8.model.location import Lora
from w4a8.model.lora_adapters import FLAT, PART, Adapter, read_adapters
from w4a8.model.original_checkpoint import checkpoint_slice

MOST_CHANGE = 65504.0  # largest change of a weight: the largest float16


@dataclass(frozen=True)
class Target:
    """A weight that a LoRA's module changes, and its first row and column in that module's product B·A."""

    name: str
    row: int
    column: int
    swapped: bool = False  # diffusers stores (scale, shift) where the original has (shift, scale)


# Which text encoder a key belongs to, by its beginning, in the order of the family's encoders.
TEXT_ENCODERS = re.compile(
    r"(?:lora_te(?P<kohya>\d?)_|text_encoder(?:_(?P<diffusers>\d))?\.|(?:text_encoders\.)?(?P<name>clip_l|clip_g|t5xxl)\.(?:transformer\.)?)"
)
# The parts of DiffusionKit's names of CLIP's modules -> those of transformers.
CLIP_PARTS = (
    ("attention.query_proj", "self_attn.q_proj"), ("attention.key_proj", "self_attn.k_proj"),
    ("attention.value_proj", "self_attn.v_proj"), ("attention.", "self_attn."), ("linear1", "mlp.fc1"),
    ("linear2", "mlp.fc2"), ("layers.", "encoder.layers."),
)  # fmt: skip


T5_PARTS = (
    ("attention.query_proj", "layer.0.SelfAttention.q"), ("attention.key_proj", "layer.0.SelfAttention.k"),
    ("attention.value_proj", "layer.0.SelfAttention.v"), ("attention.out_proj", "layer.0.SelfAttention.o"),
    ("dense.", "layer.1.DenseReluDense."), ("ln1", "layer.0.layer_norm"), ("ln2", "layer.1.layer_norm"),
    ("encoder.layers.", "encoder.block."),
)  # fmt: skip


def with_loras(weights: Mapping[str, mx.array], family: Family, loras: Sequence[Lora]) -> dict[str, mx.array]:
    """Return the weights with these LoRAs fused, lazily; changed weights are float32. They have DiffusionKit's names.

    Modules of text encoders are left to `fuse_text_encoder`. Raises UserError for a file that is no LoRA of this model,
    with the keys that belong to none of its layers.
    """
    found = dict(weights)
    if not loras:
        return found
    targets, biases = targets_of(weights, family), bias_targets_of(weights, family)
    for lora in loras:
        modules = read_adapters(lora)
        own = {name: each for name, each in modules.items() if text_encoder_of(each[0].keys[0], family) is None}
        unknown = sorted(
            key
            for module, adapters in own.items()
            for adapter in adapters
            if module not in targets and not (adapter.arrays and adapter.bias() is not None and module in biases)
            for key in adapter.keys
        )
        if unknown or not modules:
            raise UserError(
                f"--lora {lora.file}: {len(unknown)} of its keys are no layer of this model's transformer "
                f"({shortened(unknown or sorted(modules))}){probably(unknown, family)}"
            )
        for module, adapters in own.items():
            for adapter in adapters:
                if lora.scale != 0 or adapter.change() is not None:
                    fuse(found, adapter, lora.scale, targets.get(module, []), biases.get(module, []))
    return found


def text_encoder_of(key: str, family: Family) -> str | None:
    """Return the text encoder that a key belongs to, clip_l, clip_g or t5; None for a key of the transformer."""
    found = TEXT_ENCODERS.match(key)
    if found is None:
        return None
    if found["name"]:
        return "t5" if found["name"] == "t5xxl" else found["name"]
    encoders = (*family.clip, "t5")
    number = int(found["kohya"] or found["diffusers"] or 1)
    return encoders[min(number, len(encoders)) - 1]


def text_encoders_of(loras: Sequence[Lora], family: Family) -> set[str]:
    """Return the text encoders that these LoRAs change: clip_l, clip_g, t5."""
    adapters = [each for lora in loras if lora.scale for group in read_adapters(lora).values() for each in group]
    return {found for each in adapters if (found := text_encoder_of(each.keys[0], family)) is not None}


def fuse_text_encoder(model: nn.Module, encoder: str, family: Family, loras: Sequence[Lora]) -> None:
    """Fuse the parts of these LoRAs that belong to one text encoder (clip_l, clip_g, t5) into its weights, in float32.

    Raises UserError for keys that are no layer of the encoder.
    """
    weights = dict(tree_flatten(model.parameters()))
    modules: dict[str, str] = {}
    for name in weights:
        module = theirs = name.removesuffix(".weight").removesuffix(".bias")
        for ours, other in T5_PARTS if encoder == "t5" else CLIP_PARTS:
            theirs = theirs.replace(ours, other)
        plain = theirs.translate(FLAT)
        modules |= {plain: module, f"text_model_{plain}": module}
    changed = dict(weights)
    for lora in loras:
        for adapters in read_adapters(lora).values():
            for adapter in adapters:
                if text_encoder_of(adapter.keys[0], family) != encoder:
                    continue
                matched = PART.fullmatch(TEXT_ENCODERS.sub("", adapter.keys[0], count=1))
                layer = modules.get(matched["module"].translate(FLAT)) if matched else None
                if layer is None:
                    raise UserError(f"{adapter.where} is no layer of {encoder}; the file was made for another model")
                rows = [Target(f"{layer}.weight", 0, 0)]
                bias = [Target(f"{layer}.bias", 0, 0)] if f"{layer}.bias" in changed else []
                fuse(changed, adapter, lora.scale, rows, bias)
    moved = [(name, array.astype(weights[name].dtype)) for name, array in changed.items() if array is not weights[name]]
    model.update(tree_unflatten(moved))


# A part of a key that has no layer here -> what it probably belongs to.
PROBABLY = (
    ("attn2", "SD3.5-Medium's second attention is not in this model"),
    ("guidance_in", "FLUX.1-dev's guidance embedding is not in this model"),
    ("oft_", "OFT, which is not read"), ("ia3_", "IA3, which is not read"), ("glora", "GLoRA, which is not read"),
    ("down_blocks", "SDXL's or SD1.5's LoRA"), ("input_blocks", "SDXL's or SD1.5's LoRA"),
    ("lora_te", "another text encoder's"), ("text_encoder", "another text encoder's"),
    ("distilled_guidance", "Chroma's LoRA"), ("double_stream", "FLUX.2's LoRA"), ("img_mod", "Qwen-Image's LoRA"),
    (".scale", "whole values, which Canny's and Depth's LoRAs bring, are not read"),
    ("single_", "FLUX's LoRA"), ("double_blocks", "FLUX's LoRA"), ("joint_blocks", "SD3's LoRA"),
)  # fmt: skip


def probably(keys: Sequence[str], family: Family) -> str:
    """Return a hint at the model or the part that keys without a layer here belong to."""
    for mark, what in PROBABLY:
        if any(mark in key for key in keys) and not what.lower().startswith(f"{family.architecture}'s"):
            return f"; probably {what}" if what.endswith(("LoRA", "'s")) else f"; {what}"
    return "; the file was made for another model"


def fuse(
    found: dict[str, mx.array], adapter: Adapter, scale: float, targets: Sequence[Target], biases: Sequence[Target]
) -> None:
    """Change the weights and biases of one module in place. Raises UserError for shapes or sizes that cannot be."""
    change, bias = adapter.change(), adapter.bias()
    if change is not None:
        expected = shape_of(targets, found)
        if change.shape != expected:
            raise UserError(
                f"{adapter.where}: {change.shape}, and the layer is {expected}; it was made for another model"
            )
        if scale == 0:
            return
        if "magnitude" in adapter.arrays:
            change = decomposed(adapter, change, module_weight(targets, found, expected))
        add(found, adapter, scale * change, targets)
    if bias is not None and scale != 0:
        expected_rows = max(target.row + found[target.name].size for target in biases) if biases else 0
        if bias.size != expected_rows:
            raise UserError(f"{adapter.where}: a bias of {bias.size}, and the layer has {expected_rows or 'none'}")
        add(found, adapter, scale * bias[:, None], biases)


def add(found: dict[str, mx.array], adapter: Adapter, change: mx.array, targets: Sequence[Target]) -> None:
    """Add a module's change (rows, columns) to the weights that it stands for."""
    if not (most := _largest(change)) <= MOST_CHANGE:
        raise UserError(f"{adapter.where} changes weights by up to {most:g}: it holds NaN, infinity, or is damaged")
    for target in targets:
        array = found[target.name]
        rows, columns = array.shape[0], array.size // array.shape[0]
        part = change[target.row : target.row + rows, target.column : target.column + columns]
        if target.swapped:
            part = mx.concatenate([part[rows // 2 :], part[: rows // 2]])
        found[target.name] = array.astype(mx.float32) + part.reshape(array.shape)


def module_weight(targets: Sequence[Target], found: Mapping[str, mx.array], shape: tuple[int, int]) -> mx.array:
    """Return the weight (rows, columns) float32 of a module, put together from the weights that it stands for."""
    whole = mx.zeros(shape)
    for target in targets:
        array = found[target.name].astype(mx.float32)
        part = array.reshape(array.shape[0], -1)
        if target.swapped:
            half = part.shape[0] // 2
            part = mx.concatenate([part[half:], part[:half]])
        rows, columns = (
            slice(target.row, target.row + part.shape[0]),
            slice(target.column, target.column + part.shape[1]),
        )
        whole[rows, columns] = part
    return whole


def decomposed(adapter: Adapter, change: mx.array, weight: mx.array) -> mx.array:
    """Return DoRA's change: m·(W + ΔW) / ‖W + ΔW‖ − W, norms by row, or by column where m has one value a column."""
    magnitude, moved = adapter.arrays["magnitude"].astype(mx.float32), weight + change
    by_row = magnitude.ndim == 1 or magnitude.shape[0] == weight.shape[0]
    axis, count = (1, weight.shape[0]) if by_row else (0, weight.shape[1])
    if magnitude.size != count:
        raise UserError(f"{adapter.where}: {magnitude.size} magnitudes, and the layer has {count}")
    norm = mx.linalg.norm(moved, axis=axis, keepdims=True)
    return magnitude.reshape(norm.shape) * moved / mx.maximum(norm, 1e-12) - weight


def _largest(array: mx.array) -> float:
    """Return the largest magnitude in an array; NaN where it holds NaN."""
    return mx.abs(array).max().item()  # type: ignore[return-value]  # MLX's stubs say that it may be complex


def targets_of(weights: Mapping[str, mx.array], family: Family) -> dict[str, list[Target]]:
    """Return the weights that each module name, dots as underscores, stands for in every layout."""
    hidden = weights["context_embedder.weight"].shape[0]
    last = last_block(weights)
    found: dict[str, list[Target]] = {}
    for name, array in weights.items():
        path = name.removesuffix(".weight")
        matrix = array.ndim > 1 and (array.size == array.shape[0] * array.shape[-1] or path == "x_embedder.proj")
        if path == name or not matrix or "pos_embed" in name:
            continue
        original = checkpoint_slice(family, name, hidden)
        module = original.key.removesuffix(".weight").translate(FLAT)
        found.setdefault(module, []).append(Target(name, original.row, original.column))
        theirs = diffusers_name(family, path)
        column = original.column if theirs.endswith("proj_out") else 0
        target = Target(name, 0, column, is_swapped(family, theirs, last))
        if theirs.translate(FLAT) != module:
            found.setdefault(theirs.translate(FLAT), []).append(target)
    return found


def bias_targets_of(weights: Mapping[str, mx.array], family: Family) -> dict[str, list[Target]]:
    """Return the biases and norms that each module name, dots as underscores, stands for in the original layout.

    A norm's scale is a vector that files name in full (…query_norm.scale.diff), so that its module is the whole key.
    """
    hidden = weights["context_embedder.weight"].shape[0]
    found: dict[str, list[Target]] = {}
    for name, array in weights.items():
        if array.ndim == 1:
            original = checkpoint_slice(family, name, hidden)
            module = original.key.removesuffix(".bias").translate(FLAT)
            found.setdefault(module, []).append(Target(name, original.row, 0))
    return found


def shape_of(targets: Sequence[Target], weights: Mapping[str, mx.array]) -> tuple[int, int]:
    """Return (rows, columns) of a module that holds these weights."""
    arrays = [(target, weights[target.name]) for target in targets]
    return (
        max(target.row + array.shape[0] for target, array in arrays),
        max(target.column + array.size // array.shape[0] for target, array in arrays),
    )
