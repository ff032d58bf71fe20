"""Options that several stages share."""

import contextlib
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import click

from calibration_store.choices import EFFORTS, NATIVE_WAYS, PRODUCT_PRECISIONS, REST_BITS, SCALE_MEANINGS
from calibration_store.limits import (
    LEAST_SHIFT,
    MOST,
    MOST_DECIBELS,
    MOST_GUIDANCE,
    MOST_IMAGES,
    MOST_ITERATIONS,
    MOST_LORA_SCALE,
    MOST_RATE,
    MOST_SEED,
    MOST_SHIFT,
    MOST_SIDE,
    MOST_STEPS,
)
from w4a8.model.location import Lora
from w4a8.options import DEFAULT_FOLDER

# click takes exactly the numbers that the files can hold, so that every noted option is read back.
COUNT = click.IntRange(1, MOST)
IMAGES = click.IntRange(1, MOST_IMAGES)
STEPS = click.IntRange(1, MOST_STEPS)
SIDE = click.IntRange(1, MOST_SIDE)
SEED = click.IntRange(0, MOST_SEED)
GUIDANCE = click.FloatRange(0, MOST_GUIDANCE)
SHIFT = click.FloatRange(LEAST_SHIFT, MOST_SHIFT)
RATE = click.FloatRange(0, MOST_RATE)
DECIBELS = click.FloatRange(-MOST_DECIBELS, MOST_DECIBELS)


class NamedPath(click.Path):
    """A folder or a file whose name must not be empty, as it is where a shell variable is not set.

    An empty name would be the current folder.
    """

    def __init__(self, kind: Literal["folder", "file", "folder or file"]):
        """Choose whether a folder or a file is named, or either."""
        super().__init__(path_type=Path, file_okay="file" in kind, dir_okay="folder" in kind)
        self.name = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path, or fail."""
        if os.fspath(value) == "":
            self.fail(f"the name of the {self.name} is empty (an unset variable?)", param, ctx)
        path = super().convert(value, param, ctx)
        assert isinstance(path, Path)  # the path_type
        return path


FOLDER, FILE, OUTPUT = NamedPath("folder"), NamedPath("file"), NamedPath("folder or file")


class Seeds(click.ParamType):
    """Seeds with commas between them: 1,2,3."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the seeds, or fail."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",")]
        if not all(word.isascii() and word.isdigit() and int(word) <= MOST_SEED for word in words):
            self.fail(f"{value!r} is not a list of seeds from 0 to 2^64 - 1, such as 1,2,3", param, ctx)
        return tuple(map(int, words))


def calib_dir_option(function: Callable) -> Callable:
    """Add `--calib-dir`, where every stage reads and writes."""
    return click.option("--calib-dir", type=FOLDER, default=DEFAULT_FOLDER, help="Folder that all stages share.")(
        function
    )


class LoraFile(click.ParamType):
    """A LoRA, NAME or NAME:scale: a file, a folder, or a hub id, which `lora_of` looks for."""

    name = "FILE[:scale]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lora:
        """Return the file and its scale, 1 where none is given, or fail."""
        if isinstance(value, Lora):
            return value
        file, scale = Path(value), 1.0
        if not file.exists() and ":" in value:
            before, _, after = value.rpartition(":")
            try:
                file, scale = Path(before), float(after)
            except ValueError:
                self.fail(f"{value!r}: no such file, and {after!r} is no scale such as 0.8", param, ctx)
            if not (math.isfinite(scale) and abs(scale) <= MOST_LORA_SCALE):
                limit = f"{MOST_LORA_SCALE:g}"
                self.fail(f"{value!r}: the scale must be a number from -{limit} to {limit}", param, ctx)
        if not file.exists() and (file.is_absolute() or len(file.parts) < 2):  # else it may be a hub id
            self.fail(f"{str(file)!r}: no such file", param, ctx)
        return Lora(file, scale)


def lora_option(function: Callable, now: bool = False) -> Callable:
    """Add `--lora`, repeatable; now: the LoRAs are a calibration run's, whose files may have moved."""
    where = "Where the run's LoRA files are now, all of them.  [default: where they were]"
    what = "LoRA to fuse into the weights: a file of any trainer, a folder with one, or a hub id. Repeatable."
    return click.option("--lora", "loras", type=LoraFile(), multiple=True, help=where if now else what)(function)


def prompts_option(more: str) -> Callable[[Callable], Callable]:
    """Add `--prompts`, the field `prompt_file`. more: the end of its help."""
    what = "File of prompts: text (one a line), CSV, TSV, JSON, JSONL or Parquet, or a folder of captions beside images"
    return click.option("--prompts", "prompt_file", type=click.Path(path_type=Path, exists=True), help=f"{what}{more}")


def model_location_options(function: Callable, another: bool = False) -> Callable:
    """Add `--model`, `--local-checkpoint` and `--lora`, the field `location`: where the calibration run's model is now.

    another: --model may name another model.
    """
    same = "Where the run's model is now; its weights must be the same.  [default: where it was]"
    other = "Model to evaluate, or where the calibration's is now.  [default: the calibration's]"
    function = lora_option(function, now=True)
    for decorator in (
        click.option(
            "--local-checkpoint",
            type=click.Path(path_type=Path, exists=True),
            help="Where the run's checkpoint is now.  [default: where it was]",
        ),
        click.option("--model", help=other if another else same),
    ):
        function = decorator(function)
    return function


