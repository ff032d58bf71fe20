"""Files of stage 3W beside the blocks' files: the trained 16-bit rest, and the multipliers of migrated inputs.

rest.npz has adaLN, norms and the final layer under their paths in the model, float16; migration.npz has a multiplier for
each channel of an input, float32, under the layer that stands for the input. Member `index` lists the others.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson

from calibration_store.errors import StoreError
from calibration_store.files import read_bytes, remove_file
from calibration_store.layout import WeightPaths
from calibration_store.npz import LARGEST_NPZ, npz_arrays, write_npz
from calibration_store.schema import CALIBRATION_RUN, TRAINING_RUN, of_run, run_fault

INDEX = "index"  # the member that lists the others: JSON, {name: shape}
REST_REMEDY = "run optimize_adaround.py with --resume to make it anew"
MIGRATION_REMEDY = "run optimize_adaround.py with --force: its blocks were trained with it"


def write_rest(paths: WeightPaths, arrays: Mapping[str, np.ndarray], plan: Mapping[str, Any]) -> None:
    """Write the trained rest, {path of a parameter: array}, as float16; without arrays remove an older file.

    Raises WriteError.
    """
    if arrays:
        _write(paths.rest, {path: array.astype(np.float16) for path, array in arrays.items()}, plan)
    else:
        remove_file(paths.rest)


def read_rest(paths: WeightPaths, plan: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read the trained rest, {path of a parameter: float16 array}.

    plan: the run that the file must be of, with the digest of the file where it is known (`rest_digest`). Raises
    StoreError that names the file.
    """
    arrays = _read(paths.rest, plan, plan.get("rest_digest"), REST_REMEDY)
    for key, array in arrays.items():
        if array.dtype.kind != "f" or not np.isfinite(array.astype(np.float16)).all():
            raise StoreError(f"{paths.rest}: {key} holds no finite float16 values; {REST_REMEDY}")
    return {key: array.astype(np.float16) for key, array in arrays.items()}


def write_migration(paths: WeightPaths, multipliers: Mapping[str, np.ndarray], plan: Mapping[str, Any]) -> None:
    """Write the multipliers of migrated inputs, {layer: (inputs,) float32}. Raises WriteError."""
    _write(paths.migration, multipliers, plan)


def read_migration(paths: WeightPaths, plan: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read the multipliers of migrated inputs, {layer: (inputs,) float32}.

    plan: the run that the file must be of, with the digest of the file where it is known (`migration_digest`). Raises
    StoreError that names the file.
    """
    arrays = _read(paths.migration, plan, plan.get("migration_digest"), MIGRATION_REMEDY)
    for key, array in arrays.items():
        if array.dtype != np.float32 or array.ndim != 1 or not (np.isfinite(array) & (array > 0)).all():
            raise StoreError(f"{paths.migration}: {key} holds no positive float32 multipliers; {MIGRATION_REMEDY}")
    return arrays


def _write(path: Path, arrays: Mapping[str, np.ndarray], plan: Mapping[str, Any]) -> None:
    """Write arrays with an index of them and the runs that they are of."""
    index = orjson.dumps({key: list(array.shape) for key, array in arrays.items()}).decode()
    whose = of_run(plan.get(CALIBRATION_RUN)) | of_run(plan.get(TRAINING_RUN), TRAINING_RUN)
    write_npz(path, {**arrays, INDEX: np.array(index)} | whose)


def _read(path: Path, plan: Mapping[str, Any], digest: str | None, remedy: str) -> dict[str, np.ndarray]:
    """Read what `_write` wrote, without index and runs; digest: the file's SHA-256 where it is known."""
    content = read_bytes(path, remedy, "missing", LARGEST_NPZ)
    arrays = npz_arrays(path, content, remedy, lambda key: True, LARGEST_NPZ // 4)
    fault = run_fault(arrays, plan.get(CALIBRATION_RUN)) or run_fault(arrays, plan.get(TRAINING_RUN), TRAINING_RUN)
    if fault is None and digest is not None and hashlib.sha256(content).hexdigest() != digest:
        fault = "not the file that metadata.json was written for (exchanged, or changed)"
    own = {key: array for key, array in arrays.items() if key not in (INDEX, CALIBRATION_RUN, TRAINING_RUN)}
    fault = fault or _index_fault(arrays.get(INDEX), own)
    if fault:
        raise StoreError(f"{path}: {fault}; {remedy}")
    return own


def _index_fault(index: np.ndarray | None, arrays: Mapping[str, np.ndarray]) -> str | None:
    """Return the fault of a file whose index lists other arrays than it holds, or None."""
    try:
        if index is None or index.dtype.kind != "U" or index.shape != ():
            raise ValueError
        listed = msgspec.json.decode(index.item(), type=dict[str, list[int]])
    except (ValueError, TypeError, msgspec.DecodeError):
        return f"no {INDEX} that lists its arrays"
    if listed != {key: list(array.shape) for key, array in arrays.items()}:
        return f"{INDEX} lists other arrays than there are"
    return None
