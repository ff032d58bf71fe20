"""The command of a stage: its errors are one line each, and Ctrl-C ends it with a line."""

import codecs
import contextlib
import dataclasses
import errno
import functools
import importlib
import io
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import click
from click.core import ParameterSource

from calibration_store.errors import UserError
from w4a8.backend.interrupts import ctrl_c_handled, end_process
from w4a8.backend.processes import end_processes, only_rank_0_speaks, rank_prefix
from w4a8.backend.words import interpreter
from w4a8.cli.issues import with_issue
from w4a8.cli.stages import STAGE_HELP, say_what_comes_next, script_of, write_epilog, write_options
from w4a8.model.location import ModelLocation
from w4a8.options import RoundingOptions

FIRST_STAGE = "generate_calibration_data.py"  # makes the folder that the others read


class StageCommand(click.Command):
    """A click command whose every error is one line on stderr, with a non-zero exit code and no traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command, and end the process with its exit code; parameters are click's."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        for stream in (sys.stdout, sys.stderr):
            replace_what_cannot_be_encoded(stream)
        with ctrl_c_handled():
            code = self._exit_code(args, prog_name, complete_var, extra)
            sys.exit(flush_output(code))

    def _exit_code(
        self, args: Sequence[str] | None, prog_name: str | None, complete_var: str | None, extra: dict[str, Any]
    ) -> int:
        """Run the command, print its error, wait for MLX, and return the exit code."""
        said = None
        try:
            with only_rank_0_speaks(Path(sys.argv[0]).name):
                code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except (UserError, click.ClickException) as error:
            message = error.message if isinstance(error, UserError) else in_plain_words(error.format_message())
            line = one_line(message, whole=isinstance(error, Interrupted))
            said, code = f"Error: {line if isinstance(error, Interrupted) else with_issue(line)}", error.exit_code
        except click.Abort:
            said, code = "Interrupted.", 130
        except OutputError as error:
            said, code = f"Error: {with_issue(str(error))}", 1
        if end_processes(said) and said is not None:
            say(rank_prefix() + said)
        if "mlx.core" in sys.modules:
            sys.modules["mlx.core"].synchronize()  # an interrupted pass may have left work that is still running
        return code if isinstance(code, int) else 0

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse NaN and infinity, since NaN passes every range of click, and text that is not UTF-8."""
        rest = super().parse_args(ctx, args)
        for parameter in self.get_params(ctx):
            value = ctx.params.get(parameter.name or "")
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, float) and not math.isfinite(part):
                    raise click.UsageError(f"{max(parameter.opts, key=len)} {part}: not a finite number")
                if not_utf8(str(part)) or (isinstance(part, Path) and not_utf8(os.path.abspath(part))):
                    what = f"{max(parameter.opts, key=len)} {os.path.abspath(part) if isinstance(part, Path) else part}"
                    raise click.UsageError(f"{what}: not UTF-8, as JSON and MLX need it; rename the folder or file")
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options: of a stage in groups, and at their end what comes before and after it."""
        script = script_of(self.callback) if self.callback is not None else ""
        if script not in STAGE_HELP:
            super().format_options(ctx, formatter)
            return
        write_options(self.get_params(ctx), ctx, formatter)
        write_epilog(script, formatter)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments as click does."""
        with without_empty_line(), output_errors():  # --help is printed here
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command's function as click does."""
        check_temporary_folder()
        with without_empty_line(), output_errors():
            return super().invoke(ctx)


def in_plain_words(message: str) -> str:
    """Return click's message about a number as a user would say it: a range's kind has another name there."""
    return message.replace("is not a valid float range.", "is not a number.").replace(
        "is not a valid integer range.", "is not a whole number."
    )


def not_utf8(text: str) -> bool:
    """Return whether a text holds bytes that Python could not decode, as file names of other systems may."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


LONGEST_WORD, LONGEST_PATH, LONGEST_LINE = 200, 4096, 12_000  # characters of a message: keys and names come from files


def one_line(message: str, whole: bool = False) -> str:
    """Return a message as one line: escape characters that steer the terminal, and cut words that are too long.

    whole: nothing is cut, so that the command that goes on after Ctrl-C can be copied.
    """
    words = message.split()
    if not whole:
        words = [cut(word, LONGEST_PATH if word.startswith(os.sep) else LONGEST_WORD) for word in words]
    line = "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in " ".join(words))
    return line if whole else cut(line, LONGEST_LINE)


def cut(text: str, length: int) -> str:
    """Return at most this number of characters, and an ellipsis where some are left out."""
    return text if len(text) <= length else f"{text[:length]}…"


def check_temporary_folder() -> None:
    """Raise UserError where $TMPDIR is no folder that can be written.

    MLX compiles there, and its own message helps nobody. The first variable that is set decides, in the order of C++'s
    std::filesystem::temp_directory_path.
    """
    name = next((name for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR") if name in os.environ), None)
    folder = os.environ[name] if name else None
    if folder and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"{name}={folder}: no folder that can be written; set it to one, or unset it")


class OutputError(Exception):
    """A failed write to standard output: its disk is full, or nobody reads it."""


@contextlib.contextmanager
def output_errors() -> Iterator[None]:
    """Turn a failed write to standard output into OutputError; the errors of files are already WriteError."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE, errno.EBADF, errno.EIO, errno.EDQUOT):
            raise OutputError(f"cannot write to standard output ({error.strerror})") from None
        raise


