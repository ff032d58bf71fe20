"""Lines that stage 1 prints before its run begins."""

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
from calibration_store.samples import sample_bytes
from calibration_store.sizes import format_bytes
from w4a8.generation_plan import batches_to_do, picture_bytes
from w4a8.model.catalog import ModelInfo


def print_plan(plan: dict[str, Any], info: ModelInfo, paths: CalibrationPaths, complete: dict[int, dict]) -> None:
    """Print a description of the run, and what is left of it. complete: the result of `complete_images`."""
    height, width = plan["latent_size"]
    guidance = f"guidance {plan['cfg_scale']:g}" if plan["cfg_scale"] > 0 else "no guidance"
    guidance += f", negative prompt {plan['negative_prompt']!r}" if plan["negative_prompt"] else ""
    t5 = f"on{f' at {info.text_bits} bits' if info.text_bits != 16 else ''}" if plan["use_t5"] else "off"
    click.echo(
        f"{plan['model_version']}: {plan['num_images']} images, {plan['num_steps']} steps, {guidance}, "
        f"latents {height} x {width}, {plan['activation_dtype']}, T5 {t5}, "
        f"seed {plan['seed_base']}, batch {plan['batch_size']}"
    )
    for lora in info.loras:
        click.echo(f"with {lora.file} x {lora.scale:g}")
    if info.guidance is not None:
        click.echo(f"embedded guidance {info.guidance:g} (--guidance)")
    batches, missing = batches_to_do(plan, complete), plan["num_images"] - len(complete)
    if complete:
        click.echo(f"complete in {paths.root}: {len(complete)} of {plan['num_images']} images")
    samples = missing * len(saved_steps(plan["num_steps"], plan["stride"]))
    size, pictures = format_bytes(missing * sample_bytes(plan)), ""
    if plan["save_images"] and missing:
        pictures = f", {missing} images (at most {format_bytes(picture_bytes(plan, info, missing))})"
    click.echo(f"left: {len(batches) * plan['num_steps']} forward passes; {samples} samples ({size}){pictures}")


def say_how_many_prompts(prompts: Sequence[str], num_images: int, prompt_file: Path | None) -> None:
    """Print a line where the list of prompts is used more than once, and where a part of a given file is not used."""
    if len(prompts) < num_images:
        click.echo(f"{len(prompts)} prompts for {num_images} images: the list is used again with other seeds.")
    elif prompt_file is not None and len(prompts) > num_images:
        click.echo(f"{num_images} of {len(prompts)} prompts used: raise --num-images for more.")


def warn_of_old_results(paths: CalibrationPaths) -> None:
    """Print the folders that later stages made from the run that --force has removed."""
    root = paths.root
    folders = (
        BlockCachePaths(root), WeightPaths(root), ActivationPaths(root), EvaluationPaths(root / "evaluation"),
        QuantizedModelPaths.below(root), ReportPaths(root / "report"),
    )  # fmt: skip
    old = [folder.root.name for folder in folders if folder.root.is_dir()]
    old += sorted(path.name for path in root.glob(f"{WeightPaths(root).root.name}_g*") if path.is_dir())
    if old:
        click.echo(
            f"Note: {', '.join(old)} in {root} are of the run that is gone; "
            "make them anew (with --force where the script has it)."
        )
