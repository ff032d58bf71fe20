"""The pieces that the stages' command lines share. None of them imports NumPy, so that `--help` is fast."""

from w4a8.cli import packages  # noqa: F401  (first: it prints what to do where packages are missing)

# isort: split
from calibration_store.sizes import format_bytes
from w4a8.backend.interrupts import finishing
from w4a8.backend.progress import progress_bar
from w4a8.backend.words import format_seconds, interpreter, shortened
from w4a8.cli.command import Interrupted, StageCommand, flags, interruptible, stage, stage_command
from w4a8.cli.options import (
    COUNT,
    DECIBELS,
    FILE,
    FOLDER,
    GUIDANCE,
    IMAGES,
    OUTPUT,
    RATE,
    SEED,
    SHIFT,
    SIDE,
    STEPS,
    Seeds,
    analysis_options,
    calib_dir_option,
    effort_option,
    lora_option,
    max_bytes_option,
    model_location_options,
    native_option,
    prompts_option,
    resume_options,
    scale_is_option,
    text_group_option,
    training_options,
)

__all__ = [
    "COUNT",
    "DECIBELS",
    "FILE",
    "FOLDER",
    "GUIDANCE",
    "IMAGES",
    "OUTPUT",
    "RATE",
    "SEED",
    "SHIFT",
    "SIDE",
    "STEPS",
    "Interrupted",
    "Seeds",
    "StageCommand",
    "analysis_options",
    "calib_dir_option",
    "effort_option",
    "finishing",
    "flags",
    "format_bytes",
    "format_seconds",
    "interpreter",
    "interruptible",
    "lora_option",
    "max_bytes_option",
    "model_location_options",
    "native_option",
    "progress_bar",
    "prompts_option",
    "resume_options",
    "scale_is_option",
    "shortened",
    "stage",
    "stage_command",
    "text_group_option",
    "training_options",
]
