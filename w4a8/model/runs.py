"""Find and open the model of a calibration run, and check that it is still the same."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from w4a8.model.catalog import (
    ModelError,
    ModelInfo,
    describe_model,
    model_fingerprint,
    refuse_080,
    with_guidance,
    with_shift,
    with_text_bits,
)
from w4a8.model.diffusionkit import DiffusionPipeline, MMDiT
from w4a8.model.families import FOLDER_FAMILY, family_of_architecture
from w4a8.model.layers import note_latent_size
from w4a8.model.loading import check_folder, load_pipeline
from w4a8.model.location import UNCHANGED_LOCATION, Lora, ModelLocation
from w4a8.model.model_source import resolve_source
from w4a8.model.parts import TRANSFORMER, Parts, Pipeline
from w4a8.model.transformer import open_transformer


def describe_run_model(manifest: dict[str, Any], location: ModelLocation = UNCHANGED_LOCATION) -> ModelInfo:
    """Describe a calibration run's model.

    The options say where they are now; else they are where the manifest says. Raises ModelError where they are not.
    """
    model, local_checkpoint = location.model, location.local_checkpoint
    if model is not None:
        model, local_checkpoint = resolve_source(model, local_checkpoint)
    same = model in (None, manifest["model_version"])
    loras = location.loras or (noted_loras(manifest) if same else ())
    noted = manifest.get("local_checkpoint") if same else None
    checkpoint = local_checkpoint or (Path(noted) if noted else None)
    if checkpoint is not None and not os.path.exists(checkpoint):
        raise ModelError(
            f"{checkpoint}: the calibration run's local checkpoint is not there; "
            "--local-checkpoint FILE says where it is now"
        )
    try:
        info = describe_model(model or manifest["model_version"], loras, checkpoint)
        info = with_text_bits(info, manifest.get("text_bits", 16)) if same else info
        info = with_shift(info, manifest.get("shift"))
        return with_guidance(info, manifest.get("guidance") if same else None)
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(
            f"{manifest['model_version']}: the calibration run's model is not there; --model says where it is now "
            f"({error.message.split(': ', 1)[-1]})"
        ) from None


def noted_loras(manifest: dict[str, Any]) -> tuple[Lora, ...]:
    """Return the LoRAs of a calibration run. Raises ModelError for one that is not where it was."""
    loras = tuple(Lora(Path(entry["file"]), entry["scale"]) for entry in manifest.get("loras", []))
    for lora in loras:
        if not os.path.isfile(lora.file):
            raise ModelError(
                f"{lora.file}: the calibration run's LoRA is not there; --lora FILE:{lora.scale:g} says where it is now"
            )
    return loras


def load_run_pipeline(manifest: dict[str, Any], parts: Parts, location: ModelLocation = UNCHANGED_LOCATION) -> Pipeline:
    """Open the given parts of a calibration run's model, {TRANSFORMER: manifest["activation_dtype"], …}.

    Each part is read when it is used. Raises ModelError when the model is not there, when its weights are not those
    that the run was made with, or when the manifest holds a prompt that the model cannot read.
    """
    info = describe_run_model(manifest, location)
    check_shift(manifest, info)
    if info.hub_id is None:
        check_fingerprint(manifest, info)
    pipeline = load_pipeline(
        info, parts, manifest["use_t5"], instead="; --model says where else the model is", lazy=True
    )
    if info.hub_id is not None:
        check_fingerprint(manifest, info)  # load_pipeline has brought the files into the cache
    return pipeline


def run_transformer(manifest: dict[str, Any], location: ModelLocation = UNCHANGED_LOCATION) -> Callable[[], MMDiT]:
    """Return a function that opens a calibration run's transformer in float32; its weights are read when they are used.

    Raises ModelError as `load_run_pipeline` does, and for weights that are packed.
    """
    info = describe_run_model(manifest, location)
    check_shift(manifest, info)
    check_folder(info, manifest["use_t5"])
    if info.hub_id is not None:
        load_pipeline(info, {TRANSFORMER: "float32"}, manifest["use_t5"], lazy=True)  # fetches missing files
    check_fingerprint(manifest, info)

    def open_float32() -> MMDiT:
        mmdit = open_transformer(info)
        mmdit.update(tree_map(lambda array: array.astype(mx.float32), mmdit.parameters()))
        note_latent_size(mmdit, manifest["latent_size"])
        return mmdit

    return open_float32


def check_shift(manifest: dict[str, Any], info: ModelInfo) -> None:
    """Raise ModelError when the run was sampled with another schedule than the model's."""
    if manifest["sampler_shift"] != info.sampler_shift:
        raise ModelError(
            f"manifest.json: sampler_shift {manifest['sampler_shift']:g}, but {info.version} has "
            f"{info.sampler_shift:g}; run generate_calibration_data.py with --force to make the run anew"
        )


def check_fingerprint(manifest: dict[str, Any], info: ModelInfo) -> None:
    """Raise ModelError when the model's weights are not those that the calibration run was made with."""
    found = model_fingerprint(info, manifest["use_t5"])
    if found is None:
        raise ModelError(
            f"{info.hub_id}: not in the local cache of the Hugging Face hub; "
            "run generate_calibration_data.py --dry-run to fetch it"
        )
    refuse_080(manifest["weights_fingerprint"], found)
    if found != manifest["weights_fingerprint"]:
        raise ModelError(
            f"{info.checkpoint or info.version}: its weights are not those that the calibration run was made with "
            f"({manifest['model_version']}); --model names the right ones, "
            "or run generate_calibration_data.py with --force"
        )


def run_schedule(manifest: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return a run's sigmas and timesteps (num_steps + 1 each), as its samples note them. No weights are needed."""
    sampler = family_of_architecture(manifest.get("architecture", FOLDER_FAMILY.architecture)).new_sampler(
        manifest["sampler_shift"]
    )
    sigmas = DiffusionPipeline.get_sigmas(None, sampler, manifest["num_steps"])
    timesteps = sampler.timestep(sigmas).astype(getattr(mx, manifest["activation_dtype"]))
    return sigmas.tolist(), timesteps.tolist()
