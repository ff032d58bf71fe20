"""The activation track: statistics (2A), also those that another tool wrote, configurations (3A, 3A'), evaluation (4)."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import numpy as np
import orjson
from msgspec import Meta

from calibration_store.files import StoreError, atomic_file, matching, read_npz
from calibration_store.schema import (
    ASCENDING,
    FINITE,
    FLOATS,
    INTEGERS,
    NOT_NEGATIVE,
    POSITIVE,
    Bounded,
    Count,
    Digest,
    Index,
    JsonFormat,
    LayerName,
    Member,
    Name,
    NotNegative,
    Positive,
    Record,
    Relation,
    Rule,
    Share,
    StepKey,
    Steps,
    distinct,
)
from quantizers import histogram_grid

STATISTICS_FORMAT = "per_timestep_npz_v2"
W4A8_FORMAT = "per_timestep_quant_config_v4"
MULTITIER_FORMAT = "per_timestep_quant_config_v3"
TEMPORAL_FORMAT = "layer_temporal_analysis_v1"
PARTIAL_FORMAT = "activation_partials_v2"
EVALUATION_FORMAT = "evaluation_v1"


@dataclass(frozen=True)
class ActivationPaths:
    """Where stage 2A keeps what; `calib_dir` is the folder that all stages share."""

    calib_dir: Path

    @property
    def root(self) -> Path:
        return self.calib_dir / "activations"

    @property
    def statistics(self) -> Path:
        return self.root / "layer_statistics.json"

    @property
    def timestep_stats(self) -> Path:
        return self.root / "timestep_stats"

    def step_arrays(self, key: str) -> Path:
        return self.timestep_stats / f"step_{key}.npz"

    def step_index(self, key: str) -> Path:
        return self.timestep_stats / f"step_{key}_index.json"

    @property
    def quant_config(self) -> Path:
        return self.root / "quant_config.json"

    @property
    def multitier_config(self) -> Path:
        return self.root / "quant_config_multitier.json"

    @property
    def temporal_analysis(self) -> Path:
        return self.root / "layer_temporal_analysis.json"

    @property
    def multitier_temporal_analysis(self) -> Path:
        return self.root / "layer_temporal_analysis_multitier.json"

    @property
    def partials(self) -> Path:
        return self.root / "partial"

    @property
    def collection(self) -> Path:
        return self.partials / "collection.json"

    def partial(self, image_id: int, step_index: int) -> Path:
        return self.partials / f"{image_id:04d}_{step_index:03d}.npz"

    def owned_files(self) -> list[Path]:
        """Every file that stage 2A wrote, its half-written temporary files included."""
        patterns = {
            self.root: r"layer_statistics\.json",
            self.timestep_stats: r"step_\d+(\.npz|_index\.json)",
            self.partials: r"\d{4,}_\d{3,}\.npz|collection\.json",
        }
        owned = [path for folder, pattern in patterns.items() for path in matching(folder, pattern)]
        return owned + (analysis_files(self) if owned else [])


class _Collection(TypedDict):
    format: Literal["activation_partials_v2"]
    calibration_run: Digest
    num_images: Count
    stride: Steps
    selected_image_ids: list[Index]
    key_timesteps: list[Index]


COLLECT = "collect_layer_activations.py"
COLLECTION = JsonFormat(
    PARTIAL_FORMAT, _Collection, COLLECT, lambda plan: distinct(plan["selected_image_ids"], "selected_image_ids: image")
)

LAYER = re.compile(r"(mm|uni)\d{1,4}(\.[a-z0-9_]+)+")
GRID = 256  # bins of a histogram; three more columns: the grid's exponent, its first bin, values that are not finite
LAYERS = Rule(
    "is not a list of distinct layers",
    lambda a: len(set(a.tolist())) == a.size and all(LAYER.fullmatch(str(name)) for name in a),
    lambda a: np.array([a[0]] * a.size),
)


def _fits(limits: np.ndarray, channels: np.ndarray) -> bool:
    return limits.shape[1] == channels.sum(dtype=np.int64)


def _histograms_hold(histograms: np.ndarray, limits: np.ndarray, channels: np.ndarray) -> bool:
    """Each histogram's grid is that of its input's limits, and it counts as many values in every channel."""
    for row, part in zip(histograms.tolist(), _parts(channels), strict=True):
        low, high = float(limits[0, part].min()), float(limits[1, part].max())
        total = sum(row[:GRID])
        if (
            tuple(row[GRID : GRID + 2]) != histogram_grid(low, high)
            or row[GRID + 2]
            or total % (part.stop - part.start)
        ):
            return False
        filled = [index for index, count in enumerate(row[:GRID]) if count]
        width = 2.0 ** row[GRID]
        if not filled or row[GRID + 1] + filled[0] != int(np.floor(low / width)):
            return False
        if row[GRID + 1] + filled[-1] != int(np.floor(high / width)):
            return False
    return True


def _parts(channels: np.ndarray) -> list[slice]:
    ends = np.cumsum(channels, dtype=np.int64).tolist()
    return [slice(start, end) for start, end in pairwise([0, *ends])]


def _moments_hold(moments: np.ndarray, limits: np.ndarray) -> bool:
    return _moments_within(moments[0], moments[1], limits[0], limits[1])


def _moments_within(mean: np.ndarray, mean_square: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool:
    """Means lie between the extremes and mean squares between the square of the mean and of the extremes."""
    reach = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
    slack = 1e-3 * reach + 1e-30
    square = mean_square.astype(np.float64)
    inside = (mean >= low - slack) & (mean <= high + slack) & (square <= (reach + slack) ** 2)
    return bool((inside & (square >= mean.astype(np.float64) ** 2 - slack * (reach + slack))).all())


PARTIAL = Record(
    {
        "image_id": Member(("int32",), ()),
        "step_index": Member(("int32",), ()),
        "layers": Member(tuple(f"str{32 * n}" for n in range(1, 129)), ("layers",), (LAYERS,)),
        "inputs": Member(("int32",), ("layers",), (NOT_NEGATIVE,)),
        "channels": Member(("int32",), ("inputs",), (POSITIVE,)),
        "limits": Member(("float32",), (2, "channels"), (FINITE,)),
        "moments": Member(("float32",), (2, "channels"), (FINITE,)),
        "histograms": Member(("int32",), ("inputs", GRID + 3)),
    },
    (
        Relation(
            "limits are not of the inputs' channels", ("limits", "channels"), _fits,
            lambda limits, channels: {"channels": channels + np.int32(1)},
        ),
        Relation(
            "inputs are not those of channels", ("inputs", "channels"),
            lambda inputs, channels: sorted(set(inputs.tolist())) == list(range(channels.size)),
            lambda inputs, channels: {"inputs": inputs * np.int32(2)},
        ),
        Relation(
            "minima are above maxima", ("limits",), lambda limits: bool((limits[0] <= limits[1]).all()),
            lambda limits: {"limits": limits[::-1] + np.float32([[1], [0]])},
        ),
        Relation(
            "moments lie outside the limits", ("moments", "limits"), _moments_hold,
            lambda moments, limits: {"moments": moments * np.float32(4) + np.float32(1)},
        ),
        Relation(
            "histograms do not fit the limits", ("histograms", "limits", "channels"), _histograms_hold,
            lambda histograms, limits, channels: {"histograms": histograms + np.int32(1)},
        ),
    ),
)  # fmt: skip


def read_partial(paths: ActivationPaths, image_id: int, step_index: int) -> dict[str, np.ndarray]:
    """The statistics of one pass (arrays: PARTIAL). Raises StoreError that names the file."""
    path = paths.partial(image_id, step_index)
    remedy = f"run {COLLECT} with --resume to make it anew"
    arrays = read_npz(path, remedy)
    fault = PARTIAL.fault(arrays)
    if fault:
        raise StoreError(f"{path}: not a partial result ({fault}); {remedy}")
    if (arrays["image_id"], arrays["step_index"]) != (image_id, step_index):
        raise StoreError(f"{path}: of image {arrays['image_id']}, step {arrays['step_index']}; {remedy}")
    return arrays


def is_partial_complete(paths: ActivationPaths, image_id: int, step_index: int, channels_of: Mapping[str, int]) -> bool:
    """Whether the result of one pass is on disk, valid, and of a model whose layers have these inputs."""
    try:
        arrays = read_partial(paths, image_id, step_index)
    except StoreError:
        return False
    found = {str(name): int(arrays["channels"][i]) for name, i in zip(arrays["layers"], arrays["inputs"], strict=True)}
    return found == dict(channels_of)


STATISTICS_FIELDS = ("min", "max", "mean", "mean_square", "shift", "hist_counts", "hist_edges")  # beside the averages


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer's input looked like at one step; arrays in the dtype of the file."""

    avg_min: np.ndarray  # (channels,)
    avg_max: np.ndarray  # (channels,)
    extremes: tuple[np.ndarray, np.ndarray] | None  # minimum and maximum over all images, (channels,) each
    moments: tuple[np.ndarray, np.ndarray] | None  # E[x] and E[x²] over all values, (channels,) each
    shift: np.ndarray | None  # (channels,), post-GELU layers
    counts: np.ndarray | None  # (bins,)
    edges: np.ndarray | None  # (bins + 1,)
    entry: Mapping[str, Any]  # what the JSON index says of it; may be empty

    @property
    def histogram(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(counts, edges), where the file has them."""
        return None if self.counts is None else (self.counts, self.edges)

    def reach(self) -> np.ndarray:
        """Per channel, the largest |x − shift| between the average minimum and maximum: (channels,) float64."""
        return self._reach(self.avg_min, self.avg_max)

    def full_reach(self) -> np.ndarray:
        """The same between the extremes of all images: (channels,) float64.

        A file without them but with a histogram gives the averages, wider by what the histogram's range exceeds them.
        """
        if self.extremes is not None:
            return self._reach(*self.extremes)
        if self.counts is None or not self.tensor_absmax():
            return self.reach()
        filled = np.flatnonzero(self.counts)
        widest = max(-self.edges[filled[0]], self.edges[filled[-1] + 1])
        return self.reach() * max(1.0, widest / self.tensor_absmax())

    def centred_power(self) -> np.ndarray | None:
        """Per channel, E[(x − shift)²], (channels,) float64; None where the file has no moments."""
        if self.moments is None:
            return None
        mean, square = (moment.astype(np.float64) for moment in self.moments)
        shift = 0.0 if self.shift is None else self.shift.astype(np.float64)
        return np.maximum(square - 2 * shift * mean + shift * shift, 0.0)

    def _reach(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        shift = 0.0 if self.shift is None else self.shift.astype(np.float64)
        return np.maximum(np.abs(low - shift), np.abs(high - shift)).astype(np.float64)

    def tensor_absmax(self) -> float:
        """max over channels of max(|avg_min|, |avg_max|)."""
        return float(max(-self.avg_min.min(), self.avg_max.max(), self.avg_min.max(), -self.avg_max.min()))


@dataclass(frozen=True)
class ActivationStatistics:
    """The statistics of a run (format per_timestep_npz_v2), read a step at a time."""

    path: Path
    timestep_dir: Path
    step_keys: list[str]
    sigma_map: dict[str, float]
    metadata: dict[str, Any]

    def read_step(self, key: str) -> dict[str, LayerStatistics]:
        """Every layer's statistics at one step.

        Raises StoreError, one line that names file and layer, when something is missing, not finite or impossible.
        """
        index_path, path = self.timestep_dir / f"step_{key}_index.json", self.timestep_dir / f"step_{key}.npz"
        remedy = f"run {COLLECT} with --force to make it anew (TROUBLESHOOTING_GUIDE Issue 21)"
        index = STEP_INDEX.read(index_path, remedy)
        arrays = read_npz(path, remedy)
        if "step_index" in arrays and arrays.pop("step_index").tolist() != int(key):
            raise StoreError(f"{path}: of another step; {remedy}")
        fields: dict[str, dict[str, np.ndarray]] = {}
        for member, array in arrays.items():
            prefix, _, field = member.rpartition("__")
            if field in STATISTICS.members:
                fields.setdefault(prefix, {})[field] = array
        layers, own = {}, "calibration_run" in self.metadata
        for name, entry in index.items():
            prefix = name.replace(".", "_")
            found = fields.pop(prefix, {})
            if not {"avg_min", "avg_max"} <= found.keys():
                raise StoreError(
                    f"{path}: no {prefix}__avg_min and __avg_max for layer {name} of {index_path.name}; {remedy}"
                )
            fault = STATISTICS.fault(found) or _entry_fault(found, entry, own)
            if fault:
                raise StoreError(f"{path}: {name}: {fault}; {remedy}")
            layers[name] = LayerStatistics(
                found["avg_min"], found["avg_max"], _pair(found, "min", "max"), _pair(found, "mean", "mean_square"),
                found.get("shift"), found.get("hist_counts"), found.get("hist_edges"), entry,
            )  # fmt: skip
        if fields:
            raise StoreError(f"{path}: arrays of {min(fields)}, which {index_path.name} does not list; {remedy}")
        return layers


class IndexEntry(TypedDict, total=False):
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
        lambda a, b: bool((a <= b + 1e-5 * np.abs(b) + 1e-30).all()),
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
            lambda shift, low, high: bool((np.abs(shift) <= 1.001 * np.maximum(np.abs(low), np.abs(high)) + 1e-30).all()),
            lambda shift, low, high: {"shift": (2 * np.abs(high) + 2 * np.abs(low) + 1).astype(shift.dtype)},
        ),
    ),
)  # fmt: skip


def _pair(fields: Mapping[str, np.ndarray], first: str, second: str) -> tuple[np.ndarray, np.ndarray] | None:
    return (fields[first], fields[second]) if first in fields and second in fields else None


def _entry_fault(fields: Mapping[str, np.ndarray], entry: Mapping[str, Any], own: bool) -> str | None:
    """What a layer's arrays and its entry in the index say of each other that cannot be, or None.

    own: the statistics are this toolkit's, whose layers have all fields, and whose histograms count every value.
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
    return _histogram_fault(fields, entry, own) if "hist_counts" in fields else None


def _histogram_fault(fields: Mapping[str, np.ndarray], entry: Mapping[str, Any], own: bool) -> str | None:
    counts, edges = fields["hist_counts"], fields["hist_edges"]
    total = counts.sum(dtype=np.float64)
    if not 0 < total < 2**63:
        return "the histogram is empty" if not total else "hist_counts sum to more than int64 holds"
    widest = max(abs(float(edges[0])), abs(float(edges[-1])))
    for key in ("hist_p999", "hist_p99", "hist_p01", "hist_p001"):
        if abs(entry.get(key, 0.0)) > widest:
            return f"the index says {key} {entry[key]:.6g}, outside the histogram"
    if not own or "min" not in fields:
        return None
    filled = np.flatnonzero(counts)
    if not (edges[filled[0]] <= fields["min"].min() < edges[filled[0] + 1]):
        return "hist_counts do not begin at the smallest value"
    if not (edges[filled[-1]] <= fields["max"].max() < edges[filled[-1] + 1]):
        return "hist_counts do not end at the largest value"
    if int(total) % (fields["min"].size * entry.get("n_batches", 1)):
        return "hist_counts do not sum to the values seen"
    return None


class StatisticsMetadata(TypedDict, total=False):
    num_images: Count
    num_timesteps: Count
    total_processed: Count
    key_timesteps: list[Index]
    selected_image_ids: list[Index]
    stride: Steps
    num_steps: Steps
    cfg_weight: NotNegative
    model_version: Name
    activation_dtype: Literal["float16", "float32", "bfloat16"]
    calibration_run: Digest
    weights_fingerprint: Digest


class _Statistics(TypedDict):
    format: Literal["per_timestep_npz_v2"]
    step_keys: Annotated[list[StepKey | Index], Meta(min_length=1)]
    sigma_map: dict[str, NotNegative]


class Statistics(_Statistics, total=False):
    """layer_statistics.json; other tools' files may lack the rest."""

    hist_bins: Count
    timestep_dir: Name
    shift_momentum: Share
    post_gelu_suffix: Name
    metadata: dict[str, Any]  # StatisticsMetadata, and what else another tool notes


def metadata_fault(metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with the metadata that statistics, and the configs made from them, carry."""
    try:
        msgspec.convert(metadata, StatisticsMetadata)
    except msgspec.ValidationError as error:
        return f"metadata: {error}"
    if "calibration_run" not in metadata:
        return None
    ids, steps = metadata.get("selected_image_ids", []), metadata.get("key_timesteps", [])
    counts = (metadata.get("num_images"), metadata.get("num_timesteps"), metadata.get("total_processed"))
    if counts != (len(ids), len(steps), len(ids) * len(steps)):
        return f"metadata: {counts} images, steps and passes for {len(ids)} image ids and {len(steps)} steps"
    return distinct(ids, "metadata: image") or distinct(steps, "metadata: step")


def statistics_fault(content: Statistics) -> str | None:
    """What the entries of layer_statistics.json say of each other that cannot be."""
    keys = [str(key) for key in content["step_keys"]]
    for key in keys:
        if key not in content["sigma_map"]:
            return f"'sigma_map' has no sigma for step {key}"
    metadata = content.get("metadata", {})
    fault = distinct(keys, "step_keys: step") or metadata_fault(metadata)
    fault = fault or distinct([content["sigma_map"][key] for key in keys], "sigma_map: sigma")
    if fault or "calibration_run" not in metadata:
        return fault
    if keys != [str(step) for step in metadata["key_timesteps"]]:
        return "step_keys are not the steps of its metadata"
    return None if set(content["sigma_map"]) == set(keys) else "sigma_map has sigmas of other steps"


STATISTICS_FILE = JsonFormat(STATISTICS_FORMAT, Statistics, COLLECT, statistics_fault)


def read_statistics(path: Path) -> ActivationStatistics:
    """Open layer_statistics.json; `timestep_dir` may be absolute, beside the file, or relative to the working folder.

    Raises StoreError when the format is not per_timestep_npz_v2 or an entry is missing or cannot be.
    """
    content = STATISTICS_FILE.read(path)
    folder = Path(content.get("timestep_dir", "timestep_stats"))
    if ".." in folder.parts:
        raise StoreError(f"{path}: its 'timestep_dir' {folder} leads out of its folder; run {COLLECT} to make it anew")
    candidates = [path.parent / folder, folder]  # an absolute folder is both
    timestep_dir = next((candidate for candidate in candidates if os.path.isdir(candidate)), None)
    if timestep_dir is None:
        raise StoreError(f"{path}: its 'timestep_dir' {folder} is neither beside it nor in the working folder")
    keys = [str(key) for key in content["step_keys"]]
    sigmas = {key: content["sigma_map"][key] for key in keys}
    return ActivationStatistics(path, timestep_dir, keys, sigmas, content.get("metadata", {}))


# --- configurations -----------------------------------------------------------------------------------------


class _ConfigEntry(TypedDict):
    bits: Literal[4, 6, 8]
    scale: NotNegative


class ConfigEntry(_ConfigEntry, total=False):
    """A layer at a step. Other tools' files have no `clipping_range`."""

    shift: Annotated[list[Bounded], Meta(min_length=1)] | None
    shifted_scale: NotNegative | None
    clipping_range: Positive
    unmigrated_clipping_range: Positive
    reason: str
    expected_sqnr: float | None


class Migration(TypedDict):
    outlier_indices: list[Index]
    multiplier_vector: Annotated[list[Annotated[float, Meta(ge=1, le=2**24)]], Meta(min_length=1)]
    scale_normal: NotNegative
    scale_outlier: NotNegative


class _Config(TypedDict):
    per_timestep: Annotated[dict[str, dict[LayerName, ConfigEntry]], Meta(min_length=1)]
    sigma_map: dict[str, NotNegative]


class Config(_Config, total=False):
    """quant_config.json and quant_config_multitier.json."""

    outlier_config: dict[LayerName, Migration] | None
    metadata: dict[str, Any] | None  # StatisticsMetadata and what the analyzer notes
    summary: dict[str, Any] | None
    thresholds: dict[str, Any] | None


def config_fault(config: Config) -> str | None:
    """What the entries of a config say of each other that cannot be."""
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
        wide = [index for index, m in enumerate(migration["multiplier_vector"]) if m > 1]
        if sorted(migration["outlier_indices"]) != wide or any(m != int(m) for m in migration["multiplier_vector"]):
            return f"outlier_config: {name}: outlier_indices are not where multiplier_vector is above 1"
    if "calibration_run" in metadata and list(config["per_timestep"]) != [str(s) for s in metadata["key_timesteps"]]:
        return "per_timestep has not the steps of its metadata"
    return None


W4A8_CONFIG = JsonFormat(W4A8_FORMAT, Config, "analyze_activations.py", config_fault)
MULTITIER_CONFIG = JsonFormat(MULTITIER_FORMAT, Config, "analyze_activations_multitier.py", config_fault)
ANALYZED_AGAIN = "run {} again to make it anew"


def read_config(path: Path, multitier: bool) -> dict[str, Any]:
    """A config of stage 3A or 3A', or another tool's. Raises StoreError in one line."""
    kind = MULTITIER_CONFIG if multitier else W4A8_CONFIG
    return kind.read(path, ANALYZED_AGAIN.format(kind.made_by))


def write_quant_config(path: Path, head: Mapping[str, Any], steps: Iterator[tuple[str, Mapping]]) -> None:
    """Write a quantization config atomically, `per_timestep` a step at a time: compact, never whole in memory."""
    with atomic_file(path) as file:
        file.write(orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)[:-1] + b',"per_timestep":{')
        for position, (key, layers) in enumerate(steps):
            file.write(b"," if position else b"")
            file.write(orjson.dumps(key) + b":" + orjson.dumps(layers, option=orjson.OPT_SERIALIZE_NUMPY))
        file.write(b"}}\n")


def refuse_other_format(path: Path, own_format: str, option: str) -> None:
    """Raise StoreError when `path` is a file that another stage wrote: an output never takes its place."""
    if not os.path.exists(path):
        return
    try:
        with path.open("rb") as file:
            head = file.read(200)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); give another {option}") from None
    if f'"format":"{own_format}"'.encode() not in head.replace(b'": "', b'":"'):
        raise StoreError(f"{path}: exists and is no {own_format} file; give another {option}")


