"""Stage 5: pack a model's transformer a layer at a time, and write it as a model folder that MLX runs."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from calibration_store.errors import OptionError, StoreError
from calibration_store.files import atomic_file, remove_file, sync_folder, write_json
from calibration_store.layout import QuantizedModelPaths
from calibration_store.model_folder import (
    captions_file,
    folder_files,
    read_model_config,
    weight_file,
    weights_fingerprint,
)
from calibration_store.quantized_model import EXPORT_FORMAT, write_activations
from w4a8.cli.progress import ProgressBar
from w4a8.model.catalog import ModelInfo
from w4a8.model.diffusionkit import MMDiT
from w4a8.model.layers import model_layers
from w4a8.model.original import CHECKPOINT_PREFIX, complete_hub_config, hub_text_encoders, hub_tokenizer, hub_vae
from w4a8.quantized.activation_rules import ActivationRule
from w4a8.quantized.exported import file_digest
from w4a8.quantized.model import Codes, StoredWeights, quantized_places
from w4a8.quantized.native import native_module

HUB_4BIT_MODEL = "argmaxinc/mlx-stable-diffusion-3.5-large"  # of which DiffusionKit has a 4-bit file
Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Export:
    """What is exported: a model, its quantized weights and the rule for its inputs; names as in stage 4's variants."""

    info: ModelInfo
    local_checkpoint: Path | None
    manifest: Mapping[str, Any]
    weights_name: str
    weights: Codes
    activations: str | None
    rule: ActivationRule | None

    def note(self, files: Mapping[str, Path]) -> dict[str, Any]:
        """config.json's `export`: where this comes from, and which weight files belong to it."""
        learned = self.weights if isinstance(self.weights, StoredWeights) else None
        made_from = learned.metadata if learned else {}
        return {
            "format": EXPORT_FORMAT,
            "weights": self.weights_name,
            "weight_bits": self.weights.bits,
            "group_size": self.weights.group_size,
            "activations": self.activations,
            "model_version": self.manifest["model_version"],
            "weights_fingerprint": self.manifest["weights_fingerprint"],
            "calibration_run": made_from.get("calibration_run"),
            "selected_image_ids": made_from.get("selected_image_ids", []),
            "adaround_weights": learned and file_digest(learned.paths.metadata),
            "files": {part: weights_fingerprint({part: path}) for part, path in files.items()},
        }


@dataclass(frozen=True)
class Size:
    """Bytes of a transformer on the disk: its quantized modules (and how many), all of it, and the same in float16."""

    quantized: int
    quantized_float16: int
    modules: int
    transformer: int
    transformer_float16: int
    largest_layer: int  # weights

    @property
    def peak(self) -> int:
        """What exporting holds in memory: the file, and a layer with its float32 copies."""
        return self.transformer + 16 * self.largest_layer


def packed_size(mmdit: nn.Module, weights: Codes) -> Size:
    """What packing this model gives, from shapes alone."""
    layers = {id(layer.module) for layer in model_layers(mmdit).values()}
    quantized = dense = modules = other = largest = 0
    for path, module in mmdit.named_modules():
        for key, array in module.items():
            if not isinstance(array, mx.array) or key.startswith("_"):
                continue
            in_block, bits, group = id(module) in layers, weights.bits, weights.group_size or 128
            if not in_block:
                held = weights.rest is not None and weights.rest.holds(path, module)
                bits, group = (weights.rest.bits, 64) if held else (0, 0)
            if key == "weight" and bits and isinstance(module, (nn.Linear, nn.Embedding)):
                quantized += array.size * bits // 8 + 4 * array.size // group
                dense += 2 * array.size
                modules += 1
                largest = max(largest, array.size)
            else:
                other += 2 * array.size
    return Size(quantized, dense, modules, quantized + other, dense + other, largest)


