"""Say where a calibration run's model is now, and which LoRAs are fused into it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Lora:
    """A LoRA and its strength: `--lora FILE[:scale]`."""

    file: Path
    scale: float = 1.0


@dataclass(frozen=True)
class ModelLocation:
    """The present location of a calibration run's model. A part that is not given has not moved."""

    model: str | None = None
    local_checkpoint: Path | None = None
    loras: tuple[Lora, ...] = ()


UNCHANGED_LOCATION = ModelLocation()