WRITTEN_BESIDE = {"layer_temporal_analysis.json", "layer_temporal_analysis_multitier.json"}
WRITTEN_BESIDE |= {"scale_over_sigma.png", "scale_map.png", "shift_map.png", "bit_map.png"}


def analysis_files(paths: ActivationPaths) -> list[Path]:
    """What stages 3A and 3A' made from the statistics in this folder: without these statistics it is stale.

    A config says in its metadata which run it is of, and which files were written beside it; another tool's says nothing.
    """
    found = []
    for config in (paths.quant_config, paths.multitier_config):
        try:
            metadata = orjson.loads(config.read_bytes())["metadata"]
            if not metadata["calibration_run"]:
                continue
            names = set(metadata.get("written_with", [])) & WRITTEN_BESIDE
            files = [config, *(paths.root / name for name in sorted(names))]
        except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is not ours
            continue
        found += [path for path in files if path.is_file()]
    return found


EVALUATION_RUN = Record(
    {
        "images": Member(("uint8",), ("images", "height", "width", 3)),
        "latents": Member(("float32",), ("images", "states", "latent height", "latent width", 16), (FINITE,)),
        "identity": Member(("str2048",), ()),
    }
)


@dataclass(frozen=True)
class EvaluationPaths:
    """Where stage 4 keeps what; `root` is evaluation/ below the folder that all stages share, or --output."""

    root: Path

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    @property
    def grid(self) -> Path:
        return self.root / "grid.png"

    @property
    def error_plot(self) -> Path:
        return self.root / "error_over_steps.png"

    def run(self, variant: str, identity: str) -> Path:
        """The images and latents of one variant; identity says what they follow from."""
        return self.root / "runs" / f"{variant}_{identity[:16]}.npz"

    def runs_of(self, variant: str) -> list[Path]:
        """Every file of one variant, half-written temporary ones included."""
        return matching(self.root / "runs", rf"{re.escape(variant)}_[0-9a-f]{{16}}\.npz")