def pack_transformer(mmdit: MMDiT, weights: Codes, bar: ProgressBar) -> dict[str, Any]:
    """Native layers in place of the dense ones; returns the `quantization` entry of config.json, as MLX's tools write it.

    A dense weight is let go as soon as it is packed.
    """
    modules = {path: m for path, m in mmdit.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    entry: dict[str, Any] = {}
    for place in quantized_places(mmdit, weights):
        packed = place.quantized.packed(place.bits)
        if place.quantized.bias is not None:
            place.module["bias"] = mx.array(place.quantized.bias).astype(mx.float16)
        native = native_module(place.module, packed)
        mx.eval(native.parameters())
        place.module.clear()
        mmdit.update_modules(tree_unflatten([(place.path, native)]))
        layer = {"group_size": packed.group_size, "bits": packed.bits, "mode": "affine"}
        entry = entry or dict(layer)
        entry[place.path] = layer
        bar.update()
    return entry | {path: False for path in modules if path not in entry}


def finite(name: str, array: Any) -> Any:
    """The array, NumPy or MLX. Raises StoreError where it is not finite."""
    whole = array.dtype == mx.uint32 or bool((mx if isinstance(array, mx.array) else np).isfinite(array).all())
    if not whole:
        raise StoreError(f"{name} holds NaN or infinity; it is not exported")
    return array


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write a safetensors file atomically. Raises StoreError for values that are not finite."""
    for name, array in arrays.items():
        finite(name, array)
    with atomic_file(path) as file:
        mx.save_safetensors(file, arrays, {"format": "mlx"})


def write_folder(
    paths: QuantizedModelPaths, export: Export, mmdit: MMDiT, quantization: dict[str, Any], complete: bool
) -> Path:
    """Write an exported model folder, config.json last; an older export is removed first. Returns the folder."""
    info, arrays = export.info, dict(tree_flatten(mmdit.parameters()))
    for name, array in arrays.items():
        finite(name, array)
    for old in sorted(
        paths.owned_files(), key=lambda path: path != paths.config
    ):  # config.json first: none without its files
        remove_file(old)
    write_arrays(weight_file(paths.root, "mmdit"), arrays)
    config: dict[str, Any]
    if info.folder is not None:
        config = read_model_config(info.folder)
        for role, path in folder_files(info.folder).items():
            if role not in ("mmdit", paths.config.name):
                copy_file(path, paths.root / path.name)
        captions = captions_file(info.folder)
        if captions is not None:
            copy_file(captions, paths.root / captions.name)
    elif complete:
        config = complete_hub_config(info)
        for part, module in hub_text_encoders(info).items():
            write_arrays(weight_file(paths.root, part), dict(tree_flatten(module.parameters())))
        for path in hub_tokenizer():
            copy_file(path, paths.root / path.name)
        write_arrays(weight_file(paths.root, "decoder"), hub_vae(info, export.local_checkpoint)["decoder"])
    else:
        config = {"name": info.version.rpartition("/")[2], "base_model": info.version}
        if export.local_checkpoint is not None:  # whose decoder is not the hub's
            write_arrays(weight_file(paths.root, "decoder"), hub_vae(info, export.local_checkpoint)["decoder"])
    if export.rule is not None:
        write_activations(paths, export.rule.exported())
    written = {
        role: path
        for role, path in folder_files(paths.root, "base_model" in config).items()
        if path.suffix == ".safetensors"
    }
    write_json(paths.config, config | {"quantization": quantization, "export": export.note(written)})
    sync_folder(paths.root)
    return paths.root


def write_hub_file(paths: QuantizedModelPaths, export: Export, mmdit: MMDiT) -> Path:
    """The same in the layout of DiffusionKit's 4-bit SD3.5-large: every linear layer packed, VAE in the same file."""
    arrays = {CHECKPOINT_PREFIX + name: array for name, array in tree_flatten(mmdit.parameters())}
    for part, weights in hub_vae(export.info, export.local_checkpoint).items():
        arrays |= {f"first_stage_model.{part}.{name}": array for name, array in weights.items()}
    write_arrays(paths.hub_file(), arrays)
    return paths.hub_file()


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    with source.open("rb") as read, atomic_file(target) as file:
        shutil.copyfileobj(read, file)


def check_output(paths: QuantizedModelPaths, layout: str, force: bool) -> None:
    """Raise StoreError where a folder holds an export and --force is not given, or files that are none of ours."""
    present = set(paths.root.iterdir()) if paths.root.is_dir() else set()
    owned, gguf_files = paths.owned_files(), paths.gguf_files()
    foreign = sorted(path.name for path in present - {*owned, *gguf_files})
    if paths.config in owned and "export" not in read_config_bytes(paths.config):
        foreign.append(paths.config.name)
    if foreign:
        raise StoreError(f"{paths.root}: holds {foreign[0]}, which stage 5 did not write; give another --output")
    if (gguf_files if layout == "gguf" else owned) and not force:
        raise StoreError(f"{paths.root}: holds an export; give --force to make it anew, or another --output")


def read_config_bytes(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def estimated_seconds(mmdit: MMDiT, weights: Codes, size: Size) -> float:
    """Seconds that packing takes, from the second layer's: the first pays for what is set up once."""
    places = quantized_places(mmdit, weights)
    next(places)
    begin = time.perf_counter()
    second = next(places)
    mx.eval(second.quantized.packed(second.bits).scales)
    return (time.perf_counter() - begin) * size.quantized_float16 / (2 * second.quantized.codes.size)


def refuse_options(export: Export, layout: str) -> None:
    """What a layout cannot hold. Raises OptionError."""
    weights, rest = export.weights, export.weights.rest
    if layout == "gguf" and (weights.bits, weights.group_size) != (4, 32):
        raise OptionError(
            f"--format gguf: Q4_1 has 4 bits and groups of 32, and {export.weights_name} has {weights.bits} bits, groups of "
            f"{weights.group_size or 'a channel'}; train with optimize_adaround.py --group-size 32"
        )
    if layout == "gguf" and rest is not None:
        raise OptionError(
            "--format gguf: everything beside the blocks' layers stays float16; leave --rest-bits and --all-linears out"
        )
    if rest is not None and rest.all_linears and (weights.bits, weights.group_size) != (4, 64):
        raise OptionError(
            f"--all-linears: DiffusionKit's layout has 4 bits in groups of 64, and {export.weights_name} has not"
        )
    if export.rule is not None and export.rule.exported() is None:
        raise OptionError(f"--activations {export.activations}: not a rule that an export can hold")
