"""Load the parts of a model that a stage asks for, each in the precision that the stage states."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from calibration_store.model_folder import BUNDLED_MODEL, LAYOUT, missing_files, weight_file
from w4a8.model.catalog import ExportedHubModel, FolderModel, ModelError, ModelInfo, describe_model
from w4a8.model.diffusionkit import DiffusionPipeline, VAEDecoder
from w4a8.model.folder import FolderPipeline, folder_modulation_weights, load_folder_transformer
from w4a8.model.hub import ExportedPipeline, HubPipeline
from w4a8.model.original_checkpoint import holds_vae
from w4a8.model.packed import AUTO
from w4a8.model.parts import DECODER, TEXT, TRANSFORMER, Parts, Pipeline, load_weights, whole_model
from w4a8.model.transformer import open_transformer
from w4a8.model.weight_files import refuse_other_kinds

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
    local_checkpoint: Path | None = None,
    instead: str = INSTEAD,
    lazy: bool = False,
    native: str = AUTO,
) -> Pipeline:
    """Load the given parts of a model, each in the given precision: {TRANSFORMER: "float16", …}.

    local_checkpoint replaces the hub's transformer and VAE file, as DiffusionKit's `--local-ckpt` does. instead: the
    end of the message when the hub cannot be reached. lazy: every part is read when it is used. native: how packed
    weights are multiplied (`--native`). Raises ModelError when the files cannot be obtained.
    """
    check_folder(info, use_t5, local_checkpoint)
    if local_checkpoint is not None:
        check_checkpoint(info, parts, local_checkpoint)
    pipeline: Pipeline
    if isinstance(info, FolderModel):
        pipeline = FolderPipeline(info, parts, native)
    elif isinstance(info, ExportedHubModel):
        pipeline = ExportedPipeline(info, parts, use_t5, instead, native)
    else:
        pipeline = HubPipeline(info, parts, use_t5, local_checkpoint, instead, native)
    if info.loras and TRANSFORMER in parts:
        open_transformer(
            info, local_checkpoint
        )  # reads headers alone, to refuse a LoRA of another model before any work
    mx.reset_peak_memory()
    for part in () if lazy else parts:
        pipeline.load(part)
    return pipeline


def check_checkpoint(info: ModelInfo, parts: Parts, path: Path) -> None:
    """Raise UserError for a checkpoint of another model or kind, or without the VAE that is asked for."""
    refuse_other_kinds(path)
    if TRANSFORMER in parts:
        open_transformer(info, path)  # reads headers alone
    if DECODER in parts and info.family.vae_inside and not holds_vae(path, info.family):
        raise ModelError(
            f"{path}: holds no VAE ({info.family.vae_prefix}…); give --no-images, or a checkpoint with one"
        )


def check_folder(info: ModelInfo, use_t5: bool, local_checkpoint: Path | None) -> None:
    """Raise ModelError for a model folder that lacks files, or with options that do not go with it."""
    if info.folder is None:
        return
    if local_checkpoint is not None:
        raise ModelError("--local-checkpoint goes with a hub model; a model folder brings its own weights")
    if use_t5 and info.hub_id is None:
        raise ModelError(f"--t5: {info.version} has no T5 text encoder; use --no-t5")
    missing = missing_files(info.folder, info.hub_id is not None)
    if missing:
        raise ModelError(f"{info.folder}: no {', '.join(missing)}; {LAYOUT}")


def diffusionkit_pipeline(folder: str | Path, **options: Any) -> DiffusionPipeline:
    """Make DiffusionKit's own DiffusionPipeline around the transformer of an exported folder of a hub model.

    options: DiffusionPipeline's (w16, a16, shift, use_t5, low_memory_mode). Raises a UserError for a folder that is no
    such export.
    """
    info = describe_model(str(folder))
    if not isinstance(info, ExportedHubModel):
        raise ModelError(f"{folder}: names no base_model, where DiffusionKit would find text encoders and VAE")
    exported = info.folder

    class Exported(DiffusionPipeline):
        def load_mmdit(self, only_modulation_dict: bool = False) -> list[tuple[str, mx.array]] | None:
            if only_modulation_dict:
                return folder_modulation_weights(exported, self.dtype)
            self.mmdit = load_folder_transformer(exported, self.dtype)
            return None

    pipeline = Exported(model_version=info.hub_id, **options)
    decoder = weight_file(exported, "decoder")
    if decoder.exists():
        pipeline.decoder = load_weights(VAEDecoder(), decoder, pipeline.dtype)
    return pipeline
