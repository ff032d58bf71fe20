"""The same weights as one GGUF file: Q4_1 holds codes of 4 bits in groups of 32 with a float16 scale and minimum, as they are.

Names are those of SD3's original checkpoint without its prefix, q, k and v in one, as image programs read them.
"""

from collections.abc import Mapping
from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from calibration_store.files import atomic_path, remove_file
from calibration_store.layout import QuantizedModelPaths
from w4a8.cli.progress import ProgressBar
from w4a8.model.original import checkpoint_key
from w4a8.quantized.export import Export, finite
from w4a8.quantized.layer import QuantizedLayer, deployed
from w4a8.quantized.model import quantized_places

ARCHITECTURE = "sd3"
JOINED = ("q_proj", "k_proj", "v_proj")  # in one tensor, in this order


def q4_1_blocks(layer: QuantizedLayer) -> np.ndarray:
    """A layer in groups of 32 as ggml's block_q4_1: (out, in / 32 · 20) uint8.

    A block is scale and minimum in float16, then 16 bytes: code i in the low half of byte i, code i + 16 in the high one.
    """
    scale, minimum = (
        array.astype("<f2")[..., None].view(np.uint8) for array in deployed(layer.scale, layer.zero_point)
    )
    codes = layer.codes.reshape(*scale.shape[:2], 2, 16)
    blocks = np.concatenate([scale, minimum, codes[:, :, 0] | (codes[:, :, 1] << 4)], axis=-1)
    return blocks.reshape(len(layer.codes), -1)


def write_gguf(paths: QuantizedModelPaths, export: Export, mmdit: nn.Module, bar: ProgressBar) -> Path:
    """Write the transformer; everything but the blocks' layers is float16, what has one dimension float32."""
    info = export.info
    path = paths.gguf(info.folder.name if info.folder is not None else info.version.rpartition("/")[2])
    tensors: dict[str, dict[str, np.ndarray]] = {}  # by key: the parts that are joined, by their name in the model
    for place in quantized_places(mmdit, export.weights):
        name = f"{place.path}.weight"
        tensors.setdefault(joined_key(name), {})[name] = q4_1_blocks(place.quantized)
        place.module.pop("weight")
        if place.quantized.bias is not None:
            place.module["bias"] = mx.array(place.quantized.bias)
        bar.update()
    packed = set(tensors)
    parameters = dict(tree_flatten(mmdit.parameters()))
    mmdit.clear()
    names = set(parameters)
    for name in names:
        array = parameters.pop(name)
        values = np.array(finite(name, array.astype(mx.float32 if array.ndim == 1 else mx.float16)))
        if name == "x_embedder.proj.weight":
            values = values.transpose(0, 3, 1, 2)
        elif name == "x_pos_embedder.pos_embed.weight":
            values = values[None]
        parts = tensors.setdefault(joined_key(name), {})
        parts[name] = values
        without = name.replace("q_proj", "k_proj")
        if name.endswith("q_proj.bias") and without not in names:
            parts[without] = np.zeros_like(values)  # DiffusionKit's k has no bias: softmax does not see it
    for old in paths.gguf_files():
        remove_file(old)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
        for key in sorted(tensors):
            kind = gguf.GGMLQuantizationType.Q4_1 if key in packed else None
            writer.add_tensor(key, joined(tensors.pop(key)), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def joined(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The rows of q, k and v in this order, or the one part that there is."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    return np.concatenate([array for role in JOINED for name, array in parts.items() if role in name])


def joined_key(name: str) -> str:
    """A parameter's key in the file; q, k and v of a stream share one."""
    for part in JOINED[1:]:
        name = name.replace(f"attn.{part}", f"attn.{JOINED[0]}")
    return checkpoint_key(name)
