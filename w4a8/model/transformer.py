"""The original transformer, read lazily in the precision of its file."""

import dataclasses
from pathlib import Path

import mlx.core as mx

from calibration_store.model_folder import check_weight_file, read_model_config, weight_file
from w4a8.model.catalog import ModelError, ModelInfo, model_files
from w4a8.model.diffusionkit import HUB_MMDIT_CONFIGS, MMDiT
from w4a8.model.folder import transformer_config
from w4a8.model.lora import with_loras
from w4a8.model.original_checkpoint import read_original_checkpoint


def open_transformer(info: ModelInfo, local_checkpoint: Path | None) -> MMDiT:
    """The transformer with weights that are read when they are asked for, in the precision of their file; LoRAs fused in float32.

    A hub model is in the local cache: its fingerprint was checked. Raises ModelError when the file is not there, is not of this model, or packed already.
    """
    if info.folder is not None:
        config = read_model_config(info.folder)
        if "quantization" in config:
            raise ModelError(f"{info.version}: its weights are packed already; quantize the original model's")
        path = weight_file(info.folder, "mmdit")
        model = MMDiT(transformer_config(info.folder, config, mx.float16))
        check_weight_file(path)
    else:
        path = local_checkpoint or model_files(info, use_t5=False)["mmdit"]
        model = MMDiT(dataclasses.replace(HUB_MMDIT_CONFIGS[info.version], low_memory_mode=False))
    try:
        weights = mx.load(str(path)) if info.folder is not None else read_original_checkpoint(path, info.family, model.config)
        model.load_weights(list(with_loras(weights, info.family, info.loras).items()))
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load {path}: {' '.join(str(error).split())[:200]}") from None
    return model
