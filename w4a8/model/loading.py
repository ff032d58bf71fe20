"""Load the parts of a model that a stage asks for, each in the precision that the stage states."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from calibration_store.model_folder import BUNDLED_MODEL, LAYOUT, missing_files, weight_file
from calibration_store.safetensors_header import remedy_of
from w4a8.model.catalog import ExportedHubModel, FolderModel, ModelError, ModelInfo, cached_vae, describe_model
from w4a8.model.checkpoint_contents import read_contents
from w4a8.model.diffusionkit import MMDIT_CKPT, DiffusionPipeline, VAEDecoder
from w4a8.model.folder import FolderPipeline, folder_modulation_weights, load_folder_transformer
from w4a8.model.hub import ExportedPipeline, HubPipeline
from w4a8.model.packed import AUTO
from w4a8.model.parts import DECODER, TEXT, TRANSFORMER, Parts, Pipeline, load_weights, whole_model
from w4a8.model.transformer import open_transformer

__all__ = [
    "DECODER",
    "TEXT",
    "TRANSFORMER",
    "Parts",
    "Pipeline",
    "check_folder",
    "diffusionkit_pipeline",
    "load_pipeline",
    "whole_model",
]

INSTEAD = f", or run now with --model {BUNDLED_MODEL}"


def load_pipeline(
    info: ModelInfo,
    parts: Parts,
    use_t5: bool = False,
    instead: str = INSTEAD,
    lazy: bool = False,
    native: str = AUTO,
) -> Pipeline:
    """Load the given parts of a model, each in the given precision: {TRANSFORMER: "float16", …}.

    instead: the end of the message when the hub cannot be reached. lazy: every part is read when it is used. native:
    how packed weights are multiplied (`--native`). Raises ModelError when the files cannot be obtained.
    """
    check_folder(info, use_t5)
    check_checkpoint(info, parts)
    pipeline: Pipeline
    if isinstance(info, FolderModel):
        pipeline = FolderPipeline(info, parts, use_t5, native)
    elif isinstance(info, ExportedHubModel):
        pipeline = ExportedPipeline(info, parts, use_t5, instead, native)
    else:
        pipeline = HubPipeline(info, parts, use_t5, instead, native)
    if info.loras and TRANSFORMER in parts:
        open_transformer(info, headers_only=True)  # to refuse a LoRA of another model before any work
    mx.reset_peak_memory()
    for part in () if lazy else parts:
        pipeline.load(part)
    return pipeline


def check_checkpoint(info: ModelInfo, parts: Parts) -> None:
    """Raise UserError for a checkpoint of another model or kind, or without the VAE that is asked for."""
    if info.checkpoint is None:
        return
    if TRANSFORMER in parts:
        open_transformer(info, headers_only=True)
    missing = DECODER in parts and info.family.checkpoint.vae_inside and not read_contents(info.checkpoint).vae
    if missing and cached_vae(info) is None:
        raise ModelError(
            f"{info.checkpoint}: holds no VAE, and {info.hub_id} is not in the local cache of the hub, from which it would "
            "come; give --no-images, or a checkpoint with one"
        )


def check_folder(info: ModelInfo, use_t5: bool) -> None:
    """Raise ModelError for a model folder that lacks files, or with options that do not go with it."""
    if info.folder is None:
        return
    if use_t5 and not info.use_t5 and info.hub_id is None:
        raise ModelError(f"--t5: {info.version} has no T5 text encoder; use --no-t5")
    missing = missing_files(info.folder, info.hub_id is not None, use_t5 and info.hub_id is None)
    if missing:
        exported = f"{remedy_of(info.folder)}; " if "mmdit.safetensors" in missing else ""
        raise ModelError(f"{info.folder}: no {', '.join(missing)}; {exported}{LAYOUT}")


def diffusionkit_pipeline(folder: str | Path, **options: Any) -> DiffusionPipeline:
    """Make DiffusionKit's own DiffusionPipeline around the transformer of an exported folder of a hub model.

    options: DiffusionPipeline's (w16, a16, shift, use_t5, low_memory_mode). Raises a UserError for a folder that is no
    such export.
    """
    info = describe_model(str(folder))
    if not isinstance(info, ExportedHubModel):
        raise ModelError(f"{folder}: names no base_model, where DiffusionKit would find text encoders and VAE")
    if info.hub_id not in MMDIT_CKPT:
        raise ModelError(f"{folder}: DiffusionKit does not know {info.hub_id}; draw_images.py draws it")
    exported = info.folder

    class Exported(DiffusionPipeline):
        def load_mmdit(self, only_modulation_dict: bool = False) -> list[tuple[str, mx.array]] | None:
            if only_modulation_dict:
                return folder_modulation_weights(exported, self.dtype)
            self.mmdit = load_folder_transformer(exported, self.dtype, guidance=info.guidance)
            return None

    pipeline = Exported(model_version=info.hub_id, **options)
    decoder = weight_file(exported, "decoder")
    if decoder.exists():
        pipeline.decoder = load_weights(VAEDecoder(), decoder, pipeline.dtype)
    return pipeline
