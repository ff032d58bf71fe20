"""checkpoint.npz of stage 3W: where the unit under way stands, so that a kill costs little."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import numpy as np
import orjson

from calibration_store.errors import StoreError
from calibration_store.names import layer_key, split_key
from calibration_store.npz import read_npz, write_npz
from calibration_store.schema import Digest, Index, Name
from calibration_store.weights import StageLosses

Layers = dict[str, dict[str, np.ndarray]]  # {layer: {field: array}}


class Position(TypedDict):
    """Where a checkpoint stands: in which job of which run, at which iteration of which of its stages."""

    plan: Digest
    job: Name
    stage: Index
    iteration: Index
    losses: list[StageLosses]


def write_checkpoint(
    path: Path, position: Position, training: Mapping[str, np.ndarray], done: Mapping[str, Mapping]
) -> None:
    """Write where a job stands: the arrays of its training, and the layers that its earlier stages finished."""
    arrays = {f"training.{name}": array for name, array in training.items()}
    for layer, fields in done.items():
        arrays |= {f"done.{layer_key(layer, field)}": array for field, array in fields.items()}
    encoded = np.frombuffer(orjson.dumps(position), np.uint8)
    write_npz(path, arrays | {"position": encoded})


def read_checkpoint(path: Path) -> tuple[Position, dict[str, np.ndarray], Layers] | None:
    """(position, arrays of the training, finished layers) of the last checkpoint; None where there is none.

    Raises StoreError or ValueError for one that cannot be.
    """
    if not os.path.lexists(path):
        return None
    arrays = read_npz(path, "the unit begins anew", lambda key: True, 2**36)
    encoded = arrays.pop("position", None)
    if encoded is None or encoded.dtype != np.uint8 or encoded.ndim != 1:
        raise ValueError("no position")
    position: Any = msgspec.json.decode(encoded.tobytes(), type=Position)  # ValidationError is a ValueError
    training: dict[str, np.ndarray] = {}
    done: Layers = {}
    for key, array in arrays.items():
        part, _, name = key.partition(".")
        if part == "training":
            training[name] = array
        elif part == "done":
            layer, field = split_key(name)
            done.setdefault(layer, {})[field] = array
        else:
            raise StoreError(f"{path}: {key} is no part of a checkpoint")
    return position, training, done
