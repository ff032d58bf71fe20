"""Note in a calibration folder which stages ran there, when, how long and on what."""

import contextlib
import datetime
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import click

from calibration_store.history import HistoryLine, note_stage
from w4a8 import __version__
from w4a8.backend.processes import rank_prefix

CTRL_C, GATE = 130, 1  # exit codes of a stage that Ctrl-C ended, and of one whose gate failed when all was written
CHECKOUT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def noted_stage(script: str, calib_dir: Path) -> Iterator[None]:
    """Add a line to the folder's history.jsonl when the block ends, or Ctrl-C ends it; not after a refusal."""
    now, begun = datetime.datetime.now(datetime.timezone.utc), time.monotonic()
    ended: Literal["done", "interrupted", ""] = "done"
    try:
        yield
    except BaseException as error:
        ctrl_c = isinstance(error, KeyboardInterrupt) or getattr(error, "exit_code", None) == CTRL_C
        ended = "interrupted" if ctrl_c else "done" if getattr(error, "exit_code", None) == GATE else ""
        raise
    finally:
        if ended and not rank_prefix():
            line = HistoryLine(
                script=script, arguments=sys.argv[1:], began=now.isoformat(timespec="seconds"),
                seconds=round(time.monotonic() - begun, 1), ended=ended, device=device_name(), w4a8_version=__version__,
                commit=commit(),
            )  # fmt: skip
            try:
                note_stage(calib_dir, line)
            except OSError as error:  # a note alone: what the stage did stands
                click.echo(f"history.jsonl: not noted ({error.strerror})", err=True)


def device_name() -> str:
    """Return what MLX computes on: a GPU's name, or the CPU; NumPy's alone where the stage needs no MLX."""
    mlx = sys.modules.get("mlx.core")
    if mlx is None or mlx.default_device() == mlx.Device(mlx.cpu):
        return "CPU"
    return str(mlx.device_info(mlx.default_device()).get("device_name", "GPU"))


def commit() -> str | None:
    """Return the commit of this checkout, shortened, with a plus where files have changed; None outside of git."""
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
