"""What the stages' command lines share: one-line errors, option groups, prompts, progress bars, figures for people."""

import atexit
import codecs
import contextlib
import csv
import functools
import io
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import click

BUILTIN_PROMPTS = Path(__file__).resolve().parent / "prompts" / "builtin.csv"
PROMPT_COLUMNS = ("prompt", "caption")  # the first that a table has
TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}
REFUSED_PROMPT_FILES = (".json", ".jsonl", ".yaml", ".yml")  # each line would pass for a prompt
LOG_SECONDS = 10.0


class StageCommand(click.Command):
    """A click command whose every error is one line on stderr, with a non-zero exit code and no traceback."""

    def main(self, *args, standalone_mode: bool = True, **kwargs):
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        for stream in (sys.stdout, sys.stderr):
            replace_what_cannot_be_encoded(stream)
        with ctrl_c_handled():
            sys.exit(self._exit_code(*args, **kwargs))

    def _exit_code(self, *args, **kwargs) -> int:
        """Run the command, say its error, wait for MLX."""
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except click.ClickException as error:
            click.echo(f"Error: {' '.join(error.format_message().split())}", err=True)
            code = error.exit_code
        except click.Abort:
            click.echo("Interrupted.", err=True)
            code = 130
        if "mlx.core" in sys.modules:
            sys.modules["mlx.core"].synchronize()  # what an interrupted pass left running ends before the process
        return code if isinstance(code, int) else 0

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse NaN and infinity: click takes both for numbers, and NaN passes every range."""
        rest = super().parse_args(ctx, args)
        for parameter in self.get_params(ctx):
            value = ctx.params.get(parameter.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise click.UsageError(f"{max(parameter.opts, key=len)} {number}: not a finite number")
        return rest

    def make_context(self, *args, **kwargs) -> click.Context:
        with without_empty_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with without_empty_line():
            return super().invoke(ctx)


StageCommand.command_class = StageCommand  # what click.Group makes its subcommands of


class Interrupted(click.ClickException):
    """Ctrl-C, with a message that says what was left and how to go on."""

    exit_code = 130


# --- Ctrl-C -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ctrl_c_handled() -> Iterator[None]:
    """Use CtrlC in place of Python's own handler; one that somebody else set, and `nohup`'s SIG_IGN, are left alone.

    After an interrupt the handler stays: the process is about to end, and a second Ctrl-C may come until it has.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    handler = CtrlC()
    signal.signal(signal.SIGINT, handler)
    atexit.unregister(ignore_ctrl_c)
    atexit.register(ignore_ctrl_c)
    try:
        yield
    finally:
        if not handler.interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class CtrlC:
    """The handler of SIGINT: the first one raises KeyboardInterrupt, the next ends the process at once.

    The first one, too, while a module is imported, for imports lose exceptions. coremltools imports its dependencies
    below `except:` and goes on without them; NumPy calls its installation broken, or crashes.
    """

    def __init__(self):
        self.interrupted = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.interrupted:
            end_process("Interrupted again: ended at once.")
        if importing(frame):
            end_process("Interrupted.")
        self.interrupted = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def without_empty_line() -> Iterator[None]:
    """Abort instead of KeyboardInterrupt, for which click prints an empty line."""
    try:
        yield
    except KeyboardInterrupt:
        raise click.Abort from None


def importing(frame: FrameType | None) -> bool:
    """Whether `frame` runs below an import statement."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def end_process(message: str) -> NoReturn:
    """Leave with one line and exit code 130, whatever is going on. Files are written atomically: none is left half."""
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        os.write(2, f"\n{message}\n".encode() if os.isatty(2) else f"{message}\n".encode())  # below a progress bar
    os._exit(130)


def ignore_ctrl_c() -> None:
    """At exit: all is said and done, and Python would print what an interrupt breaks while it takes itself apart."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_on_ctrl_c(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """sys.excepthook: one line for Ctrl-C outside of StageCommand.main, that is while the script itself is imported."""
    if issubclass(kind, KeyboardInterrupt):
        end_process("Interrupted.")
    sys.__excepthook__(kind, error, trace)


sys.excepthook = end_on_ctrl_c


# --- options ------------------------------------------------------------------------------------------------


def stage_command(function: Callable) -> click.Command:
    """Decorator for a stage's `main`: `-h`, shown defaults, one-line errors."""
    settings = {"help_option_names": ["-h", "--help"], "show_default": True}
    return click.command(cls=StageCommand, context_settings=settings)(function)


def calib_dir_option(function: Callable) -> Callable:
    """`--calib-dir`, where every stage reads and writes."""
    return click.option(
        "--calib-dir",
        type=click.Path(path_type=Path, file_okay=False),
        default="calibration_data",
        help="Folder that all stages share.",
    )(function)


