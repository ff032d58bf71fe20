"""history.jsonl: a line for every stage that ran in a calibration folder, with its options, its time and its device."""

import contextlib
import os
from pathlib import Path
from typing import Literal

import msgspec

from calibration_store.files import open_regular
from calibration_store.layout import CalibrationPaths


class HistoryLine(msgspec.Struct, frozen=True, kw_only=True):
    """A stage that ran: the script, its arguments, when it began (UTC, ISO 8601), and how long it worked."""

    script: str
    arguments: list[str]
    began: str
    seconds: float
    ended: Literal["done", "interrupted"]
    device: str
    w4a8_version: str
    commit: str | None = None


def note_stage(calib_dir: Path, line: HistoryLine) -> None:
    """Append a line; nothing where the folder is not there. Raises OSError where it cannot be written."""
    if calib_dir.is_dir():
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK  # a pipe would wait for a reader
        with open(os.open(CalibrationPaths(calib_dir).history, flags, 0o666), "ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")


def read_history(calib_dir: Path) -> list[HistoryLine]:
    """Return the lines in their order, none where there is no such file.

    Lines that are none, which a power cut or another program left, are not believed. Raises StoreError for a file that
    cannot be read.
    """
    path = CalibrationPaths(calib_dir).history
    if not os.path.lexists(path):
        return []
    with open_regular(path, "delete it: it is a note alone", limit=2**24) as file:
        lines = file.read().splitlines()
    found = []
    for line in lines:
        with contextlib.suppress(msgspec.DecodeError):
            found.append(msgspec.json.decode(line, type=HistoryLine))
    return found