def text_group_option(function: Callable) -> Callable:
    """Add `--text-group`, the number of prompts that the text encoders are loaded for."""
    return click.option(
        "--text-group",
        type=COUNT,
        help="Prompts that are encoded before the text encoders make room for the transformer.  [default: by memory]",
    )(function)


class ByteCount(click.ParamType):
    """A number of bytes in decimal units: 20GB, 500MB, 1.5e9."""

    name = "size"
    units: ClassVar[dict[str, int]] = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes, at least 1, or fail."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?([KMGT]?B?)", value.strip(), re.IGNORECASE)
        count = 0
        if found is not None:
            with contextlib.suppress(ValueError, KeyError, OverflowError):  # 1.2.3, KB without K, 1e999
                count = int(float(found[1]) * self.units[found[2].upper()])
        if count < 1:
            self.fail(f"{value!r} is not a size such as 20GB or 500MB", param, ctx)
        return count


def max_bytes_option(function: Callable) -> Callable:
    """Add `--max-bytes`, the number of bytes that a stage may write."""
    return click.option(
        "--max-bytes",
        type=ByteCount(),
        help="Refuse to begin when more would be written, such as 20GB.  [default: the disk's room]",
    )(function)


def native_option(function: Callable) -> Callable:
    """Add `--native`, the way in which packed weights are multiplied."""
    return click.option(
        "--native",
        type=click.Choice(NATIVE_WAYS),
        help="How packed weights are multiplied: as they are, unpacked at every pass, or unpacked once; "
        "auto: by device and rows.",
    )(function)


def scale_is_option(function: Callable) -> Callable:
    """Add `--scale-is`, the meaning of a scale in configs that do not define it."""
    return click.option(
        "--scale-is",
        type=click.Choice(SCALE_MEANINGS),
        help="What `scale` means in another tool's config that does not say it: the clipping range, "
        "or the integer step.",
    )(function)


def analysis_options(config: str) -> Callable:
    """Add the options of both analyzers: `--stats`, `--output`, `--plot` and `--dry-run`.

    config: file name of the default output, beside the statistics.
    """

    def add(function: Callable) -> Callable:
        for decorator in (
            click.option("--dry-run", is_flag=True, help="Say how long it takes, how many bytes; write nothing."),
            click.option("--plot", "with_plot", is_flag=True, help="Also write PNG figures beside the config."),
            click.option(
                "--output",
                type=FILE,
                help=f"Config to write.  [default: {config} beside the statistics]",
            ),
            click.option(
                "--stats",
                type=FILE,
                help="Statistics to read.  [default: activations/layer_statistics.json below --calib-dir]",
            ),
        ):
            function = decorator(function)
        return function

    return add


def effort_option(what: str) -> Callable:
    """Return a decorator that adds `--effort`, which decides `what` in a stage."""
    return click.option(
        "--effort",
        type=click.Choice(EFFORTS),
        help=f"Decides the number of {what}, where no option does; give every stage the same.",
    )


def training_options(function: Callable) -> Callable:
    """Add stage 3W's options of the last phase, and `--migrate`, `--precision` and `--max-memory`, which concern them all."""
    for decorator in (
        click.option(
            "--precision",
            type=click.Choice(PRODUCT_PRECISIONS),
            help="Of products and attention while weights are trained; losses, sums and master values are float32.  "
            "[default: bfloat16 on a GPU above 100 M weights, else float32]",
        ),
        click.option(
            "--max-memory",
            type=ByteCount(),
            help="Memory that MLX may use, such as 17GB: samples at once, samples held on the device and the trained rest "
            "follow from it.  [default: the device's]",
        ),
        click.option(
            "--migrate/--no-migrate",
            help="Move wide input channels into the weights first (SmoothQuant), by changes of adaLN and of the value "
            "projections. The model stays the same, but LoRAs that are put onto the result later do not fit it.",
        ),
        click.option(
            "--rest-bits",
            type=click.Choice(REST_BITS),
            help="Of adaLN in the export that is trained for, as in stage 5: 8 trains through that rounding.",
        ),
        click.option(
            "--tune-rest/--no-tune-rest",
            help="In that phase, train what stays in 16 bits, too: adaLN, norms, the final layer. The file does not grow.",
        ),
        click.option(
            "--unrolled",
            type=click.IntRange(0, MOST_ITERATIONS),
            help="More iterations of that phase against finished latents: the last four steps of sampling, unrolled.  [default: 0; without --iters by --effort]",
        ),
        click.option(
            "--end-to-end",
            type=click.IntRange(0, MOST_ITERATIONS),
            help="Iterations of a last phase: scales, zero points, biases and ranges of all blocks, and the 16-bit rest, against "
            "the model's output.  [default: half of --iters, without it by --effort; with --no-tune-rest 0 up to 100 M weights]",
        ),
    ):
        function = decorator(function)
    return function


def resume_options(function: Callable) -> Callable:
    """Add `--resume`, `--force` and `--dry-run`."""
    for decorator in (
        click.option(
            "--dry-run", is_flag=True, help="Say what would be done, how long it takes, how many bytes; write nothing."
        ),
        click.option("--force", is_flag=True, help="Start over: delete what this stage wrote to the folder."),
        click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped."),
    ):
        function = decorator(function)
    return function
