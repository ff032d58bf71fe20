"""What is left of a stage's work: one class and one line for every stage."""

from dataclasses import dataclass
from pathlib import Path

from calibration_store.sizes import format_bytes
from w4a8.backend.words import format_seconds


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The work that is left, and what it takes on this machine. As text, it is the line that a stage prints."""

    work: str  # such as "12 of 20 passes"
    seconds: float
    bytes_written: int  # at most
    folder: Path
    peak_bytes: int  # of memory

    def __str__(self) -> str:
        return (
            f"to do: {self.work}, about {format_seconds(self.seconds)} on this machine, at most {format_bytes(self.bytes_written)} "
            f"in {self.folder}, {format_bytes(self.peak_bytes)} of memory at the peak"
        )
