"""The 16-bit rest that stage 3W trained (rest.npz): adaLN, norms and the final layer, under their paths in the model."""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import orjson

from calibration_store.errors import StoreError
from calibration_store.files import read_bytes, remove_file
from calibration_store.layout import WeightPaths
from calibration_store.npz import LARGEST_NPZ, npz_arrays, write_npz
from calibration_store.schema import CALIBRATION_RUN, TRAINING_RUN, of_run, run_fault

INDEX = "index"  # the member that lists the others: JSON, {path: shape}
REST_REMEDY = "run optimize_adaround.py with --resume to make it anew"


def write_rest(paths: WeightPaths, arrays: Mapping[str, np.ndarray], plan: Mapping[str, Any]) -> None:
    """Write the trained rest, {path of a parameter: array}, as float16; without arrays remove an older file.

    Raises WriteError.
    """
    if not arrays:
        remove_file(paths.rest)
        return
    index = orjson.dumps({path: list(array.shape) for path, array in arrays.items()}).decode()
    whose = of_run(plan.get(CALIBRATION_RUN)) | of_run(plan.get(TRAINING_RUN), TRAINING_RUN)
    halves = {path: array.astype(np.float16) for path, array in arrays.items()}
    write_npz(paths.rest, halves | {INDEX: np.array(index)} | whose)


def read_rest(paths: WeightPaths, plan: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read the trained rest, {path of a parameter: float16 array}.

    plan: the run that the file must be of, with the digest of the file where it is known (`rest_digest`). Raises
    StoreError that names the file.
    """
    path = paths.rest
    content = read_bytes(path, REST_REMEDY, "missing", LARGEST_NPZ)
    arrays = npz_arrays(path, content, REST_REMEDY, lambda key: True, LARGEST_NPZ // 4)
    noted = plan.get("rest_digest")
    fault = run_fault(arrays, plan.get(CALIBRATION_RUN)) or run_fault(arrays, plan.get(TRAINING_RUN), TRAINING_RUN)
    if fault is None and noted is not None and hashlib.sha256(content).hexdigest() != noted:
        fault = f"not the file that {paths.metadata.name} was written for (exchanged, or changed)"
    own = {key: array for key, array in arrays.items() if key not in (INDEX, CALIBRATION_RUN, TRAINING_RUN)}
    fault = fault or _index_fault(arrays.get(INDEX), own)
    for key, array in own.items():
        if fault is None and (array.dtype.kind != "f" or not np.isfinite(array.astype(np.float16)).all()):
            fault = f"{key} holds no finite float16 values"
    if fault:
        raise StoreError(f"{path}: {fault}; {REST_REMEDY}")
    return {key: array.astype(np.float16) for key, array in own.items()}


def _index_fault(index: np.ndarray | None, arrays: Mapping[str, np.ndarray]) -> str | None:
    """Return the fault of a file whose index lists other arrays than it holds, or None."""
    try:
        if index is None or index.dtype.kind != "U" or index.shape != ():
            raise ValueError
        listed = msgspec.json.decode(index.item(), type=dict[str, list[int]])
    except (ValueError, TypeError, msgspec.DecodeError):
        return f"no {INDEX} that lists its arrays"
    if not arrays or listed != {key: list(array.shape) for key, array in arrays.items()}:
        return f"{INDEX} lists other arrays than there are"
    return None
