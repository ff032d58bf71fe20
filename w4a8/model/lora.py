"""Fuse LoRAs (Hu et al. 2021), W + scale · alpha / rank · B·A, into the dense weights when a model is read.

Files may be in the layout of PEFT and diffusers (transformer_blocks.0.attn.to_q.lora_A.weight), in that of kohya
(lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight), and in either with the other's module names.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import orjson
from safetensors import safe_open

from calibration_store.errors import UserError
from calibration_store.model_folder import check_weight_file
from w4a8.backend.words import shortened
from w4a8.model.families import SD3, Family
from w4a8.model.location import Lora
from w4a8.model.original_checkpoint import checkpoint_slice
from w4a8.model.weight_files import load_arrays

PREFIX = re.compile(
    r"^(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|lora_(?:unet|transformer)_)*"
)
MOST_ALPHA = 1e6
MOST_CHANGE = 65504.0  # largest change of a weight: the largest float16
ADAPTER_NOTE = "lora_adapter_metadata"  # metadata key of a safetensors file that diffusers wrote
FLAT = str.maketrans(".", "_")  # as kohya writes module names
MULTIMODAL_BLOCK = re.compile(r"multimodal_transformer_blocks\.(\d+)\.")
PART = re.compile(
    r"(?P<module>.+)\.(?:(?P<A>lora_A(?:\.\w+)?|lora_down|lora\.down|lora_linear_layer\.down)\.weight|"
    r"(?P<B>lora_B(?:\.\w+)?|lora_up|lora\.up|lora_linear_layer\.up)\.weight|(?P<alpha>alpha))"
)
# The parts of DiffusionKit's names -> those of diffusers.
DIFFUSERS_PARTS = (
    ("multimodal_transformer_blocks", "transformer_blocks"),
    ("unified_transformer_blocks", "single_transformer_blocks"),
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
    ("y_embedder.mlp.layers.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.layers.2", "time_text_embed.text_embedder.linear_2"),
    ("x_embedder.proj", "x_embedder"),
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A weight that a LoRA's module changes, and its first row and column in that module's product B·A."""

    name: str
    row: int
    column: int
    swapped: bool = False  # diffusers stores (scale, shift) where the original has (shift, scale)


