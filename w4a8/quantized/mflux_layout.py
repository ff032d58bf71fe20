"""Write an export of FLUX in the layout that mflux reads: transformer/ of a model folder, packed as MLX packs.

mflux 0.24 takes each component from its own folder. It recognises its own by the metadata `mflux_version`, and reads the
bits and the groups of every layer from the shapes of `weight` and `scales` (models/common/weights/loading). The names are
those of diffusers, with `ff.linear1` and `ff.linear2`. A layer's k has its bias. The other folders are those of the
original repository: vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import orjson
from mlx.utils import tree_flatten

from calibration_store.files import atomic_path
from calibration_store.layout import QuantizedModelPaths
from w4a8 import __version__
from w4a8.backend.progress import ProgressBar
from w4a8.model.diffusers_layout import diffusers_name, is_swapped
from w4a8.model.diffusionkit import MMDiT
from w4a8.model.families import family_of_architecture
from w4a8.quantized.export import ExportSource, pack_transformer, refuse_overflow

MFLUX_VERSION = "0.24.0"  # whose loader was read, and tried
MFLUX_PARTS = ((".ff.net.0.proj", ".ff.linear1"), (".ff.net.2", ".ff.linear2"), (".ff_context.net.0.proj", ".ff_context.linear1"),
               (".ff_context.net.2", ".ff_context.linear2"))  # fmt: skip
HALVES = (
    ".transformer_block.attn.o_proj",
    ".transformer_block.mlp.fc2",
)  # that are proj_out of a single block together
PACKED_PARTS = ("weight", "scales", "biases")


def write_mflux(paths: QuantizedModelPaths, export: ExportSource, mmdit: MMDiT, bar: ProgressBar) -> Any:
    """Pack the transformer, and write transformer/0.safetensors and its index; return the folder.

    Raises StoreError for an array that is not finite, and WriteError.
    """
    quantization = pack_transformer(mmdit, export.weights, bar)
    arrays = mflux_arrays(dict(tree_flatten(mmdit.parameters())), quantization)
    for name, array in arrays.items():
        refuse_overflow(name, array)
    mmdit.clear()
    paths.mflux.mkdir(parents=True, exist_ok=True)
    note = {"quantization_level": str(export.weights.bits), "mflux_version": MFLUX_VERSION, "w4a8_version": __version__}
    with atomic_path(paths.mflux_weights) as temporary, temporary.open("wb") as file:
        mx.save_safetensors(file, arrays, note)
    index = {"metadata": note, "weight_map": dict.fromkeys(sorted(arrays), paths.mflux_weights.name)}
    with atomic_path(paths.mflux_index) as temporary:
        temporary.write_bytes(orjson.dumps(index, option=orjson.OPT_INDENT_2))
    return paths.mflux


def mflux_arrays(parameters: Mapping[str, mx.array], quantization: Mapping[str, Any]) -> dict[str, mx.array]:
    """Return the parameters of a packed FLUX transformer under mflux's names, dense ones in bfloat16.

    quantization: the entry of config.json, with the groups and bits of each packed layer by its path.
    """
    flux, found = family_of_architecture("flux"), dict[str, mx.array]()
    for name, array in parameters.items():
        path, part = name.rsplit(".", 1)
        if path.endswith(HALVES[1]):
            continue  # beside its other half
        if path.endswith(HALVES[0]):
            other = path.replace(HALVES[0], HALVES[1])
            joined = beside(path, other, part, parameters, quantization)
            if joined is None:
                continue
            array = joined
        if path == "x_embedder.proj" and part == "weight":
            array = array.reshape(array.shape[0], -1)
        module = diffusers_name(flux, path)
        for ours, theirs in MFLUX_PARTS:
            module = module.replace(ours, theirs)
        if is_swapped(flux, module, 0):
            half = array.shape[0] // 2
            array = mx.concatenate([array[half:], array[:half]])
        found[f"{module}.{part}"] = array if array.dtype == mx.uint32 else array.astype(mx.bfloat16)
    return found


def beside(
    path: str, other: str, part: str, parameters: Mapping[str, mx.array], quantization: Mapping[str, Any]
) -> mx.array | None:
    """Return a part of the layer that two layers are together, side by side in their inputs; None where it has no such part.

    Packed parts are joined where both have the same bits and groups, exactly. Otherwise the joined layer is dense.
    """
    if part == "bias":
        return parameters[f"{path}.bias"]  # DiffusionKit adds that of o_proj alone
    ways = [quantization.get(each) for each in (path, other)]
    if ways[0] and ways[0] == ways[1]:
        return mx.concatenate([parameters[f"{each}.{part}"] for each in (path, other)], axis=1)
    if part != "weight":
        return None
    dense = []
    for each, way in zip((path, other), ways, strict=True):
        weight = parameters[f"{each}.weight"]
        if way:
            scales, biases = (parameters[f"{each}.{name}"] for name in PACKED_PARTS[1:])
            weight = mx.dequantize(weight, scales, biases, way["group_size"], way["bits"])
        dense.append(weight)
    return mx.concatenate(dense, axis=1)
