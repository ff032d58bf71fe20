"""Where a model is: what a calibration run was made with, and where that lies now."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Lora:
    """`--lora FILE[:scale]`."""

    file: Path
    scale: float = 1.0


@dataclass(frozen=True)
class ModelLocation:
    """Where a calibration run's model is now; what is not given is where it was."""

    model: str | None = None
    local_checkpoint: Path | None = None
    loras: tuple[Lora, ...] = ()


UNCHANGED_LOCATION = ModelLocation()
