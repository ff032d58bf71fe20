"""Figures and lists as people read them."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def shortened(values: Sequence[Any], limit: int = 12) -> str:
    """Return a list as text for a message; the middle of a list longer than `limit` is left out."""
    if len(values) <= limit:
        return f"[{', '.join(map(str, values))}]"
    return f"[{', '.join(map(str, values[: limit // 2]))}, …, {values[-1]}] ({len(values)})"


def interpreter() -> str:
    """Return the running Python as a shell in this folder calls it, for commands that people are told to run."""
    path = Path(sys.executable)
    if shutil.which("python") == str(path):
        return "python"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


YEAR = 365 * 24 * 3600  # seconds


def format_seconds(seconds: float) -> str:
    """Return a duration in words: 75 -> '1 min 15 s', and 'a year or more' from a year on."""
    if not seconds < YEAR:
        return "a year or more"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
