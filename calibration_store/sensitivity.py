"""How much the model's output minds the quantization of a layer: measured by stage 3W on the block cache, which it lies beside."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from calibration_store.choices import GroupSize
from calibration_store.errors import StoreError
from calibration_store.files import write_json
from calibration_store.layout import BlockCachePaths, CalibrationPaths
from calibration_store.manifest import read_manifest, same_run
from calibration_store.names import LayerName, input_owner
from calibration_store.schema import Count, Digest, Index, JsonFormat, Name, NotNegative

SENSITIVITY_FORMAT = "layer_sensitivity_v1"
MEASURE = "optimize_adaround.py --sensitivity-only"
BitsKey = Literal["2", "3", "4", "5", "6", "8"]


class LayerSensitivity(TypedDict):
    """Mean squared error of the velocity, relative to its mean square, when this layer's weight alone is rounded to nearest."""

    weights: Annotated[dict[BitsKey, NotNegative], Meta(min_length=1)]
    size: Count  # of the weight


class _Sensitivity(TypedDict):
    """sensitivity.json. `inputs`: by layer, at each of `sigmas`, the velocity's mean squared error for each unit of mean
    squared error of the layer's input; q, k and v of a stream have one input, noted for q."""

    format: Literal["layer_sensitivity_v1"]
    calibration_run: Digest | None
    weights_fingerprint: Digest | None
    selected_image_ids: list[Index]
    key_timesteps: Annotated[list[Index], Meta(min_length=1)]
    group_size: GroupSize
    num_samples: Count
    sigmas: Annotated[list[NotNegative], Meta(min_length=1)]
    layers: Annotated[dict[LayerName, LayerSensitivity], Meta(min_length=1)]
    inputs: Annotated[dict[LayerName, list[NotNegative]], Meta(min_length=1)]


class Sensitivity(_Sensitivity, total=False):
    """List the entries of sensitivity.json; measurements from before 0.9.0 have no version."""

    w4a8_version: Name


def sensitivity_fault(content: Sensitivity) -> str | None:
    """What the entries say of each other that cannot be."""
    steps = len(content["key_timesteps"])
    if len(content["sigmas"]) != steps:
        return f"{len(content['sigmas'])} sigmas for {steps} key_timesteps"
    missing = [name for name in content["layers"] if input_owner(name) not in content["inputs"]]
    if missing:
        return f"inputs: nothing of {missing[0]}"
    wrong = [name for name, gains in content["inputs"].items() if len(gains) != steps]
    return (
        f"inputs: {wrong[0]} has {len(content['inputs'][wrong[0]])} values for {steps} key_timesteps" if wrong else None
    )


SENSITIVITY = JsonFormat(SENSITIVITY_FORMAT, Sensitivity, MEASURE, sensitivity_fault)


def read_sensitivity(calib_dir: Path) -> dict[str, Any]:
    """What was measured. Raises StoreError when there is nothing, or it is of another calibration run."""
    path = BlockCachePaths(calib_dir).sensitivity
    content = SENSITIVITY.read(path, f"run {MEASURE}")
    manifest = CalibrationPaths(calib_dir).manifest
    if manifest.exists() and not same_run(read_manifest(calib_dir), content):
        raise StoreError(f"{path}: made from another calibration run than {manifest}; run {MEASURE}")
    return content


def write_sensitivity(calib_dir: Path, content: Mapping[str, Any]) -> None:
    """Write sensitivity.json."""
    write_json(BlockCachePaths(calib_dir).sensitivity, {"format": SENSITIVITY_FORMAT, **content})


def input_gain(sensitivity: Mapping[str, Any], layer: str, sigma: float) -> float:
    """Of a layer's input at the nearest measured noise level; q, k and v have a third of their input's each.

    Raises StoreError for a layer that was not measured.
    """
    owner = input_owner(layer)
    if layer not in sensitivity["layers"]:
        raise StoreError(f"sensitivity.json has nothing of {layer}: it is of another model; run {MEASURE}")
    sigmas = sensitivity["sigmas"]
    nearest = min(range(len(sigmas)), key=lambda index: abs(sigmas[index] - sigma))
    sharing = sum(input_owner(name) == owner for name in sensitivity["layers"])
    return sensitivity["inputs"][owner][nearest] / sharing
