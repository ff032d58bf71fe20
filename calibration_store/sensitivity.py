"""Sensitivity of the model's output to the quantization of each layer.

Stage 3W measures it on the block cache, and writes sensitivity.json beside that cache.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from calibration_store.choices import GroupSize
from calibration_store.errors import StoreError
from calibration_store.files import write_json
from calibration_store.layout import BlockCachePaths
from calibration_store.manifest import refuse_other_run
from calibration_store.names import LayerName, input_owner
from calibration_store.schema import Count, Digest, Index, JsonFormat, Name, NotNegative

SENSITIVITY_FORMAT = "layer_sensitivity_v1"
MEASURE = "optimize_adaround.py --sensitivity-only"
BitsKey = Literal["2", "3", "4", "5", "6", "8"]


class LayerSensitivity(TypedDict):
    """The errors of one layer's weight, by bits.

    An error is the mean squared error of the velocity, relative to its mean square, when this weight alone is rounded
    to nearest.
    """

    weights: Annotated[dict[BitsKey, NotNegative], Meta(min_length=1)]
    size: Count  # elements of the weight


class _Sensitivity(TypedDict):
    """The entries of sensitivity.json.

    `inputs` has for each layer, at each of `sigmas`, the velocity's mean squared error for each unit of mean squared
    error of the layer's input. q, k and v of a stream share one input, noted for q.
    """

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
    """Return the first contradiction between entries of sensitivity.json, or None."""
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
    """Read sensitivity.json. Raises StoreError when it is missing, damaged or of another calibration run."""
    path = BlockCachePaths(calib_dir).sensitivity
    content = SENSITIVITY.read(path, f"run {MEASURE}")
    refuse_other_run(calib_dir, path, content, f"run {MEASURE}")
    return content


def write_sensitivity(calib_dir: Path, content: Mapping[str, Any]) -> None:
    """Write sensitivity.json. content: the entries of `Sensitivity` but for `format`. Raises WriteError."""
    write_json(BlockCachePaths(calib_dir).sensitivity, {"format": SENSITIVITY_FORMAT, **content})


def input_gain(sensitivity: Mapping[str, Any], layer: str, sigma: float) -> float:
    """Return the velocity's squared error per unit of a layer's squared input error, at the nearest measured sigma.

    q, k and v get a third of their shared input's value each. Raises StoreError for a layer that was not measured.
    """
    owner = input_owner(layer)
    if layer not in sensitivity["layers"]:
        raise StoreError(f"sensitivity.json has nothing of {layer}: it is of another model; run {MEASURE}")
    sigmas = sensitivity["sigmas"]
    nearest = min(range(len(sigmas)), key=lambda index: abs(sigmas[index] - sigma))
    sharing = sum(input_owner(name) == owner for name in sensitivity["layers"])
    return sensitivity["inputs"][owner][nearest] / sharing
