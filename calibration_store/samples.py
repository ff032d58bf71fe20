"""Stage 1's samples: the latent before one denoising step."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calibration_store.errors import StoreError
from calibration_store.layout import CalibrationPaths
from calibration_store.manifest import GENERATE, image_identity, saved_steps, stored_dtype
from calibration_store.npz import npz_bytes, read_npz, write_npz
from calibration_store.pictures import is_picture
from calibration_store.schema import (
    CALIBRATION_RUN,
    FINITE,
    FLOATS,
    INTEGERS,
    NOT_NEGATIVE,
    OF_RUN,
    Member,
    Record,
    of_run,
    run_fault,
)


def sample_arrays(
    x: np.ndarray, timestep: np.ndarray, sigma: float, step_index: int, image_id: int, is_final: bool
) -> dict[str, np.ndarray]:
    """Return the arrays of a sample file. x: (1, h, w, 16); timestep: (), stored in the dtype of x, `stored_dtype`."""
    return {
        "x": x,
        "timestep": np.asarray(timestep, dtype=x.dtype),
        "sigma": np.array(sigma, np.float32),
        "step_index": np.array(step_index, np.int32),
        "image_id": np.array(image_id, np.int32),
        "is_final": np.array(is_final, np.bool_),
    }


SAMPLE = Record(
    {
        "image_id": Member(INTEGERS, ()),
        "step_index": Member(INTEGERS, ()),
        "x": Member(FLOATS, (1, "height", "width", 16), (FINITE,)),
        "timestep": Member(FLOATS, (), (FINITE, NOT_NEGATIVE)),
        "sigma": Member(FLOATS, (), (FINITE, NOT_NEGATIVE)),
        "is_final": Member(("bool",), ()),
        CALIBRATION_RUN: OF_RUN,
    }
)
SPARE_BYTES = 2**20  # room for a sample file's headers and single numbers, beside its latent


def write_sample(paths: CalibrationPaths, arrays: Mapping[str, np.ndarray], run: str) -> None:
    """Write one sample, the arrays of `sample_arrays`. run: `image_identity` of its image. Raises WriteError."""
    write_npz(paths.sample(int(arrays["image_id"]), int(arrays["step_index"])), {**arrays, **of_run(run)})


def sample_bytes(plan: Mapping[str, Any]) -> int:
    """Return the bytes on the disk of one image's samples, exactly. plan: the entries of a manifest."""
    x = np.zeros((1, *plan["latent_size"], 16), stored_dtype(plan["activation_dtype"]))
    steps = saved_steps(plan["num_steps"], plan["stride"])
    return npz_bytes(sample_arrays(x, np.zeros(()), 0.0, 0, 0, False) | of_run("0" * 64)) * len(steps)


def read_sample(
    paths: CalibrationPaths,
    manifest: Mapping[str, Any],
    image_id: int,
    step_index: int,
    schedule: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, np.ndarray]:
    """Read one sample, and check that it belongs to this run.

    Returns x (1, h, w, 16) and timestep () in the run's stored dtype, sigma () float, step_index () and image_id ()
    integer, is_final () bool. schedule: the run's (sigmas, timesteps), at which the sample must have been taken. Raises
    StoreError that names the file when it is missing, damaged, not finite, or of another run, image, step, size or
    dtype.
    """
    path = paths.sample(image_id, step_index)
    remedy = f"run {GENERATE} with --resume to make it anew"
    height, width = manifest["latent_size"]
    arrays = read_npz(path, remedy, SAMPLE.names, 4 * (16 * height * width * 8 + SPARE_BYTES))
    fault = SAMPLE.fault(arrays)
    if fault:
        raise StoreError(f"{path}: not a calibration sample ({fault}); {remedy}")
    found = {name: arrays[name].item() for name in ("image_id", "step_index", "is_final")}
    found |= {"shape of x": arrays["x"].shape, "dtype of x": arrays["x"].dtype.name}
    found |= {"dtype of timestep": arrays["timestep"].dtype.name}
    dtype, shape = stored_dtype(manifest["activation_dtype"]), (1, *manifest["latent_size"], 16)
    expected = {"image_id": image_id, "step_index": step_index, "is_final": step_index == manifest["num_steps"]}
    expected |= {"shape of x": shape, "dtype of x": dtype, "dtype of timestep": dtype}
    for name, values in zip(("sigma", "timestep"), schedule or (), strict=False):
        found[name], exact = arrays[name].item(), values[step_index]
        expected[name] = found[name] if abs(found[name] - exact) <= 1e-3 * exact else exact  # devices round differently
    wrong = [f"{name} {value}, expected {expected[name]}" for name, value in found.items() if value != expected[name]]
    if wrong:
        raise StoreError(f"{path}: a sample of another run ({'; '.join(wrong)}); {remedy}")
    fault = run_fault(arrays, image_identity(manifest, image_id))
    if fault:
        raise StoreError(f"{path}: {fault}; {remedy}")
    return arrays


def is_complete(
    paths: CalibrationPaths,
    manifest: Mapping[str, Any],
    image: Mapping[str, Any],
    schedule: tuple[Sequence[float], Sequence[float]],
    picture_size: tuple[int, int],
) -> bool:
    """Return whether every file of an image, its entry in the plan, is on the disk, whole, and of this run.

    schedule: the run's (sigmas, timesteps). picture_size: (width, height) in pixels.
    """
    if manifest["save_images"] and not is_picture(paths.image(image["image_id"]), image, picture_size):
        return False
    try:
        for step_index in saved_steps(manifest["num_steps"], manifest["stride"]):
            read_sample(paths, manifest, image["image_id"], step_index, schedule)
    except StoreError:
        return False
    return True
