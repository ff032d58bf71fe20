"""Write quantized weights as one GGUF file.

Q4_1 and Q5_1 hold codes of 4 and 5 bits in groups of 32, with a float16 scale and minimum, exactly. Layers of more
bits are written as MLX unpacks them, in float16. Names are those of the original checkpoint without its prefix, with q,
k and v in one tensor, as image programs read them.
"""

from collections.abc import Mapping
from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from calibration_store.files import atomic_path
from calibration_store.layout import QuantizedModelPaths
from calibration_store.model_config import HEAD_WIDTH
from w4a8 import __version__
from w4a8.backend.progress import ProgressBar
from w4a8.model.families import Family
from w4a8.model.layers import UnifiedBlock, model_layers
from w4a8.model.licences import licence_of, original_of
from w4a8.model.original_checkpoint import CheckpointSlice, checkpoint_slice
from w4a8.model.original_model import K_BIAS
from w4a8.quantized.export import GGUF_BITS, ExportSource, refuse_overflow
from w4a8.quantized.layer import QuantizedLayer, deployed
from w4a8.quantized.model import Codes, quantized_modules

UNIFIED_BLOCKS = UnifiedBlock.attribute
KINDS = {4: gguf.GGMLQuantizationType.Q4_1, 5: gguf.GGMLQuantizationType.Q5_1}


def packed_blocks(layer: QuantizedLayer, bits: int) -> np.ndarray:
    """Pack a layer in groups of 32 as ggml's block_q4_1 (4 bits) or block_q5_1 (5 bits).

    Returns uint8, (out, in / 32 · 20) with 4 bits and (out, in / 32 · 24) with 5. A block is scale and minimum in
    float16, with 5 bits the codes' highest bits as uint32, then 16 bytes: the low 4 bits of code i in the low half of
    byte i, those of code i + 16 in the high half.
    """
    scale, minimum = (
        array.astype("<f2")[..., None].view(np.uint8) for array in deployed(layer.scale, layer.zero_point)
    )
    codes = layer.codes.reshape(*scale.shape[:2], 2, 16)
    highest = [np.packbits(codes.reshape(*scale.shape[:2], 32) >> 4, axis=-1, bitorder="little")] if bits == 5 else []
    low = codes & 15
    blocks = np.concatenate([scale, minimum, *highest, low[:, :, 0] | (low[:, :, 1] << 4)], axis=-1)
    return blocks.reshape(len(layer.codes), -1)


