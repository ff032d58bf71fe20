"""Pack a model's transformer a layer at a time, and write it as a model folder that MLX runs (stage 5)."""

import os
import shutil
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import orjson
from mlx.utils import tree_flatten, tree_unflatten

from calibration_store.choices import GGUF_GROUP
from calibration_store.errors import OptionError, StoreError
from calibration_store.files import (
    Replacements,
    file_digest,
    open_regular,
    remove_file,
    replacements,
    sync_folder,
)
from calibration_store.layout import QuantizedModelPaths
from calibration_store.model_folder import (
    T5_PART,
    captions_file,
    config_digest,
    config_file,
    folder_files,
    read_model_config,
    role_of,
    weight_file,
    weights_fingerprint,
)
from calibration_store.quantized_model import EXPORT_FORMAT, encode_activations, is_export
from w4a8 import __version__
from w4a8.backend.estimates import Estimate
from w4a8.backend.progress import ProgressBar
from w4a8.model.catalog import ModelInfo
from w4a8.model.diffusionkit import MMDiT
from w4a8.model.hub_export import (
    complete_hub_config,
    hub_decoder,
    hub_encoder,
    hub_tokenizer,
    own_parts,
    text_encoders,
)
from w4a8.model.layers import model_layers
from w4a8.model.original_model import K_BIAS
from w4a8.model.packed import native_module
from w4a8.quantized.activation_rules import ActivationRule
from w4a8.quantized.layer import packed_group
from w4a8.quantized.model import GROUPS_OF_THE_REST, Codes, StoredWeights, quantized_modules

MFLUX_GROUPS = (32, 64, 128)  # that its loader infers from the shapes
GGUF_BITS = 5  # codes of more bits have no exact form in GGUF: their layers are written as float16
NamedArrays = dict[str, mx.array]


@dataclass(frozen=True)
class ExportSource:
    """A model to export, its quantized weights and the rule for its inputs; names as in stage 4's variants."""

    info: ModelInfo
    manifest: Mapping[str, Any]
    weights_name: str
    weights: Codes
    activations: str | None
    rule: ActivationRule | None

    def note(self, files: Mapping[Path, Path]) -> dict[str, Any]:
        """Return the `export` entry of config.json: the weights' origin, and digests of the files that decide images.

        files: final path -> temporary path that the file has now.
        """
        learned = self.weights if isinstance(self.weights, StoredWeights) else None
        made_from = learned.metadata if learned else {}
        ranges = self.rule.made_from[0][1] if self.rule is not None and self.rule.made_from else {}
        run = made_from if learned else ranges
        return {
            "format": EXPORT_FORMAT,
            "w4a8_version": __version__,
            "weights": self.weights_name,
            "weight_bits": self.weights.bits,
            "layer_bits": made_from.get("layer_bits", {}),
            "excluded": list(self.weights.excluded),
            "group_size": self.weights.group_size,
            "activations": self.activations,
            "model_version": self.manifest["model_version"],
            "weights_fingerprint": self.manifest["weights_fingerprint"],
            "calibration_run": run.get("calibration_run"),
            "selected_image_ids": run.get("selected_image_ids", []),
            "adaround_weights": learned and file_digest(learned.paths.metadata),
            **({"migrated": True} if self.weights.multipliers() else {}),
            "files": {
                role: weights_fingerprint({role: written})
                for path, written in files.items()
                if (role := role_of(path)) is not None
            },
        }

    def encoded_rule(self) -> bytes:
        """Return the content of activations.json; empty where inputs are not quantized."""
        if self.rule is None:
            return b""
        content = self.rule.exported()
        assert content is not None  # rules that are not exported are refused as options
        return encode_activations(content)


@dataclass(frozen=True)
class Size:
    """Bytes of a transformer on the disk: of its quantized modules and of the whole, each beside its float16 size."""

    quantized: int
    quantized_float16: int
    modules: int  # number of quantized modules
    transformer: int
    transformer_float16: int
    largest_layer: int  # number of weights

    @property
    def peak(self) -> int:
        """Bytes that exporting holds in memory: the file, and one layer with its float32 copies."""
        return self.transformer + 16 * self.largest_layer


