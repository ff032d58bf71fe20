"""Quantization configs of the analyzers (3A, 3A'), and the analyses beside them."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import orjson
from msgspec import Meta

from calibration_store.choices import TierBits
from calibration_store.errors import StoreError
from calibration_store.files import atomic_file, open_regular, write_json
from calibration_store.names import LayerName
from calibration_store.schema import CALIBRATION_RUN, Bounded, Index, JsonFormat, NotNegative, Positive, distinct
from calibration_store.statistics_metadata import metadata_fault, sigma_fault

W4A8_FORMAT = "per_timestep_quant_config_v4"
MULTITIER_FORMAT = "per_timestep_quant_config_v3"
TEMPORAL_FORMAT = "layer_temporal_analysis_v1"


class _ConfigEntry(TypedDict):
    bits: TierBits
    scale: NotNegative


class ConfigEntry(_ConfigEntry, total=False):
    """The quantization of a layer's input at a step. Other tools' files have no `clipping_range`."""

    shift: Annotated[list[Bounded], Meta(min_length=1)] | None
    shifted_scale: NotNegative | None
    clipping_range: Positive
    unmigrated_clipping_range: Positive
    reason: str
    expected_sqnr: float | None


class Migration(TypedDict):
    """The outlier migration of a layer: each channel of the input is divided by its multiplier."""

    outlier_indices: list[Index]
    multiplier_vector: Annotated[list[Annotated[float, Meta(ge=1, le=2**24)]], Meta(min_length=1)]
    scale_normal: NotNegative
    scale_outlier: NotNegative


class _Config(TypedDict):
    per_timestep: Annotated[dict[str, dict[LayerName, ConfigEntry]], Meta(min_length=1)]
    sigma_map: dict[str, NotNegative]


class Config(_Config, total=False):
    """The entries of quant_config.json and quant_config_multitier.json."""

    outlier_config: dict[LayerName, Migration] | None
    metadata: dict[str, Any] | None  # StatisticsMetadata, and further entries of the analyzer
    summary: dict[str, Any] | None
    thresholds: dict[str, Any] | None


def quant_config_fault(config: Config) -> str | None:
    """Return the first contradiction between entries of a config, or None."""
    metadata = config.get("metadata") or {}
    if metadata.get("scale_meaning", "range") not in ("range", "step"):
        return f"metadata: scale_meaning {metadata['scale_meaning']!r} is neither 'range' nor 'step'"
    unknown = [key for key in config["per_timestep"] if key not in config["sigma_map"]]
    if unknown:
        return f"'sigma_map' has no sigma for step {unknown[0]}"
    fault = distinct([config["sigma_map"][key] for key in config["per_timestep"]], "sigma_map: sigma")
    fault = fault or metadata_fault(metadata)
    if fault:
        return fault
    for name, migration in (config.get("outlier_config") or {}).items():
        multipliers, listed = migration["multiplier_vector"], set(migration["outlier_indices"])
        wide = {index for index, m in enumerate(multipliers) if m > 1}
        outside = any(index >= len(multipliers) for index in listed)
        if not wide <= listed or outside:  # the multiplier of a listed channel may round to 1
            return (
                f"outlier_config: {name}: outlier_indices lack a channel whose multiplier is above 1, "
                "or name one that is not there"
            )
    if CALIBRATION_RUN not in metadata:
        return None
    if set(config["per_timestep"]) != {str(step) for step in metadata["key_timesteps"]}:
        return "per_timestep has not the steps of its metadata"
    return sigma_fault({key: config["sigma_map"][key] for key in config["per_timestep"]})


W4A8_CONFIG = JsonFormat(W4A8_FORMAT, Config, "analyze_activations.py", quant_config_fault, limit=2**31)
MULTITIER_CONFIG = JsonFormat(
    MULTITIER_FORMAT, Config, "analyze_activations_multitier.py", quant_config_fault, limit=2**31
)
ANALYZED_AGAIN = "run {} again to make it anew"


def read_config(path: Path, multitier: bool) -> dict[str, Any]:
    """Read a config of stage 3A (multitier: of stage 3A'), or another tool's. Raises StoreError in one line."""
    kind = MULTITIER_CONFIG if multitier else W4A8_CONFIG
    return kind.read(path, ANALYZED_AGAIN.format(kind.made_by))


def write_quant_config(path: Path, head: Mapping[str, Any], steps: Iterator[tuple[str, Mapping]]) -> None:
    """Write a quantization config atomically and compactly, `per_timestep` a step at a time.

    The whole config never is in memory. head: the other entries. steps: (step key, {layer: entry}). Raises WriteError.
    """
    with atomic_file(path) as file:
        file.write(orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)[:-1] + b',"per_timestep":{')
        for position, (key, layers) in enumerate(steps):
            file.write(b"," if position else b"")
            file.write(orjson.dumps(key) + b":" + orjson.dumps(layers, option=orjson.OPT_SERIALIZE_NUMPY))
        file.write(b"}}\n")


def refuse_other_format(path: Path, own_format: str, option: str) -> None:
    """Raise StoreError when a file exists and has another format: no output takes the place of another stage's file.

    option: the option that names another file, for the message.
    """
    if not os.path.exists(path):
        return
    with open_regular(path, f"give another {option}", limit=None) as file:
        head = file.read(200)
    if f'"format":"{own_format}"'.encode() not in head.replace(b'": "', b'":"'):
        raise StoreError(f"{path}: exists and is no {own_format} file; give another {option}")


def is_multitier(path: Path) -> bool:
    """Return whether a config says at its beginning that it is of the A4/A6/A8 format. Raises StoreError where it is not there."""
    with open_regular(path, "give another --config", limit=None) as file:
        return MULTITIER_FORMAT.encode() in file.read(200)


def write_temporal_analysis(path: Path, sigmas: Mapping[str, float], layers: Mapping[str, Mapping]) -> None:
    """Write each layer's behaviour along the schedule, beside a config. sigmas: {step key: sigma}."""
    write_json(path, {"format": TEMPORAL_FORMAT, "sigma_map": sigmas, "layers": layers})
