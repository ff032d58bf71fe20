"""Statistics of every layer's input, step by step (2A), of this toolkit or another one."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
from msgspec import Meta

from calibration_store.errors import StoreError
from calibration_store.files import write_json
from calibration_store.histograms import HISTOGRAM_BINS, histogram_fault
from calibration_store.layout import ActivationPaths
from calibration_store.names import POST_GELU_SUFFIX, LayerName, layer_key, layer_prefix
from calibration_store.npz import read_npz, write_npz
from calibration_store.partials import COLLECT, _moments_within
from calibration_store.schema import (
    ASCENDING,
    CALIBRATION_RUN,
    FINITE,
    FLOATS,
    INTEGERS,
    NOT_NEGATIVE,
    Bounded,
    Count,
    Index,
    JsonFormat,
    Member,
    Name,
    NotNegative,
    Record,
    Relation,
    Share,
    StepKey,
    distinct,
    of_run,
    run_fault,
)
from calibration_store.statistics_metadata import metadata_fault, sigma_fault
from calibration_store.version import noted_version

STATISTICS_FORMAT = "per_timestep_npz_v2"


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one layer's input at one step; arrays have the dtype of the file."""

    avg_min: np.ndarray  # (channels,)
    avg_max: np.ndarray  # (channels,)
    extremes: tuple[np.ndarray, np.ndarray] | None  # minimum and maximum over all images, (channels,) each
    moments: tuple[np.ndarray, np.ndarray] | None  # E[x] and E[x²] over all values, (channels,) each
    shift: np.ndarray | None  # (channels,), post-GELU layers
    counts: np.ndarray | None  # (bins,)
    edges: np.ndarray | None  # (bins + 1,)
    entry: Mapping[str, Any]  # the layer's entry in the JSON index; may be empty

    @property
    def histogram(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (counts (bins,), edges (bins + 1,)), or None where the file has none."""
        return None if self.counts is None or self.edges is None else (self.counts, self.edges)

    def reach(self) -> np.ndarray:
        """Return each channel's largest |x − shift| between the average minimum and maximum: (channels,) float64."""
        return self._reach(self.avg_min, self.avg_max)

    def full_reach(self) -> np.ndarray:
        """Return each channel's largest |x − shift| between the extremes of all images: (channels,) float64.

        A file without extremes but with a histogram gives `reach`, scaled by the histogram's range over
        `tensor_absmax`, if above 1.
        """
        if self.extremes is not None:
            return self._reach(*self.extremes)
        if self.histogram is None or not self.tensor_absmax():
            return self.reach()
        counts, edges = self.histogram
        filled = np.flatnonzero(counts)
        widest = max(-edges[filled[0]], edges[filled[-1] + 1])
        return self.reach() * max(1.0, widest / self.tensor_absmax())

    def centred_power(self) -> np.ndarray | None:
        """Return E[(x − shift)²] of each channel, (channels,) float64, or None where the file has no moments."""
        if self.moments is None:
            return None
        mean, square = (moment.astype(np.float64) for moment in self.moments)
        shift = 0.0 if self.shift is None else self.shift.astype(np.float64)
        return np.maximum(square - 2 * shift * mean + shift * shift, 0.0)

    def _reach(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        shift = 0.0 if self.shift is None else self.shift.astype(np.float64)
        return np.maximum(np.abs(low - shift), np.abs(high - shift)).astype(np.float64, copy=False)

    def tensor_absmax(self) -> float:
        """Return the maximum over channels of max(|avg_min|, |avg_max|)."""
        return float(max(-self.avg_min.min(), self.avg_max.max(), self.avg_min.max(), -self.avg_max.min()))


@dataclass(frozen=True)
class ActivationStatistics:
    """The statistics of a run (format per_timestep_npz_v2), read a step at a time."""

    path: Path
    timestep_dir: Path
    step_keys: list[str]
    sigma_map: dict[str, float]
    metadata: dict[str, Any]

    def step_path(self, key: str) -> Path:
        """Return the path of the arrays of one step."""
        return self.timestep_dir / f"step_{key}.npz"

    def read_step(self, key: str) -> dict[str, LayerStatistics]:
        """Read every layer's statistics at one step, {layer: statistics}. key: one of `step_keys`.

        Layers of one input, as q, k and v are, have equal arrays and entries, and share one object. Raises StoreError, one line that names file and layer, when an array is missing, not finite or impossible.
        """
        index_path, path = self.timestep_dir / f"step_{key}_index.json", self.step_path(key)
        remedy = f"run {COLLECT} with --force to make it anew (Issue 21)"
        own = CALIBRATION_RUN in self.metadata
        anew = f"run {COLLECT} with --resume to make it anew" if own else "copy it again from where it is whole"
        index = STEP_INDEX.read(index_path, anew)
        arrays = read_npz(path, anew, _is_known)
        if "step_index" in arrays and arrays.pop("step_index").tolist() != int(key):
            raise StoreError(f"{path}: of another step; {anew}")
        fault = run_fault(arrays, self.metadata.get(CALIBRATION_RUN))
        if fault:
            raise StoreError(f"{path}: {fault}; {anew}")
        fields: dict[str, dict[str, np.ndarray]] = {}
        for member, array in arrays.items():
            prefix, _, field = member.rpartition("__")
            if field in STATISTICS.members:
                fields.setdefault(prefix, {})[field] = array
        layers: dict[str, LayerStatistics] = {}
        known: dict[tuple[tuple[str, int], ...], LayerStatistics] = {}  # by the identities of a layer's arrays
        for name, entry in index.items():
            prefix = layer_prefix(name)
            found = fields.pop(prefix, {})
            arrays_of = tuple((field, id(array)) for field, array in sorted(found.items()))
            if arrays_of in known and known[arrays_of].entry == entry:
                layers[name] = known[arrays_of]
                continue
            if not {"avg_min", "avg_max"} <= found.keys():
                raise StoreError(
                    f"{path}: no {prefix}__avg_min and __avg_max for layer {name} of {index_path.name}; {remedy}"
                )
            fault = STATISTICS.fault(found) or _entry_fault(found, entry, own)
            if fault:
                raise StoreError(f"{path}: {name}: {fault}; {remedy}")
            layers[name] = known[arrays_of] = LayerStatistics(
                found["avg_min"], found["avg_max"], _pair(found, "min", "max"), _pair(found, "mean", "mean_square"),
                found.get("shift"), found.get("hist_counts"), found.get("hist_edges"), entry,
            )  # fmt: skip
        if fields:
            raise StoreError(f"{path}: arrays of {min(fields)}, which {index_path.name} does not list; {remedy}")
        return layers


def _is_known(key: str) -> bool:
    """Return whether a member of a step's file is one of ours; others are not unpacked."""
    return key in ("step_index", CALIBRATION_RUN) or key.rpartition("__")[2] in STATISTICS.members


class IndexEntry(TypedDict, total=False):
    """A layer in the index of a step."""

    n_batches: Count
    tensor_absmax: NotNegative
    tensor_min: Bounded
    tensor_max: Bounded
    has_shift: bool
    has_hist: bool
    shift_absmax: NotNegative
    shifted_absmax: NotNegative
    hist_p999: NotNegative
    hist_p99: NotNegative
    hist_p01: Bounded
    hist_p001: Bounded


STEP_INDEX = JsonFormat(
    None, dict[LayerName, IndexEntry], COLLECT, lambda index: None if index else "an index of no layer"
)


def _within(low: str, high: str) -> Relation:
    return Relation(
        f"{low} is above {high}",
        (low, high),
        lambda a, b: bool((a <= b).all() or (a <= b + 1e-5 * np.abs(b) + 1e-30).all()),
        lambda a, b: {low: (np.abs(a) + np.abs(b) + 1).astype(a.dtype)},
    )


STATISTICS = Record(
    {
        "avg_min": Member(FLOATS, ("channels",), (FINITE,)),
        "avg_max": Member(FLOATS, ("channels",), (FINITE,)),
        "min": Member(FLOATS, ("channels",), (FINITE,), optional=True),
        "max": Member(FLOATS, ("channels",), (FINITE,), optional=True),
        "mean": Member(FLOATS, ("channels",), (FINITE,), optional=True),
        "mean_square": Member(FLOATS, ("channels",), (FINITE, NOT_NEGATIVE), optional=True),
        "shift": Member(FLOATS, ("channels",), (FINITE,), optional=True),
        "hist_counts": Member(INTEGERS, ("bins",), (NOT_NEGATIVE,), optional=True),
        "hist_edges": Member(FLOATS, (("bins", 1),), (FINITE, ASCENDING), optional=True),
    },
    (
        _within("avg_min", "avg_max"), _within("min", "avg_min"), _within("avg_max", "max"),
        Relation(
            "mean and mean_square lie outside the extremes", ("mean", "mean_square", "min", "max"), _moments_within,
            lambda mean, square, low, high: {"mean": (high + np.abs(high) + 1).astype(mean.dtype)},
        ),
        Relation(
            "shift lies outside the extremes", ("shift", "min", "max"),
            lambda shift, low, high: bool((abs(shift) <= 1.001 * np.maximum(abs(low), abs(high)) + 1e-30).all()),
            lambda shift, low, high: {"shift": (2 * np.abs(high) + 2 * np.abs(low) + 1).astype(shift.dtype)},
        ),
    ),
)  # fmt: skip


def _pair(fields: Mapping[str, np.ndarray], first: str, second: str) -> tuple[np.ndarray, np.ndarray] | None:
    return (fields[first], fields[second]) if first in fields and second in fields else None


def _entry_fault(fields: Mapping[str, np.ndarray], entry: Mapping[str, Any], own: bool) -> str | None:
    """Return the first contradiction between a layer's arrays and its entry in the index, or None.

    own: the statistics are this toolkit's, as for `histogram_fault`.
    """
    for first, second in (("min", "max"), ("mean", "mean_square"), ("hist_counts", "hist_edges")):
        if (first in fields) != (second in fields):
            return f"{first} and {second} do not belong together"
    for key, field in (("has_shift", "shift"), ("has_hist", "hist_counts")):
        if entry.get(key, field in fields) != (field in fields):
            return f"the index says {key} {entry[key]}"
    low, high = fields["avg_min"], fields["avg_max"]
    exact = {
        "tensor_min": low.min(),
        "tensor_max": high.max(),
        "tensor_absmax": max(np.abs(low).max(), np.abs(high).max()),
    }
    if "shift" in fields:
        shift = fields["shift"]
        exact["shift_absmax"] = np.abs(shift).max()
        exact["shifted_absmax"] = max(np.abs(low - shift).max(), np.abs(high - shift).max())
    for key, value in exact.items():
        if key in entry and abs(entry[key] - float(value)) > 1e-3 * abs(float(value)) + 1e-6:
            return f"the index says {key} {entry[key]:.6g}, the arrays {float(value):.6g}"
    return histogram_fault(fields, entry, own) if "hist_counts" in fields else None


class _Statistics(TypedDict):
    format: Literal["per_timestep_npz_v2"]
    step_keys: Annotated[list[StepKey | Index], Meta(min_length=1)]
    sigma_map: dict[str, NotNegative]


class Statistics(_Statistics, total=False):
    """The entries of layer_statistics.json; other tools' files may lack those below."""

    hist_bins: Count
    timestep_dir: Name
    shift_momentum: Share
    post_gelu_suffix: Name
    metadata: dict[str, Any]  # StatisticsMetadata, and further entries of another tool


def statistics_fault(content: Statistics) -> str | None:
    """Return the first contradiction between entries of layer_statistics.json, or None."""
    keys = [str(key) for key in content["step_keys"]]
    for key in keys:
        if key not in content["sigma_map"]:
            return f"'sigma_map' has no sigma for step {key}"
    metadata = content.get("metadata", {})
    fault = distinct(keys, "step_keys: step") or metadata_fault(metadata)
    fault = fault or distinct([content["sigma_map"][key] for key in keys], "sigma_map: sigma")
    if fault or CALIBRATION_RUN not in metadata:
        return fault
    if keys != [str(step) for step in metadata["key_timesteps"]]:
        return "step_keys are not the steps of its metadata"
    if set(content["sigma_map"]) != set(keys):
        return "sigma_map has sigmas of other steps"
    if Path(content.get("timestep_dir", "")).is_absolute():
        return f"timestep_dir {content['timestep_dir']} is absolute, and files are beside the one that names them"
    return sigma_fault(content["sigma_map"])


STATISTICS_FILE = JsonFormat(STATISTICS_FORMAT, Statistics, COLLECT, statistics_fault)


def read_statistics(path: Path) -> ActivationStatistics:
    """Read layer_statistics.json, its steps in ascending order; `read_step` of the result reads the arrays.

    Another tool's `timestep_dir` may be absolute, beside the file, or relative to the working folder. Raises StoreError
    when the format is not per_timestep_npz_v2, or when an entry is missing or invalid.
    """
    content = STATISTICS_FILE.read(path)
    folder = Path(content.get("timestep_dir", "timestep_stats"))
    if ".." in folder.parts:
        raise StoreError(f"{path}: its 'timestep_dir' {folder} leads out of its folder; run {COLLECT} to make it anew")
    candidates = [path.parent / folder, folder]  # an absolute folder is both
    timestep_dir = next((candidate for candidate in candidates if os.path.isdir(candidate)), None)
    if timestep_dir is None:
        raise StoreError(f"{path}: its 'timestep_dir' {folder} is neither beside it nor in the working folder")
    keys = sorted((str(key) for key in content["step_keys"]), key=int)
    sigmas = {key: content["sigma_map"][key] for key in keys}
    return ActivationStatistics(path, timestep_dir, keys, sigmas, content.get("metadata", {}))


def write_step(
    paths: ActivationPaths, step_index: int, layers: Mapping[str, tuple[Mapping[str, np.ndarray], Mapping[str, Any]]],
    run: str | None = None,
) -> None:  # fmt: skip
    """Write a step, {layer: (arrays by field, entry in the index)}. run: `run_identity`. Raises WriteError."""
    key = str(step_index)
    arrays = {layer_key(name, field): array for name, (fields, _) in layers.items() for field, array in fields.items()}
    write_npz(paths.step_arrays(key), arrays | {"step_index": np.array(step_index, np.int32)} | of_run(run))
    write_json(paths.step_index(key), {name: entry for name, (_, entry) in layers.items()})


def write_statistics(
    paths: ActivationPaths,
    manifest: Mapping[str, Any],
    plan: Mapping[str, Any],
    sigmas: Sequence[float],
    momentum: float,
) -> None:
    """Write layer_statistics.json, after all steps. sigmas: of every step of the run. Raises WriteError."""
    steps, image_ids = plan["key_timesteps"], plan["selected_image_ids"]
    statistics = {
        "format": STATISTICS_FORMAT,
        "hist_bins": HISTOGRAM_BINS,
        "timestep_dir": paths.timestep_stats.name,
        "step_keys": [str(step) for step in steps],
        "sigma_map": {str(step): sigmas[step] for step in steps},
        "shift_momentum": momentum,
        "post_gelu_suffix": POST_GELU_SUFFIX,
        "metadata": {
            "num_images": len(image_ids),
            "num_timesteps": len(steps),
            "total_processed": len(image_ids) * len(steps),
            "key_timesteps": steps,
            "selected_image_ids": image_ids,
            "stride": plan["stride"],
            "num_steps": manifest["num_steps"],
            "cfg_weight": manifest["cfg_scale"],
            "model_version": manifest["model_version"],
            "activation_dtype": manifest["activation_dtype"],
            "calibration_run": plan["calibration_run"],
            "weights_fingerprint": manifest["weights_fingerprint"],
            **noted_version(plan),
        },
    }
    write_json(paths.statistics, statistics)
