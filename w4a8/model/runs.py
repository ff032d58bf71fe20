"""The model of a calibration run: where it is now, and whether it is still the same."""

import os
from pathlib import Path
from typing import Any

import mlx.core as mx

from w4a8.model.catalog import ModelError, ModelInfo, describe_model, model_fingerprint
from w4a8.model.diffusionkit import DiffusionPipeline, ModelSamplingDiscreteFlow
from w4a8.model.loading import TEXT, Parts, Pipeline, load_pipeline
from w4a8.model.text import check_prompts


def describe_run_model(
    manifest: dict[str, Any], model: str | None = None, local_checkpoint: Path | None = None
) -> tuple[ModelInfo, Path | None]:
    """Where a calibration run's model is: as the manifest says, or where `--model`, `--local-checkpoint` say it is now."""
    noted = manifest.get("local_checkpoint") if model in (None, manifest["model_version"]) else None
    checkpoint = local_checkpoint or (Path(noted) if noted else None)
    if checkpoint is not None and not os.path.isfile(checkpoint):
        raise ModelError(
            f"{checkpoint}: the calibration run's local checkpoint is not there; --local-checkpoint FILE says where it is now"
        )
    try:
        return describe_model(model or manifest["model_version"]), checkpoint
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(
            f"{manifest['model_version']}: the calibration run's model is not there; --model says where it is now "
            f"({error.message.split(': ', 1)[-1]})"
        ) from None


def load_run_pipeline(
    manifest: dict[str, Any], parts: Parts, model: str | None = None, local_checkpoint: Path | None = None
) -> Pipeline:
    """The asked parts of a calibration run's model, {TRANSFORMER: manifest["activation_dtype"], …}.

    Raises ModelError when it is not there, when its weights are not those that the run was made with, or when the manifest
    holds a prompt that it cannot read.
    """
    info, checkpoint = describe_run_model(manifest, model, local_checkpoint)
    if manifest["sampler_shift"] != info.sampler_shift:
        raise ModelError(
            f"manifest.json: sampler_shift {manifest['sampler_shift']:g}, but {info.version} has {info.sampler_shift:g}; "
            "run generate_calibration_data.py with --force to make the run anew"
        )
    if info.hub_id is None:
        check_fingerprint(manifest, info, checkpoint)
    pipeline = load_pipeline(
        info, parts, manifest["use_t5"], checkpoint, instead="; --model says where else the model is"
    )
    if info.hub_id is not None:
        check_fingerprint(manifest, info, checkpoint)  # now that its files are in the cache
    if TEXT in parts:
        check_prompts(pipeline, [image["prompt"] for image in manifest["images"]], "manifest.json: prompt")
        check_prompts(pipeline, [manifest["negative_prompt"]], "manifest.json: negative prompt")
    return pipeline


def check_fingerprint(manifest: dict[str, Any], info: ModelInfo, checkpoint: Path | None) -> None:
    """Raise ModelError when the model's weights are not those that the calibration run was made with."""
    found = model_fingerprint(info, manifest["use_t5"], checkpoint)
    if found is None:
        raise ModelError(
            f"{info.hub_id}: not in the local cache of the Hugging Face hub; run generate_calibration_data.py --dry-run to fetch it"
        )
    if found != manifest["weights_fingerprint"]:
        raise ModelError(
            f"{checkpoint or info.version}: its weights are not those that the calibration run was made with "
            f"({manifest['model_version']}); --model names the right ones, or run generate_calibration_data.py with --force"
        )


def run_schedule(manifest: dict[str, Any]) -> tuple[list[float], list[float]]:
    """A run's sigmas and timesteps (num_steps + 1 each), as its samples note them; needs no weights."""
    sampler = ModelSamplingDiscreteFlow(shift=manifest["sampler_shift"])
    sigmas = DiffusionPipeline.get_sigmas(None, sampler, manifest["num_steps"])
    timesteps = sampler.timestep(sigmas).astype(getattr(mx, manifest["activation_dtype"]))
    return sigmas.tolist(), timesteps.tolist()
