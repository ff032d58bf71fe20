"""The estimate of the work that is left: one class, and one printed line, for every stage."""

from dataclasses import dataclass
from pathlib import Path

from calibration_store.sizes import format_bytes
from w4a8.backend.words import format_seconds


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The work that is left, with the time, disk and memory that it takes on this machine.

    As text, an estimate is the line that a stage prints.
    """

    work: str  # such as "12 of 20 passes"
    seconds: float
    bytes_written: int  # at most
    folder: Path
    peak_bytes: int  # of memory, the most at the same time

    def __str__(self) -> str:
        return (
            f"to do: {self.work}, about {format_seconds(self.seconds)} on this machine, "
            f"at most {format_bytes(self.bytes_written)} in {self.folder}, "
            f"{format_bytes(self.peak_bytes)} of memory at the peak"
        )
