"""What stage 1 says of its run before it begins."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from calibration_store.layout import (
    ActivationPaths,
    BlockCachePaths,
    CalibrationPaths,
    EvaluationPaths,
    QuantizedModelPaths,
    ReportPaths,
    WeightPaths,
)
from calibration_store.manifest import saved_steps
from calibration_store.sizes import format_bytes
from w4a8.generation import batches_to_do, picture_bytes, sample_bytes
from w4a8.model.catalog import ModelInfo


def print_plan(plan: dict[str, Any], info: ModelInfo, paths: CalibrationPaths, complete: dict[int, dict]) -> None:
    """Print what the run is, and what is left of it."""
    height, width = plan["latent_size"]
    guidance = f"guidance {plan['cfg_scale']:g}" if plan["cfg_scale"] > 0 else "no guidance"
    guidance += f", negative prompt {plan['negative_prompt']!r}" if plan["negative_prompt"] else ""
    click.echo(
        f"{plan['model_version']}: {plan['num_images']} images, {plan['num_steps']} steps, {guidance}, "
        f"latents {height} x {width}, {plan['activation_dtype']}, T5 {'on' if plan['use_t5'] else 'off'}, "
        f"seed {plan['seed_base']}, batch {plan['batch_size']}"
    )
    for lora in info.loras:
        click.echo(f"with {lora.file} x {lora.scale:g}")
    if info.left_out:
        click.echo(f"without {info.left_out}")
    batches, missing = batches_to_do(plan, complete), plan["num_images"] - len(complete)
    if complete:
        click.echo(f"complete in {paths.root}: {len(complete)} of {plan['num_images']} images")
    samples = missing * len(saved_steps(plan["num_steps"], plan["stride"]))
    pictures = f", {missing} images (at most {format_bytes(picture_bytes(plan, info, missing))})" if plan["save_images"] and missing else ""
    click.echo(
        f"left: {len(batches) * plan['num_steps']} forward passes; {samples} samples ({format_bytes(missing * sample_bytes(plan))})"
        + pictures
    )


def say_how_many_prompts(prompts: Sequence[str], num_images: int, prompt_file: Path | None) -> None:
    """A list that is not used as a whole, or more than once."""
    if len(prompts) < num_images:
        click.echo(f"{len(prompts)} prompts for {num_images} images: the list is used again with other seeds.")
    elif prompt_file is not None and len(prompts) > num_images:
        click.echo(f"{num_images} of {len(prompts)} prompts used: raise --num-images for more.")


def warn_of_old_results(paths: CalibrationPaths) -> None:
    """After --force: what later stages made from the run that is gone."""
    root = paths.root
    folders = (
        BlockCachePaths(root), WeightPaths(root), ActivationPaths(root), EvaluationPaths(root / "evaluation"),
        QuantizedModelPaths.below(root), ReportPaths(root / "report"),
    )  # fmt: skip
    old = [folder.root.name for folder in folders if folder.root.is_dir()]
    if old:
        click.echo(f"Note: {', '.join(old)} in {root} are of the run that is gone; make them anew (with --force where the script has it).")
