"""checkpoint.npz of stage 3W: the state of the job under way, so that a kill costs little."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import msgspec
import numpy as np
import orjson

from calibration_store.errors import StoreError
from calibration_store.npz import read_npz, write_npz
from calibration_store.schema import Digest, Index, Name

Layers = dict[str, dict[str, np.ndarray]]  # {layer: {field: array}}


class Position(TypedDict):
    """The position of a checkpoint: the run's digest, the job's name, the number of finished iterations."""

    plan: Digest
    job: Name
    iteration: Index


def write_checkpoint(path: Path, position: Position, training: Mapping[str, np.ndarray]) -> None:
    """Write the position of a job, and the arrays of its training by name. Raises WriteError."""
    arrays = {f"training.{name}": array for name, array in training.items()}
    write_npz(path, arrays | {"position": np.frombuffer(orjson.dumps(position), np.uint8)})


def read_checkpoint(path: Path) -> tuple[Position, dict[str, np.ndarray]] | None:
    """Return (position, arrays of the training) of the last checkpoint, or None where there is no file.

    Raises StoreError or ValueError for a damaged file.
    """
    if not os.path.lexists(path):
        return None
    arrays = read_npz(path, "the unit begins anew", lambda key: True, 2**36)
    encoded = arrays.pop("position", None)
    if encoded is None or encoded.dtype != np.uint8 or encoded.ndim != 1:
        raise ValueError("no position")
    position = msgspec.json.decode(encoded.tobytes(), type=Position)  # ValidationError is a ValueError
    foreign = [key for key in arrays if not key.startswith("training.")]
    if foreign:
        raise StoreError(f"{path}: {foreign[0]} is no part of a checkpoint")
    return position, {key.removeprefix("training."): array for key, array in arrays.items()}