def packed_size(mmdit: nn.Module, weights: Codes) -> Size:
    """Compute the size of the packed model, from shapes alone."""
    layers = {id(layer.module): name for name, layer in model_layers(mmdit).items()}
    excluded, others = set(weights.excluded), weights.other_layers
    quantized = dense = modules = other = other_float16 = largest = 0
    for path, module in mmdit.named_modules():
        for key, array in module.items():
            if not isinstance(array, mx.array) or key.startswith("_"):
                continue
            name, group = layers.get(id(module)), weights.group_size
            bits = weights.bits_of(name) if name is not None and name not in excluded else 0
            if name is None and others is not None and others.includes(path, module):
                bits, group = others.bits, GROUPS_OF_THE_REST
            if key == "weight" and bits and isinstance(module, (nn.Linear, nn.Embedding)):
                quantized += array.size * bits // 8 + 4 * array.size // packed_group(array.shape[1], group)
                dense += 2 * array.size
                modules += 1
                largest = max(largest, array.size)
            else:
                other += array.nbytes
                other_float16 += 2 * array.size
    return Size(quantized, dense, modules, quantized + other, dense + other_float16, largest)


def pack_transformer(mmdit: MMDiT, weights: Codes, bar: ProgressBar) -> dict[str, Any]:
    """Put native layers in place of the dense ones. A dense weight is dropped as soon as it is packed.

    Returns the `quantization` entry of config.json, as MLX's own tools write it: group_size, bits and mode of the
    first layer, then those of every packed layer by its path, and False for the modules that stay dense.
    """
    modules = {path: m for path, m in mmdit.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    entry: dict[str, Any] = {}
    for each in quantized_modules(mmdit, weights):
        packed = each.quantized.packed(each.bits)
        if each.quantized.bias is not None:
            each.module["bias"] = mx.array(each.quantized.bias).astype(mx.float16)
        native = native_module(each.module, packed)
        mx.eval(native.parameters())
        each.module.clear()
        mmdit.update_modules(tree_unflatten([(each.path, native)]))
        layer = {"group_size": packed.group_size, "bits": packed.bits, "mode": "affine"}
        entry = entry or dict(layer)
        entry[each.path] = layer
        bar.update()
    return entry | {path: False for path in modules if path not in entry}


def refuse_overflow(name: str, array: mx.array) -> mx.array:
    """Return the array. Raises StoreError where it is not finite; packed words (uint32) always are."""
    if array.dtype != mx.uint32 and not mx.isfinite(array).all().item():
        raise StoreError(f"{name} holds NaN or infinity; it is not exported")
    return array


def write_arrays(files: Replacements, path: Path, arrays: NamedArrays) -> None:
    """Write a safetensors file, which takes its final path together with the other files."""
    with files.write(path) as file:
        mx.save_safetensors(file, arrays, {"format": "mlx"})


RestOfModel = tuple[dict[str, NamedArrays], list[Path], dict[str, Any]]


def rest_of_model(export: ExportSource, complete: bool) -> RestOfModel:
    """Return the contents of an exported folder beside the transformer.

    They are arrays by part, files to copy, and the content of config.json so far.
    """
    info = export.info
    if info.folder is not None:
        captions, config_path = captions_file(info.folder), config_file(info.folder)
        parts = encoder_parts(info, own_parts(info))
        changed = ("mmdit", *parts)
        files = [p for role, p in folder_files(info.folder).items() if role not in changed and p != config_path]
        return parts, files + ([captions] if captions else []), read_model_config(info.folder)
    config: dict[str, Any] = {"name": info.version.rpartition("/")[2], "base_model": info.version}
    config |= {"sampler_shift": info.sampler_shift} if "shift" in export.manifest else {}
    config |= {} if export.manifest["use_t5"] else {"use_t5": False}  # drawing follows; --t5 brings it back
    own = own_parts(info)
    parts = {"decoder": hub_decoder(info)} if complete or "decoder" in own else {}
    if not complete:
        return parts | encoder_parts(info, own), [], config
    encoders = text_encoders(info, export.manifest["use_t5"])
    parts |= {name: dict(tree_flatten(encoder.parameters())) for name, encoder in encoders.items()}
    return parts, hub_tokenizer(T5_PART in encoders), complete_hub_config(info, encoders.get(T5_PART))


def encoder_parts(info: ModelInfo, wanted: AbstractSet[str]) -> dict[str, NamedArrays]:
    """Return the parameters of those CLIP encoders of a model that are wanted, with LoRAs fused, in 16 bits."""
    names = [name for name in info.family.clip if name in wanted]
    encoders = text_encoders(info) if names else {}
    return {name: dict(tree_flatten(encoders[name].parameters())) for name in names}


def bytes_needed(export: ExportSource, size: Size, rest: RestOfModel, hub_file: bool) -> int:
    """Return the number of bytes that an export writes; hub_file adds the transformer again, and SD3's whole VAE."""
    parts, copied, _ = rest
    arrays = {name: sum(array.nbytes for array in part.values()) for name, part in parts.items()}
    ranges = len(export.encoded_rule())
    again = size.transformer + 2 * arrays.get("decoder", 0) if hub_file else 0
    return size.transformer + sum(arrays.values()) + sum(path.stat().st_size for path in copied) + ranges + again


def write_folder(
    paths: QuantizedModelPaths, export: ExportSource, mmdit: MMDiT, quantization: dict[str, Any], rest: RestOfModel,
    hub_file: bool,
) -> Path:  # fmt: skip
    """Write an exported model folder, and return its path.

    An older export is removed when every file of the new one is on the disk. hub_file: write the layout of
    DiffusionKit's 4-bit file, too. Raises WriteError, and leaves the older export, where the disk is too small for
    both.
    """
    parts, copied, config = rest
    parts = {"mmdit": dict(tree_flatten(mmdit.parameters())), **parts}
    half = getattr(mx, export.info.family.half)
    for arrays in parts.values():
        for name, array in arrays.items():
            refuse_overflow(name, array)
            if export.info.loras and array.dtype == mx.float32:
                arrays[name] = array.astype(half)  # a dense array that a LoRA was fused into
    old = paths.owned_files()
    with replacements() as files:
        for part, arrays in parts.items():
            write_arrays(files, weight_file(paths.root, part), arrays)
        for path in copied:
            copy_file(files, path, paths.root / path.name)
        if export.rule is not None:
            with files.write(paths.activations) as file:
                file.write(export.encoded_rule())
        if hub_file:
            write_arrays(files, paths.hub_file(export.info.version), hub_arrays(export, mmdit))
        config = config | {"quantization": quantization}
        note = export.note(files.written) | {"config": config_digest(config)}
        with files.write(paths.config) as file:
            file.write(orjson.dumps(config | {"export": note}, option=orjson.OPT_INDENT_2) + b"\n")
        remove_file(paths.config)  # config.json never stands beside another export's files; the old export ends here
        for path in set(old) - set(files.written):
            remove_file(path)
    sync_folder(paths.root)
    return paths.root


def hub_arrays(export: ExportSource, mmdit: MMDiT) -> NamedArrays:
    """Return the transformer, and for SD3 its VAE, in the layout of DiffusionKit's 4-bit file."""
    info = export.info
    arrays = {
        info.family.checkpoint.prefix + name: array
        for name, array in dict(tree_flatten(mmdit.parameters())).items()
        if not name.endswith(K_BIAS)  # DiffusionKit's module has none, and its loader refuses one
    }
    if info.family.checkpoint.vae_inside:
        vae = {"decoder": hub_decoder(info), "encoder": hub_encoder(info)}
        for part, weights in vae.items():
            arrays |= {f"{info.family.checkpoint.vae_prefix}{part}.{name}": array for name, array in weights.items()}
    return arrays


def copy_file(files: Replacements, source: Path, target: Path) -> None:
    """Copy a file, which takes its final path together with the other files."""
    with open_regular(source, "give the original model", limit=None) as read, files.write(target) as file:
        shutil.copyfileobj(read, file)


def check_output(paths: QuantizedModelPaths, info: ModelInfo, layout: str, force: bool) -> None:
    """Raise StoreError for a folder that must not be written to.

    Such a folder is the original model's own, holds files that stage 5 did not write, or holds an export without
    --force.
    """
    if info.folder is not None and os.path.realpath(info.folder) == os.path.realpath(paths.root):
        raise StoreError(f"{paths.root}: is the original model; give another --output")
    owned, gguf_files = paths.owned_files(), paths.gguf_files()  # raises StoreError for a folder that cannot be read
    present = set(paths.root.iterdir()) if paths.root.is_dir() else set()
    mflux = paths.mflux_files()
    ours = {*owned, *gguf_files, *mflux, *paths.card_files()}
    foreign = sorted(path.name for path in present - ours if path.name != ".DS_Store")
    if paths.config in owned and not is_export(paths.config):
        foreign.append(paths.config.name)
    if foreign:
        raise StoreError(f"{paths.root}: holds {foreign[0]}, which stage 5 did not write; give another --output")
    if {"gguf": gguf_files, "mflux": mflux}.get(layout, owned) and not force:
        raise StoreError(f"{paths.root}: holds an export; give --force to make it anew, or another --output")


def estimate_export(mmdit: MMDiT, weights: Codes, size: Size, folder: Path) -> Estimate:
    """Estimate an export from its second layer, because the first one includes the time of one-time preparations."""
    modules = quantized_modules(mmdit, weights)
    next(modules)
    begin = time.perf_counter()
    second = next(modules)
    mx.eval(second.quantized.packed(second.bits).scales)
    seconds = (time.perf_counter() - begin) * size.quantized_float16 / (2 * second.quantized.codes.size)
    return Estimate(
        work=f"{size.modules} layers",
        seconds=seconds,
        bytes_written=size.transformer,
        folder=folder,
        peak_bytes=size.peak,
    )


def refuse_options(export: ExportSource, layout: str, complete: bool, text_bits: str | None) -> None:
    """Raise OptionError for options that a layout cannot hold, or that would change nothing."""
    weights, others = export.weights, export.weights.other_layers
    if layout == "gguf" and (weights.bits > GGUF_BITS or weights.group_size != GGUF_GROUP):
        groups = f"groups of {weights.group_size}" if weights.group_size else "a scale per channel"
        raise OptionError(
            f"--format gguf: Q4_1 and Q5_1 have 4 and 5 bits and groups of 32, and {export.weights_name} has "
            f"{weights.bits} bits, {groups}; train with optimize_adaround.py --group-size 32, or give --weights w4-rtn-g32"
        )
    if layout == "gguf" and others is not None:
        raise OptionError(
            "--format gguf: everything beside the blocks' layers stays float16; leave --rest-bits and --all-linears out"
        )
    if layout != "mlx" and export.activations is not None:
        raise OptionError(f"--format {layout}: holds no ranges of activations; leave --activations out")
    if layout == "mflux" and (export.info.family.architecture != "flux" or export.info.hub_id is None):
        raise OptionError(f"--format mflux: mflux knows FLUX, and not {export.info.version}")
    if layout == "mflux" and weights.group_size not in MFLUX_GROUPS:
        groups = str(weights.group_size or "a scale per channel")
        raise OptionError(f"--format mflux: groups of 32, 64 or 128, and {export.weights_name} has {groups}")
    if complete and export.info.family.needs_t5:
        raise OptionError("--complete: a folder with everything is in SD3's layout; leave it out")
    if complete and (layout != "mlx" or export.info.folder is not None):
        raise OptionError("--complete goes with a hub model and --format mlx; the export of a model folder is complete")
    if text_bits is not None and not (complete and export.manifest["use_t5"]):
        raise OptionError(
            f"--text-bits {text_bits}: no T5 is written; it goes with --complete, and with a run that used T5"
        )
    if (
        others is not None
        and others.all_linears
        and (weights.bits, weights.group_size, weights.uniform) != (4, 64, True)
    ):
        raise OptionError(
            f"--all-linears: DiffusionKit's layout has 4 bits in groups of 64, and {export.weights_name} has not"
        )
