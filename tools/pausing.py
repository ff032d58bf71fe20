"""Run a stage whose writer stops while a file is open, so that a kill hits a half-written one: tools/prove.py reliability.

python tools/pausing.py SECONDS MARKER SCRIPT [OPTIONS]

The first write to a file of calibration_store after SECONDS puts half of its bytes on the disk, makes the file MARKER, and
waits to be killed.
"""

import io
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from calibration_store import files


class Pausing(io.BufferedWriter):
    """A file whose first write after `begin` stops half-way, with half of the bytes on the disk."""

    begin: float
    marker: Path

    def write(self, data: Any) -> int:
        """Write data, or half of it and wait."""
        if time.monotonic() < self.begin:
            return super().write(data)
        view = memoryview(data).cast("B")
        super().write(view[: len(view) // 2])
        super().flush()
        self.marker.touch()
        time.sleep(600)
        raise RuntimeError("nobody killed this process")


def opened(path: Any, mode: str = "r") -> Any:
    """Open a file as `open` does; one that is made anew pauses."""
    return Pausing(io.FileIO(path, mode)) if mode == "xb" else open(path, mode)


def main() -> None:
    """Take the place of `open` in the store's writer, then run the stage."""
    seconds, marker, script, *options = sys.argv[1:]
    Pausing.begin, Pausing.marker = time.monotonic() + float(seconds), Path(marker)
    vars(files)["open"] = opened
    sys.argv = [script, *options]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
