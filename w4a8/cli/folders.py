"""The check of `--calib-dir` before a stage runs: a folder that is not there, or that holds no run."""

import os
from pathlib import Path

from calibration_store.choices import GGUF_GROUP
from calibration_store.errors import UserError
from calibration_store.layout import (
    ActivationPaths,
    BlockCachePaths,
    CalibrationPaths,
    WeightPaths,
    named,
    runs_below,
    runs_nearby,
)
from calibration_store.weights import weight_paths


def refuse_missing_run(calib_dir: Path) -> None:
    """Raise UserError where a stage that reads a calibration run is given no folder, or one with runs below it.

    The message names the runs nearby. A folder of another tool, with statistics alone, is left to the stage.
    """
    if calib_dir.is_dir():
        own = (CalibrationPaths(calib_dir).manifest, BlockCachePaths(calib_dir).root, ActivationPaths(calib_dir).root)
        inside = runs_below(calib_dir)
        if inside and not any(path.exists() for path in own):
            raise UserError(f"--calib-dir {calib_dir}: holds no run itself; there are {named(inside)}")
        return
    if os.path.lexists(calib_dir):
        return  # a file, or a link to nothing: the stage says so
    hint = runs_nearby(calib_dir) or "; generate_calibration_data.py makes one"
    raise UserError(f"--calib-dir {calib_dir}: no such folder{hint}")


def options_of_export(calib_dir: Path, group_size: int, bits: int) -> tuple[str, str]:
    """Return the options that export learned weights with groups of this size, and a sentence about GGUF or nothing."""
    second = weight_paths(calib_dir, group_size).root != WeightPaths(calib_dir).root
    words = "With --format gguf the same command writes a file for ComfyUI, stable-diffusion.cpp and diffusers."
    return f"--weights w{bits}-adaround-g{group_size}" if second else "", words if group_size == GGUF_GROUP else ""