def model_place_options(function: Callable) -> Callable:
    """`--model` and `--local-checkpoint`: where the calibration run's model is now."""
    for decorator in (
        click.option(
            "--local-checkpoint",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="Where the run's checkpoint file is now.  [default: where it was]",
        ),
        click.option(
            "--model", help="Where the run's model is now; its weights must be the same.  [default: where it was]"
        ),
    ):
        function = decorator(function)
    return function


def analysis_options(config: str) -> Callable:
    """What both analyzers take: `--stats`, `--output` (default: `config` beside the statistics) and `--plot`."""

    def add(function: Callable) -> Callable:
        for decorator in (
            click.option("--plot", "with_plot", is_flag=True, help="Also write PNG figures beside the config."),
            click.option(
                "--output",
                type=click.Path(path_type=Path, dir_okay=False),
                help=f"Config to write.  [default: {config} beside the statistics]",
            ),
            click.option(
                "--stats",
                type=click.Path(path_type=Path, dir_okay=False),
                help="Statistics to read.  [default: activations/layer_statistics.json below --calib-dir]",
            ),
        ):
            function = decorator(function)
        return function

    return add


def resume_options(function: Callable) -> Callable:
    """`--resume` and `--force`, which exclude each other, and `--dry-run`."""

    @functools.wraps(function)
    def checked(*args, resume: bool, force: bool, **kwargs):
        if resume and force:
            raise click.UsageError("--resume goes on with a run and --force starts over: give one of them")
        return function(*args, resume=resume, force=force, **kwargs)

    for decorator in (
        click.option(
            "--dry-run", is_flag=True, help="Say what would be done, how long it takes, how many bytes; write nothing."
        ),
        click.option("--force", is_flag=True, help="Start over: delete what this stage wrote to the folder."),
        click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped."),
    ):
        checked = decorator(checked)
    return checked


# --- output -------------------------------------------------------------------------------------------------


def plain_ascii(name: str) -> codecs.CodecInfo | None:
    """ASCII under a name of its own: click takes a stream that is called ascii for a mistake and writes UTF-8 to it."""
    if name != "plain_ascii":
        return None
    found = codecs.lookup("ascii")
    return codecs.CodecInfo(*found, found.incrementalencoder, found.incrementaldecoder, name=name)


codecs.register(plain_ascii)


def replace_what_cannot_be_encoded(stream: Any) -> None:
    """Let a terminal that lacks a character (×, –) show a question mark in its place."""
    if isinstance(stream, io.TextIOWrapper):
        is_ascii = codecs.lookup(stream.encoding).name == "ascii"
        stream.reconfigure(encoding="plain_ascii" if is_ascii else None, errors="replace")


def progress_bar(total: int, description: str, unit: str, initial: int = 0, leave: bool = True):
    """A tqdm bar with rate and time to go; in a log file whole lines, and none for a bar that would not stay."""
    if not sys.stderr.isatty():
        return ProgressLines(total, description, unit, initial, LOG_SECONDS if leave else None)
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, initial=initial, leave=leave, dynamic_ncols=True)


class ProgressLines:
    """A progress bar for a log file, used as tqdm is: a line at most every `interval` seconds and one at the end.

    The rate counts what `update` was told, not `initial` and not what is assigned to `n`: that took no time.
    """

    def __init__(self, total: int, description: str, unit: str, initial: int = 0, interval: float | None = LOG_SECONDS):
        self.total, self.description, self.unit, self.n = total, description, unit, initial
        self.interval = interval  # None: print nothing
        self._done, self._postfix, self._closed = 0, "", False
        self._begin = self._printed = time.monotonic()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        self.n += count
        self._done += count
        if self.interval is not None and time.monotonic() - self._printed >= self.interval:
            self._print()

    def set_description(self, description: str, refresh: bool = True) -> None:
        self.description = description

    def set_postfix(self, refresh: bool = True, **values) -> None:
        self._postfix = "".join(f", {name}={value}" for name, value in values.items())

    def close(self) -> None:
        if self.interval is not None and not self._closed:
            self._print()
        self._closed = True

    def _print(self) -> None:
        self._printed = time.monotonic()
        spent = self._printed - self._begin
        percent = 100 * self.n // self.total if self.total else 100
        parts = [f"{self.description} {self.n}/{self.total} ({percent}%)", format_seconds(spent)]
        if self._done and spent:
            each = spent / self._done
            if self.n < self.total:
                parts.append(f"{format_seconds(each * (self.total - self.n))} to go")
            parts.append(f"{each:.1f} s/{self.unit}" if each >= 1 else f"{1 / each:.1f} {self.unit}/s")
        click.echo(", ".join(parts) + self._postfix, err=True)


def few(values: Sequence[Any], limit: int = 12) -> str:
    """A list in a message, the middle of a long one left out."""
    if len(values) <= limit:
        return f"[{', '.join(map(str, values))}]"
    return f"[{', '.join(map(str, values[: limit // 2]))}, …, {values[-1]}] ({len(values)})"