def flush_output(code: int) -> int:
    """Flush standard output, and return the exit code: 1, with a line on standard error, where the flush fails.

    After a failure the descriptor leads to /dev/null, because Python would try again at its end, and print a trace.
    """
    try:
        with output_errors():
            sys.stdout.flush()
    except OutputError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not code:
            say(f"Error: {error}")
        return code or 1
    return code


def say(line: str) -> None:
    """Print a line to standard error; a failed write is ignored."""
    with contextlib.suppress(OSError):
        click.echo(line, err=True)


def open_standard_streams() -> None:
    """Open /dev/null in place of a closed stdin, stdout or stderr, whose number the next file would get."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  (open as long as the process lives)


@contextlib.contextmanager
def without_empty_line() -> Iterator[None]:
    """Raise Abort in place of KeyboardInterrupt, for which click prints an empty line."""
    try:
        yield
    except KeyboardInterrupt:
        raise click.Abort from None


def end_on_ctrl_c(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End with one line for Ctrl-C outside of StageCommand.main, while the script itself is imported."""
    if issubclass(kind, KeyboardInterrupt):
        end_process("Interrupted.")
    sys.__excepthook__(kind, error, trace)


def stage_command(function: Callable) -> click.Command:
    """Decorate a stage's `main`: `-h`, shown defaults, one-line errors."""
    settings = {"help_option_names": ["-h", "--help"], "show_default": True}
    return click.command(cls=StageCommand, context_settings=settings)(function)


def stage(kind: type[Any]) -> Callable[[Callable[[Any], None]], click.Command]:
    """Decorate a stage's `main(options)`, whose click options are the fields of `kind`, a frozen dataclass.

    The dataclass holds the defaults, so that each stands in one place.
    """

    def decorate(main: Callable[[Any], None]) -> click.Command:
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}

        @functools.wraps(main)
        def collected(**values: Any) -> None:
            if "given" in defaults:
                source, unset = click.get_current_context().get_parameter_source, ParameterSource.DEFAULT
                values["given"] = frozenset(name for name in values if source(name) is not unset)
            if "location" in defaults:
                given = (values.pop(name) for name in ("model", "local_checkpoint", "loras"))
                values["location"] = ModelLocation(*given)
            options = kind(**values)
            elsewhere = getattr(options, "stats", None) is not None  # of another folder, or another tool
            working = hasattr(options, "calib_dir") and not getattr(options, "dry_run", False) and not elsewhere
            if hasattr(options, "calib_dir") and not elsewhere and FIRST_STAGE not in script_of(main):
                importlib.import_module("w4a8.cli.folders").refuse_missing_run(options.calib_dir)
            history = importlib.import_module("w4a8.cli.history")  # --help does without what it imports
            with history.noted_stage(script_of(main), options.calib_dir) if working else contextlib.nullcontext():
                main(options)
            if working and not getattr(options, "sensitivity_only", False):
                mlx = getattr(options, "layout", "mlx") == "mlx"
                output = getattr(options, "output", None) or (None if mlx else options.calib_dir)
                more = ("", "")
                if isinstance(options, RoundingOptions):
                    folders = importlib.import_module("w4a8.cli.folders")
                    more = folders.options_of_export(options.calib_dir, options.group_size, options.weight_bits)
                say_what_comes_next(script_of(main), options.calib_dir, output, *more)

        command = stage_command(collected)
        for parameter in command.params:
            if parameter.name in defaults:
                parameter.default = defaults[parameter.name]
        return command

    return decorate


def flags(command: click.Command, **fields: str) -> dict[str, str]:
    """Return {key of a plan: flag on the command line}, from {key of a plan: field of the stage's options}."""
    spelled = {parameter.name: "/".join([*parameter.opts, *parameter.secondary_opts]) for parameter in command.params}
    return {key: spelled[field] for key, field in fields.items()}


def plain_ascii(name: str) -> codecs.CodecInfo | None:
    """Return the codec ASCII under another name, since click writes UTF-8 to a stream that is named ascii."""
    if name != "plain_ascii":
        return None
    found = codecs.lookup("ascii")
    return codecs.CodecInfo(*found, found.incrementalencoder, found.incrementaldecoder, name=name)


def replace_what_cannot_be_encoded(stream: Any) -> None:
    """Let a terminal that lacks a character (×, –) show a question mark in its place."""
    if isinstance(stream, io.TextIOWrapper):
        is_ascii = codecs.lookup(stream.encoding).name == "ascii"
        stream.reconfigure(encoding="plain_ascii" if is_ascii else None, errors="replace")


class Interrupted(UserError):
    """Ctrl-C, with a message about the files that are kept and the command that goes on."""

    exit_code = 130


@contextlib.contextmanager
def interruptible(kept: Callable[[], str], option: str | None = "--resume") -> Iterator[None]:
    """End the stage with a line when Ctrl-C comes in the block.

    kept: called then, returns the files that are kept, in words; option: the option with which the stage goes on.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {kept()}; go on with: {resume_command(option)}") from None


def resume_command(option: str | None = "--resume") -> str:
    """Return the command line that goes on with this run."""
    kept = [argument for argument in sys.argv[1:] if argument not in ("--force", "--resume")]
    return shlex.join([interpreter(), sys.argv[0], *kept, *([option] if option else [])])


open_standard_streams()
sys.excepthook = end_on_ctrl_c
codecs.register(plain_ascii)
