"""Sentences of the report: which stages ran, what the errors mean, which variants are equal, and sizes of other formats."""

import shlex
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from calibration_store.history import HistoryLine
from calibration_store.model_folder import BUNDLED_MODEL
from calibration_store.quantized_model import float16_bytes
from calibration_store.sizes import format_bytes
from w4a8.backend.words import format_seconds, interpreter

MOST_OF_IT = 0.8  # share of the effect of all steps that the named steps make
OVERFIT, WELL_FIT = 1.5, 1.15  # held-out error over training error
# Bits of a weight in formats of other programs: ggml's blocks with their scales, bitsandbytes' NF4 in groups of 64.
OTHER_FORMATS = {"float8": 8.0, "GGUF Q8_0": 8.5, "GGUF Q5_K": 5.5, "GGUF Q4_K, Q4_0": 4.5, "NF4 (bitsandbytes)": 4.5}


def stage_rows(history: Sequence[HistoryLine]) -> list[dict[str, str]]:
    """Return the rows of the table of stages: when, which command, on what, how long."""
    return [
        {
            "began": line.began.replace("T", " ").removesuffix("+00:00"),
            "command": shlex.join(["python", line.script, *line.arguments]),
            "device": line.device,
            "took": format_seconds(line.seconds) + (", interrupted" if line.ended == "interrupted" else ""),
        }
        for line in history
    ]


def diagnosis(units: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return a sentence on what helps most, from the last unit's errors on held-out and on training samples."""
    unit = units.get("end to end", list(units.values())[-1] if units else None)
    if unit is None or not unit["end_training"] or unit["end"] is None:
        return None
    ratio = unit["end"] / unit["end_training"]
    said = f"The held-out error is {ratio:.1f} × the training error: "
    if ratio > OVERFIT:
        return said + "more prompts help most."
    if ratio < WELL_FIT:
        return said + "more iterations help most."
    return said + "more prompts and more iterations help alike."


def commands(scripts: Sequence[str], calib_dir: Path) -> list[str]:
    """Return the command lines of stages, for a shell in the toolkit's folder."""
    return [shlex.join([interpreter(), *shlex.split(script), "--calib-dir", str(calib_dir)]) for script in scripts]


def better_ways(
    manifest: Mapping[str, Any], calib_dir: Path, history: Sequence[HistoryLine]
) -> list[tuple[str, list[str]]]:
    """Return (what it does, command lines) of ways to a better model than a run's, with the options that its stages had."""
    model, beside = manifest["model_version"], calib_dir.parent / f"{calib_dir.name}-good"
    own = {line.script: line.arguments for line in history if line.ended == "done" and wrote_below(line.arguments)}

    def again(script: str, *more: str, but: Sequence[str] = ()) -> str:
        kept = without(own.get(script, ()), {"--calib-dir", *but, *more[::2]}, {"--resume", "--force"})
        return shlex.join([script, *kept, *more])

    decided = ("--iters", "--end-to-end", "--unrolled", "--batch-size")
    after = (
        f"{again('export_quantized_model.py')} --force",
        f"{again('evaluate_quantization.py')} --force",  # other images are calibrated on, and others are left to compare
        "report_calibration.py",
    )
    images = str(2 * manifest["num_images"])
    grow = (
        f"{again('generate_calibration_data.py', '--num-images', images, but=('--effort',))} --resume",
        f"{again('cache_adaround_data.py', but=('--num-images', '--effort'))} --force",
    )
    learn = {
        effort: f"{again('optimize_adaround.py', '--effort', effort, but=decided)} --force"
        for effort in ("good", "best")
    }
    ways = [
        ("twice the images, then learn anew", commands([*grow, learn["good"], *after], calib_dir)),
        ("more iterations", commands([learn["best"], *after], calib_dir)),
    ]
    recipe = "runs/emoji.sh" if model == BUNDLED_MODEL else f"MODEL={shlex.quote(model)} runs/sd3_medium.sh"
    if model == BUNDLED_MODEL or "stable-diffusion" in model:
        what = "the whole road with more images and iterations, beside this run"
        ways.insert(0, (what, [f"EFFORT=good {recipe} {shlex.quote(str(beside))}"]))
    return ways


def wrote_below(arguments: Sequence[str]) -> bool:
    """Return whether a stage with these arguments wrote to its place in the calibration folder, and not beside it."""
    return not {"--output", "--config"} & {word.partition("=")[0] for word in arguments}


def without(arguments: Sequence[str], options: AbstractSet[str], flags: AbstractSet[str]) -> list[str]:
    """Return a stage's arguments without these options and their values, and without these flags."""
    kept, words = list[str](), iter(arguments)
    for word in words:
        if word in options:
            next(words, None)
        elif word not in flags and word.partition("=")[0] not in options:
            kept.append(word)
    return kept


def effects_of(effects: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what an error at each step does, and in a sentence which steps make the image; None where it is not measured."""
    if effects is None:
        return None
    steps = effects["steps"]
    total = sum(row["moves"] for row in steps) or 1.0
    ranked = sorted(steps, key=lambda row: -row["moves"])
    chosen: list[int] = []
    for row in ranked:
        chosen.append(row["step"])
        if sum(row["moves"] for row in steps if row["step"] in chosen) >= MOST_OF_IT * total:
            break
    listed = ", ".join(map(str, sorted(chosen)))
    plural = len(chosen) > 1
    said = f"Step{'s' * plural} {listed} of {len(steps)} (counted from 0) cause{'s' * (not plural)} {MOST_OF_IT:.0%} "
    said += "of the change that all steps cause, each alone."
    return {**effects, "sentence": said, "most": ranked[0]["moves"] or 1.0}


def equal_variants(variants: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return a sentence on variants whose images are the same, None where there are none."""
    groups: dict[str, list[str]] = {}
    for name, found in variants.items():
        groups.setdefault(str(found["images"]), []).append(name)
    same = [names for names in groups.values() if len(names) > 1]
    if not same:
        return None
    said = "; ".join(" and ".join(names) for names in same)
    exported = any("native" in names for names in same)
    return f"{said}: the same images." + (" What was measured is what was exported." if exported else "")


def sizes_of_formats(
    sizes: Mapping[str, tuple[str, int]], quantization: Mapping[str, Any], own: int
) -> list[tuple[str, str]]:
    """Return (format, size) of a transformer in other formats, largest first, if they pack the same layers.

    sizes: (dtype, elements) of every array of the packed transformer; own: its bytes.
    """
    whole, packed = float16_bytes(sizes, quantization), 0
    for name, (dtype, elements) in sizes.items():
        if dtype == "U32":
            entry = quantization.get(name.removesuffix(".weight"), quantization)
            packed += elements * 32 // int(entry["bits"] if isinstance(entry, Mapping) else quantization["bits"])
    rows = {"float16": float(whole), "this export": float(own)}
    rows |= {name: whole - packed * (16 - bits) / 8 for name, bits in OTHER_FORMATS.items()}
    return [(name, format_bytes(round(size))) for name, size in sorted(rows.items(), key=lambda row: -row[1])]
