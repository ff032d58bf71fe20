"""Open the original transformer lazily, in the precision of its file."""

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from calibration_store.model_folder import check_weight_file, read_model_config, weight_file
from calibration_store.safetensors_header import weight_shapes
from w4a8.model.catalog import ModelError, ModelInfo, model_files
from w4a8.model.diffusionkit import MMDiT
from w4a8.model.folder import transformer_config
from w4a8.model.lora import with_loras
from w4a8.model.original_checkpoint import read_original_checkpoint
from w4a8.model.original_model import original_names, original_transformer
from w4a8.model.weight_files import load_arrays


def open_transformer(info: ModelInfo, headers_only: bool = False) -> MMDiT:
    """Open a transformer whose weights are read when they are used, in the precision of their file.

    LoRAs are fused in float32. headers_only: for checks alone, weights that would be read at once are zeros. Raises ModelError when the file is not there, is not of this model, or is packed.
    """
    if info.folder is not None:
        config = read_model_config(info.folder)
        if "quantization" in config:
            way = "quantize the original model's"
            if info.loras:
                way = "a LoRA is fused in before, by generate_calibration_data.py --lora"
            raise ModelError(f"{info.version}: its weights are packed already; {way}")
        path = weight_file(info.folder, "mmdit")
        check_weight_file(path)
        names = weight_shapes(path)
        model = original_transformer(transformer_config(info.folder, config, mx.float16), names, info.guidance)
    else:
        path = info.checkpoint or _cached_file(info)
        size = info.family.config
        model = original_transformer(size, original_names(size, info.guidance is not None), info.guidance)
    try:
        if info.folder is not None:
            weights = load_arrays(path)
        else:
            weights = read_original_checkpoint(path, info.family, model, headers_only)
        model.load_weights(list(with_loras(weights, info.family, info.loras).items()))
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load {path}: {' '.join(str(error).split())[:200]}") from None
    return model


def check_loras(info: ModelInfo) -> None:
    """Raise UserError for a LoRA that does not fit a model, whose own weights need not be there: headers decide."""
    if info.folder is not None or info.checkpoint is not None:
        open_transformer(info, headers_only=True)
        return
    size = info.family.config
    model = original_transformer(size, original_names(size, info.guidance is not None), info.guidance)
    weights = {
        name: mx.zeros(array.shape, array.dtype) for name, array in dict(tree_flatten(model.parameters())).items()
    }
    with_loras(weights, info.family, info.loras)


def _cached_file(info: ModelInfo) -> Path:
    """Return the file of a hub model's transformer in the local cache. Raises ModelError where files are not there."""
    files = model_files(info, use_t5=False)
    if files is None:
        raise ModelError(f"{info.hub_id}: not in the local cache of the Hugging Face hub")
    return files["mmdit"]