def with_loras(weights: Mapping[str, mx.array], family: Family, loras: Sequence[Lora]) -> dict[str, mx.array]:
    """Return the weights with these LoRAs fused, lazily; changed weights are float32. They have DiffusionKit's names.

    Raises UserError for a file that is no LoRA of this model, with the keys that belong to none of its layers.
    """
    found = dict(weights)
    for lora in loras:
        modules = read_lora(lora)
        targets = targets_of(weights, family)
        unknown = sorted(key for module, parts in modules.items() if module not in targets for key in parts["keys"])
        if unknown:
            raise UserError(
                f"--lora {lora.file}: {len(unknown)} of its keys are no layer of this model's transformer "
                f"({shortened(unknown)}); text encoders' LoRAs, LoHa, LoKr and DoRA are not supported"
            )
        for module, parts in modules.items():
            down, up = parts.get("A"), parts.get("B")
            key = f"--lora {lora.file}: {parts['keys'][0]}"
            if down is None or up is None or down.ndim != 2 or up.ndim != 2:
                raise UserError(f"{key} has no A and B of two dimensions each")
            if down.shape[0] == 0 or up.shape[1] == 0:
                raise UserError(f"{key} has rank 0")
            alpha = parts.get("alpha", down.shape[0])
            if not abs(alpha) <= MOST_ALPHA:
                raise UserError(f"{key} has an alpha of {alpha:g}; it must be a number of at most {MOST_ALPHA:g}")
            expected = shape_of(targets[module], weights)
            if (up.shape[0], down.shape[1]) != expected or up.shape[1] != down.shape[0]:
                raise UserError(
                    f"{key}: {up.shape} x {down.shape}, and the layer is {expected}; it was made for another model"
                )
            if lora.scale == 0:
                continue
            factor, up, down = lora.scale * alpha / down.shape[0], up.astype(mx.float32), down.astype(mx.float32)
            change = factor * (up @ down)
            bound = abs(factor) * down.shape[0] * _largest(up) * _largest(down)
            if not bound <= MOST_CHANGE and not (most := _largest(change)) <= MOST_CHANGE:
                raise UserError(f"{key} changes weights by up to {most:g}: it holds NaN, infinity, or is damaged")
            for target in targets[module]:
                array = found[target.name]
                rows, columns = array.shape[0], array.size // array.shape[0]
                part = change[target.row : target.row + rows, target.column : target.column + columns]
                if target.swapped:
                    part = mx.concatenate([part[rows // 2 :], part[: rows // 2]])
                found[target.name] = array.astype(mx.float32) + part.reshape(array.shape)
    return found


def _largest(array: mx.array) -> float:
    """Return the largest magnitude in an array; NaN where it holds NaN."""
    return mx.abs(array).max().item()  # type: ignore[return-value]  # MLX's stubs say that it may be complex


def read_lora(lora: Lora) -> dict[str, dict]:
    """Read a LoRA's modules: name (dots as underscores, no prefix) -> A (rank, in), B (out, rank), alpha, and keys.

    Raises UserError for a file that cannot be read.
    """
    check_weight_file(lora.file)
    modules: dict[str, dict] = {}
    try:
        arrays = load_arrays(lora.file)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--lora {lora.file}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    for key, array in arrays.items():
        matched = PART.fullmatch(PREFIX.sub("", key))
        module = matched["module"].translate(FLAT) if matched else key
        parts = modules.setdefault(module, {"keys": []})
        parts["keys"].append(key)
        if matched is None:
            continue
        kind = next(name for name in ("A", "B", "alpha") if matched[name])
        if kind == "alpha":
            if array.size != 1:
                raise UserError(f"--lora {lora.file}: {key} has {array.size} values, not one")
            parts[kind] = array.astype(mx.float32).item()
        else:
            parts[kind] = array.reshape(*array.shape[:2]) if math.prod(array.shape[2:]) == 1 else array
    return modules | with_noted_alphas(lora, modules)


def with_noted_alphas(lora: Lora, modules: Mapping[str, dict]) -> dict[str, dict]:
    """Return the modules without an alpha of their own, with the alpha that the file's metadata notes for them.

    PEFT and diffusers keep the adapter's config there: alpha for all, alpha_pattern by module, use_rslora for alpha /
    √rank. Raises UserError for metadata that is no such config.
    """
    with safe_open(lora.file, "numpy") as file:
        noted = (file.metadata() or {}).get(ADAPTER_NOTE)
    try:
        config = {key.removeprefix("transformer."): value for key, value in orjson.loads(noted or "{}").items()}
        alphas = {
            pattern.translate(FLAT): float(alpha) for pattern, alpha in (config.get("alpha_pattern") or {}).items()
        }
        usual, by_root = config.get("lora_alpha"), bool(config.get("use_rslora"))
        found = {}
        for module, parts in modules.items():
            alpha = next((value for name, value in alphas.items() if module.endswith(name)), usual)
            if alpha is not None and "alpha" not in parts and "A" in parts:
                rank = parts["A"].shape[0]
                found[module] = parts | {"alpha": float(alpha) * (rank**0.5 if by_root else 1)}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"--lora {lora.file}: its note {ADAPTER_NOTE} is not the config of an adapter") from None
    return found


def targets_of(weights: Mapping[str, mx.array], family: Family) -> dict[str, list[Target]]:
    """Return the weights that each module name, dots as underscores, stands for in every layout."""
    hidden = weights["context_embedder.weight"].shape[0]
    last = max(int(found[1]) for found in map(MULTIMODAL_BLOCK.match, weights) if found)
    found: dict[str, list[Target]] = {}
    for name, array in weights.items():
        path = name.removesuffix(".weight")
        if path == name or array.size != array.shape[0] * array.shape[-1] or array.ndim == 1 or "pos_embed" in name:
            continue
        original = checkpoint_slice(family, name, hidden)
        module = original.key.removesuffix(".weight").translate(FLAT)
        found.setdefault(module, []).append(Target(name, original.row, original.column))
        theirs = path
        for ours, other in DIFFUSERS_PARTS:
            theirs = theirs.replace(ours, other)
        text_of_last = family is SD3 and theirs == f"transformer_blocks.{last}.norm1_context.linear"
        column = original.column if theirs.endswith("proj_out") else 0
        target = Target(name, 0, column, theirs == "norm_out.linear" or text_of_last)
        if theirs.translate(FLAT) != module:
            found.setdefault(theirs.translate(FLAT), []).append(target)
    return found


def shape_of(targets: Sequence[Target], weights: Mapping[str, mx.array]) -> tuple[int, int]:
    """Return (rows, columns) of a module that holds these weights."""
    arrays = [(target, weights[target.name]) for target in targets]
    return (
        max(target.row + array.shape[0] for target, array in arrays),
        max(target.column + array.size // array.shape[0] for target, array in arrays),
    )