def write_gguf(paths: QuantizedModelPaths, export: ExportSource, mmdit: nn.Module, bar: ProgressBar) -> Path:
    """Write the transformer, and return the file's path.

    Arrays of one dimension are float32, all others beside the blocks' packed layers float16. `mmdit` is emptied. Raises
    StoreError for an array that is not finite.
    """
    info, family, hidden = export.info, export.info.family, mmdit.config.hidden_size
    patches = mmdit.config.patchify_via_reshape
    title = info.folder.name if info.folder is not None else info.version.rpartition("/")[2]
    tensors: dict[str, dict[CheckpointSlice, np.ndarray]] = {}  # by key: the parts that are joined to one tensor
    kinds: dict[str, gguf.GGMLQuantizationType] = {}  # by key, of the packed tensors
    width_of = joined_widths(mmdit, export.weights, family)
    for each in quantized_modules(mmdit, export.weights):
        part = checkpoint_slice(family, f"{each.path}.weight", hidden)
        width = width_of[part.key]
        if width is None:
            each.module["weight"] = each.quantized.packed(each.bits).dense(mx.float16)
        else:
            tensors.setdefault(part.key, {})[part] = packed_blocks(each.quantized, width)
            kinds[part.key] = KINDS[width]
            each.module.pop("weight")
        if each.quantized.bias is not None:
            each.module["bias"] = mx.array(each.quantized.bias)
        bar.update()
    parameters = dict(tree_flatten(mmdit.parameters()))
    biases = {name for name in parameters if name.endswith(K_BIAS)}
    mmdit.clear()
    for name in list(parameters):
        array, part = parameters.pop(name), checkpoint_slice(family, name, hidden)
        values = np.array(refuse_overflow(name, array.astype(mx.float32 if array.ndim == 1 else mx.float16)))
        if name == "x_embedder.proj.weight":
            values = values[:, 0, 0] if patches else values.transpose(0, 3, 1, 2)
        elif name == "x_pos_embedder.pos_embed.weight":
            values = values[None]
        if name.startswith(UNIFIED_BLOCKS) and name.endswith("mlp.fc2.bias"):
            continue  # the file has one bias for o_proj and fc2, and DiffusionKit uses that of o_proj
        tensors.setdefault(part.key, {})[part] = values
        if (
            name.endswith("q_proj.bias") and name.replace("q_proj", "k_proj") not in biases
        ):  # the file's qkv has one bias
            k_part = checkpoint_slice(family, name.replace("q_proj", "k_proj"), hidden)
            tensors[part.key][k_part] = np.zeros_like(values)
    five = sum(kind == KINDS[5] for kind in kinds.values()) > len(kinds) / 2
    path = paths.gguf(title, "q5_1" if five else "q4_1")
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, family.architecture)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q5_1 if five else gguf.LlamaFileType.MOSTLY_Q4_1)
        describe_file(writer, export, title)
        for key in sorted(tensors):
            writer.add_tensor(key, joined_slices(tensors.pop(key)), raw_dtype=kinds.get(key))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def describe_file(writer: gguf.GGUFWriter, export: ExportSource, name: str) -> None:
    """Add the fields about the file's origin: name, base model, licence, and how it was quantized."""
    writer.add_name(f"{name} {export.weights_name}")
    writer.add_quantized_by(f"w4a8 {__version__}")
    licence, base = licence_of(export.info), original_of(export.info)
    writer.add_license(licence.id)
    if licence.name is not None:
        writer.add_license_name(licence.name)
    if licence.link is not None:
        writer.add_license_link(licence.link)
    if base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        writer.add_base_model_organization(0, base.partition("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    writer.add_string("w4a8.weights", export.weights_name)
    writer.add_string("w4a8.weights_fingerprint", export.manifest["weights_fingerprint"])
    writer.add_string(
        "w4a8.activations", "a8-block: ggml multiplies packed weights with inputs of 8 bits in blocks of 32"
    )


def misread_elsewhere(mmdit: nn.Module, family: Family) -> str | None:
    """Return a sentence where programs that take SD3's depth from width / 64 would misread a file, else None."""
    config = mmdit.config
    if family.architecture != "sd3" or config.hidden_size == HEAD_WIDTH * config.depth_multimodal:
        return None
    return (
        f"{config.depth_multimodal} blocks of {config.hidden_size} channels: ComfyUI-GGUF and stable-diffusion.cpp take the "
        f"depth of SD3 from the width ({HEAD_WIDTH} channels a block) and misread this file; gguf's reader and "
        "diffusers read it"
    )


def joined_widths(mmdit: nn.Module, weights: Codes, family: Family) -> dict[str, int | None]:
    """Return the bits of each tensor that layers are joined to, by its key.

    The largest of its layers' bits decides: at most 4 gives 4, 5 gives 5, and more gives None, as do excluded layers.
    """
    path_of = {id(module): path for path, module in mmdit.named_modules()}
    found: dict[str, set[int]] = {}
    for name, layer in model_layers(mmdit).items():
        bits = weights.bits_of(name) if name not in weights.excluded else 16
        key = checkpoint_slice(family, f"{path_of[id(layer.module)]}.weight", mmdit.config.hidden_size).key
        found.setdefault(key, set()).add(bits)
    return {key: None if max(bits) > GGUF_BITS else max(4, max(bits)) for key, bits in found.items()}


def joined_slices(parts: Mapping[CheckpointSlice, np.ndarray]) -> np.ndarray:
    """Join the parts of a tensor in the order of their rows, or of their columns."""
    ordered = sorted(parts)
    return np.concatenate([parts[part] for part in ordered], axis=1 if ordered[-1].column else 0)
