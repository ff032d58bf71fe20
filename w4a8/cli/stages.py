"""The help page of a stage: its options in groups, files that it reads and writes, an example, and the scripts that come next."""

import inspect
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click

from w4a8.backend.words import interpreter

IN_A_ROAD = "W4A8_IN_A_ROAD"  # set where a recipe runs the stages one after the other, and says itself what comes next
EXPERT = "Expert"
GROUPS = {  # of options, by the names of their parameters; all others are for experts
    "What": (
        "calib_dir", "model", "local_checkpoint", "loras", "prompts", "prompt_file", "blocks", "variants", "weights",
        "activations", "config", "stats", "compare", "layout", "all_linears", "complete", "output", "save_images", "with_plot",
    ),
    "Bits": (
        "weight_bits", "group_size", "activation_bits", "activation_rule", "average_bits", "bits", "rest_bits", "text_bits",
        "policy", "min_sqnr", "a4_threshold", "a6_threshold", "shifted_a4_threshold", "shifted_a6_threshold",
    ),
    "Sampling": (
        "num_steps", "cfg_weight", "guidance", "shift", "negative_prompt", "seed", "seeds", "latent_size", "width", "height",
        "use_t5", "dtype",
    ),
    "Effort": (
        "effort", "num_images", "steps", "stride", "boundaries", "iters", "batch_size", "end_to_end", "unrolled", "unit",
        "step_effects",
    ),
    "Gate": ("min_psnr", "min_gain", "max_step_error"),
    "Running": ("resume", "force", "dry_run", "max_bytes", "max_memory", "micro_batch", "checkpoint_seconds", "text_group"),
}  # fmt: skip


class StageHelp(NamedTuple):
    """Files that a stage reads and writes, an example without `python`, the scripts that come next, and a line about its terms."""

    reads: str
    writes: str
    example: str
    following: tuple[str, ...]
    terms: str = ""


STAGE_HELP = {
    "generate_calibration_data.py": StageHelp(
        "a model, prompts", "manifest.json, samples/, images/",
        "generate_calibration_data.py --model sd3-emoji --effort good --calib-dir calibration_data/mine",
        ("cache_adaround_data.py", "collect_layer_activations.py"),
        "A latent is the picture as the transformer sees it; every denoising step changes it a little.",
    ),
    "cache_adaround_data.py": StageHelp(
        "stage 1", "adaround_cache/", "cache_adaround_data.py --effort good --calib-dir calibration_data/mine",
        ("optimize_adaround.py",),
        "A sample is one step of one image. Its ends are what enters the first block, and the velocity that the model predicts.",
    ),
    "collect_layer_activations.py": StageHelp(
        "stage 1", "activations/", "collect_layer_activations.py --num-images 8 --calib-dir calibration_data/mine",
        ("analyze_activations.py",), "Statistics are minima, maxima, moments and histograms of every layer's input at every step.",
    ),
    "optimize_adaround.py": StageHelp(
        "cache_adaround_data.py", "adaround_weights/", "optimize_adaround.py --effort good --calib-dir calibration_data/mine",
        ("export_quantized_model.py",),
        "A code is a weight's integer; scale and zero point turn it back. QDrop leaves some inputs unquantized while ranges "
        "are learned. Post-GELU inputs are those of mlp.fc2. adaLN turns the time step into scales and shifts.",
    ),
    "analyze_activations.py": StageHelp(
        "collect_layer_activations.py, or another tool's statistics", "activations/quant_config.json",
        "analyze_activations.py --plot --calib-dir calibration_data/mine", ("evaluate_quantization.py",),
        "A range is where a layer's 8-bit input is clipped, by layer and step.",
    ),
    "analyze_activations_multitier.py": StageHelp(
        "collect_layer_activations.py, or another tool's statistics", "activations/quant_config_multitier.json",
        "analyze_activations_multitier.py --policy sqnr --average-bits 6 --calib-dir calibration_data/mine",
        ("evaluate_quantization.py",), "SQNR is the power of a layer's input over that of its quantization noise. Experimental.",
    ),
    "export_quantized_model.py": StageHelp(
        "the model, optimize_adaround.py, analyze_activations.py", "quantized_model/",
        "export_quantized_model.py --calib-dir calibration_data/mine", ("evaluate_quantization.py",),
    ),
    "evaluate_quantization.py": StageHelp(
        "what the other stages left", "evaluation/",
        "evaluate_quantization.py --num-images 32 --variants w4-rtn,native --calib-dir calibration_data/mine",
        ("report_calibration.py",),
        "fp is the original, w4-rtn rounds to nearest, w4-adaround is learned, native is the export, a8 quantizes inputs, too.",
    ),
    "report_calibration.py": StageHelp(
        "what the other stages left", "report/index.html", "report_calibration.py --calib-dir calibration_data/mine", ()
    ),
    "draw_images.py": StageHelp(
        "any model", "PNG files", "draw_images.py 'red heart' --model calibration_data/mine/quantized_model --compare sd3-emoji", ()
    ),
}  # fmt: skip


def script_of(function: Callable) -> str:
    """Return the name of the file that defines a stage's `main`."""
    return Path(inspect.unwrap(function).__code__.co_filename).name


def group_of(parameter: click.Parameter) -> str:
    """Return the group of an option. Versions of click differ in the name of --help's parameter."""
    if "--help" in parameter.opts:
        return "Running"
    return next((group for group, names in GROUPS.items() if parameter.name in names), EXPERT)


def write_options(parameters: list[click.Parameter], ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the options of a stage in groups."""
    for group in (*GROUPS, EXPERT):
        rows = [parameter.get_help_record(ctx) for parameter in parameters if group_of(parameter) == group]
        records = [row for row in rows if row is not None]
        if records:
            with formatter.section(group):
                formatter.write_dl(records)


def write_epilog(script: str, formatter: click.HelpFormatter) -> None:
    """Write what a stage's terms mean, what it reads and writes, an example, and what comes next."""
    entry = STAGE_HELP[script]
    rows = [("reads", entry.reads), ("writes", entry.writes)]
    rows += [("next", ", or ".join(entry.following))] if entry.following else []
    formatter.write_paragraph()
    if entry.terms:
        formatter.write_text(entry.terms)
        formatter.write_paragraph()
    formatter.write_dl(rows)
    formatter.write(f"example  python {entry.example}\n")  # whole, so that it can be copied


def say_what_comes_next(
    script: str, calib_dir: Path, output: Path | None = None, more: str = "", remark: str = ""
) -> None:
    """Print the commands of the stages that may come next, unless a recipe runs them.

    output: what was written elsewhere; only a config has a next stage then, which measures it; more: options that the
    next stage needs; remark: a sentence after the commands.
    """
    following = STAGE_HELP[script].following if script in STAGE_HELP else ()
    analyzed = output is not None and script.startswith("analyze_")
    if following and IN_A_ROAD not in os.environ and (output is None or analyzed):
        where = "" if calib_dir == Path("calibration_data") else f" --calib-dir {shlex.quote(str(calib_dir))}"
        measured = "multitier" if "multitier" in script else "a8"
        where += f" {more}" if more else ""
        where += f" --config {shlex.quote(str(output))} --variants {measured}" if analyzed else ""
        click.echo("next: " + ", or ".join(f"{interpreter()} {each}{where}" for each in following))
        if remark:
            click.echo(remark)
