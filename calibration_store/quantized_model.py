"""Files that stage 5 writes beside the weights: activations.json, and config.json with its `export` entry."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import orjson
from msgspec import Meta

from calibration_store.errors import StoreError
from calibration_store.files import read_bytes
from calibration_store.layout import QuantizedModelPaths
from calibration_store.model_folder import read_model_config
from calibration_store.names import LayerName
from calibration_store.schema import Bounded, JsonFormat, NotNegative, Positive, StepKey, distinct

ACTIVATIONS_FORMAT = "activation_ranges_v1"
EXPORT = "export_quantized_model.py"
EXPORT_FORMAT = "quantized_model_v1"


class _Range(TypedDict):
    clipping_range: Positive


class LayerRange(_Range, total=False):
    """The range of a layer's input x.

    x̂ = Δ·clip(round((x − shift) / Δ), −n, n) + shift, Δ = clipping_range / n, n = 2^(bits − 1) − 1.
    """

    shift: Annotated[list[Bounded], Meta(min_length=1)]


class _Activations(TypedDict):
    format: str
    rule: Literal["static by step", "static", "dynamic per token, asymmetric", "dynamic per block of 32, symmetric"]
    bits: Annotated[int, Meta(ge=2, le=8)]


class Activations(_Activations, total=False):
    """The entries of activations.json: how a runtime may quantize the inputs of the linear layers."""

    per_timestep: dict[StepKey, dict[LayerName, LayerRange]]  # "static by step": the nearest sigma's step applies
    sigma_map: dict[StepKey, NotNegative]
    layers: dict[LayerName, LayerRange]  # "static"


def activations_fault(content: Activations) -> str | None:
    """Return the entry of activations.json that its rule lacks, or the first contradiction, or None."""
    needed = {"static by step": ("per_timestep", "sigma_map"), "static": ("layers",)}.get(content["rule"], ())
    missing = [key for key in needed if not content.get(key)]
    if missing:
        return f"no {missing[0]}"
    if content["rule"] != "static by step":
        return None
    if content["per_timestep"].keys() - content["sigma_map"].keys():
        return "'sigma_map' has not every step"
    return distinct([content["sigma_map"][key] for key in content["per_timestep"]], "sigma_map: sigma")


ACTIVATIONS = JsonFormat(ACTIVATIONS_FORMAT, Activations, EXPORT, activations_fault, limit=2**31)


def read_activations(folder: Path) -> dict[str, Any]:
    """Read an exported folder's activations.json. Raises StoreError in one line."""
    path = QuantizedModelPaths(folder).activations
    return ACTIVATIONS.read(path, f"run {EXPORT} with --force and --activations")


def encode_activations(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of activations.json, without spaces: post-GELU inputs have a number per channel and step."""
    return orjson.dumps({"format": ACTIVATIONS_FORMAT, **content}, option=orjson.OPT_SERIALIZE_NUMPY)


def is_export(path: Path) -> bool:
    """Return whether stage 5 wrote a config.json, valid or not. Raises StoreError when the file cannot be read."""
    try:
        found = orjson.loads(read_bytes(path, "give another --output"))
    except ValueError:
        return False
    return isinstance(found, dict) and isinstance(found.get("export"), dict)


def read_export(folder: Path) -> dict[str, Any]:
    """Read config.json of a folder that stage 5 wrote. Raises StoreError, also for any other model folder."""
    paths = QuantizedModelPaths(folder)
    config = read_model_config(folder)
    if "export" not in config or "quantization" not in config:
        raise StoreError(f"{paths.config}: not written by {EXPORT}; run it with another --output")
    return config


def float16_bytes(sizes: Mapping[str, tuple[str, int]], quantization: Mapping[str, Any]) -> int:
    """Return the bytes that the weights of a file would take in float16.

    sizes: {name: (dtype, elements)} as `weight_sizes` returns them; packed weights are U32 words. quantization: the
    entry of config.json, with the bits of the packed layers.
    """
    packed = {name.removesuffix(".weight") for name, (dtype, _) in sizes.items() if dtype == "U32"}
    total = 0
    for name, (dtype, elements) in sizes.items():
        layer, _, kind = name.rpartition(".")
        if dtype == "U32":
            total += 2 * (elements * 32 // quantization.get(layer, quantization)["bits"])
        elif layer not in packed or kind not in ("scales", "biases"):
            total += 2 * elements
    return total