def resume_command() -> str:
    """The command line that continues this run."""
    kept = [argument for argument in sys.argv[1:] if argument not in ("--force", "--resume")]
    return shlex.join(["python", Path(sys.argv[0]).name, *kept, "--resume"])


def format_bytes(count: float) -> str:
    """1234567 -> '1.2 MB' (decimal units)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def format_seconds(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def layer_kind(layer: str) -> str:
    """mm12.img.mlp.fc2 -> img.mlp.fc2"""
    return layer.split(".", 1)[1]


def layers_by_kind(layers: Sequence[str]) -> dict[str, list[str]]:
    """Layers of each kind, kinds and blocks in the model's order."""
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(layer_kind(layer), []).append(layer)
    return kinds


def heat_map(path: Path, rows: Mapping[str, Sequence[float]], sigmas: Sequence[float], title: str, label: str, **style):
    """Draw one value per layer (rows, grouped by kind of layer) and step (columns) as a PNG.

    style: matplotlib's `norm` and `cmap`, and `ticks`, the values that the colour bar names.
    """
    import numpy as np
    from matplotlib import pyplot

    ticks = style.pop("ticks", None)
    kinds = layers_by_kind(list(rows))
    matrix = np.array([rows[layer] for layers in kinds.values() for layer in layers], np.float64)
    figure, axes = pyplot.subplots(figsize=(9, 2 + max(0.045 * len(matrix), 0.2 * len(kinds))), layout="constrained")
    image = axes.imshow(matrix, aspect="auto", interpolation="nearest", **style)
    ends = np.cumsum([len(layers) for layers in kinds.values()])
    starts = ends - [len(layers) for layers in kinds.values()]
    axes.set_yticks((starts + ends - 1) / 2, [f"{kind} ({len(layers)})" for kind, layers in kinds.items()])
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1)
    columns = np.unique(np.linspace(0, len(sigmas) - 1, min(len(sigmas), 9)).round().astype(int))
    axes.set_xticks(columns, [f"{sigmas[column]:.2f}" for column in columns])
    axes.set(title=title, xlabel="sigma (noise on the left, image on the right)")
    figure.colorbar(image, label=label, ticks=ticks, aspect=40)
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as PNG, atomically, and close it."""
    from matplotlib import pyplot

    from calibration_store import atomic_file

    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


# --- prompts ------------------------------------------------------------------------------------------------


def read_prompt_file(path: Path, what: str = "--prompts") -> list[str]:
    """Prompts of a table (.csv, .tsv) or of a text file (one a line; empty lines are skipped)."""
    suffix = path.suffix.lower()
    if suffix in REFUSED_PROMPT_FILES:
        raise click.UsageError(
            f"{what} {path}: {suffix} files are not read; give text (one prompt a line), .csv or .tsv "
            "(column 'prompt' or 'caption')"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise click.UsageError(f"{what} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{what} {path}: not UTF-8 text (byte {error.start})") from None
    lines = (
        prompt_column(path, text, TABLE_DELIMITERS[suffix], what) if suffix in TABLE_DELIMITERS else text.splitlines()
    )
    prompts = [" ".join(line.split()) for line in lines if line.strip()]
    if not prompts:
        raise click.UsageError(f"{what} {path}: holds no prompt")
    return prompts


def prompt_column(path: Path, text: str, delimiter: str, what: str) -> list[str]:
    """The cells below `prompt` or, without one, `caption`; rows that are too short to have one are left out."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True) if row]
    except csv.Error as error:
        raise click.UsageError(f"{what} {path}: not valid {path.suffix[1:].upper()} ({error})") from None
    fields = [field.strip() for field in rows[0]] if rows else []
    names = [field.lower() for field in fields]
    column = next((names.index(name) for name in PROMPT_COLUMNS if name in names), None)
    if column is None:
        found = ", ".join(fields) or "none"
        raise click.UsageError(f"{what} {path}: no column 'prompt' or 'caption' (columns: {found})")
    return [row[column] for row in rows[1:] if column < len(row)]


def draw_builtin_prompts(captions: Path | None, seed: int) -> list[str]:
    """The model's own captions, or the built-in list, in an order that `seed` decides.

    Each run of 12 built-in prompts takes one of every category, so that few images are diverse already.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    if captions is not None:
        prompts = read_prompt_file(captions, "captions of the model:")
        return [prompts[i] for i in rng.permutation(len(prompts))]
    by_category = defaultdict(list)
    with BUILTIN_PROMPTS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            by_category[row["category"]].append(row["prompt"])
    shuffled = [[prompts[i] for i in rng.permutation(len(prompts))] for prompts in by_category.values()]
    shuffled = [shuffled[i] for i in rng.permutation(len(shuffled))]
    return [prompt for one_of_each in zip(*shuffled, strict=True) for prompt in one_of_each]
