"""The activation track: statistics (2A), also those that another tool wrote, configurations (3A, 3A'), evaluation (4)."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from calibration_store.files import StoreError, atomic_file, matching, read_json, read_npz

STATISTICS_FORMAT = "per_timestep_npz_v2"
W4A8_FORMAT = "per_timestep_quant_config_v4"
MULTITIER_FORMAT = "per_timestep_quant_config_v3"
TEMPORAL_FORMAT = "layer_temporal_analysis_v1"
PARTIAL_FORMAT = "activation_partials_v1"
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
        return [path for folder, pattern in patterns.items() for path in matching(folder, pattern)]


PARTIAL_KEYS = {"layers", "inputs", "channels", "limits", "histograms"}


def read_partial(paths: ActivationPaths, image_id: int, step_index: int) -> dict[str, np.ndarray]:
    """The statistics of one pass (arrays: PARTIAL_KEYS). Raises StoreError that names the file."""
    path = paths.partial(image_id, step_index)
    remedy = "run collect_layer_activations.py with --resume to make it anew"
    arrays = read_npz(path, remedy)
    if set(arrays) != PARTIAL_KEYS:
        raise StoreError(f"{path}: not a partial result; {remedy}")
    return arrays


def is_partial_complete(paths: ActivationPaths, image_id: int, step_index: int) -> bool:
    """Whether the result of one pass is on disk and valid."""
    try:
        read_partial(paths, image_id, step_index)
    except StoreError:
        return False
    return True


COLLECT = "collect_layer_activations.py"


STATISTICS_FIELDS = ("min", "max", "shift", "hist_counts", "hist_edges")  # what a layer may have beside its averages


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer's input looked like at one step; arrays in the dtype of the file."""

    avg_min: np.ndarray  # (channels,)
    avg_max: np.ndarray  # (channels,)
    extremes: tuple[np.ndarray, np.ndarray] | None  # minimum and maximum over all images, (channels,) each
    shift: np.ndarray | None  # (channels,), post-GELU layers
    counts: np.ndarray | None  # (bins,)
    edges: np.ndarray | None  # (bins + 1,)
    entry: Mapping[str, Any]  # what the JSON index says of it; may be empty

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
        remedy = f"run {COLLECT} to make it anew (TROUBLESHOOTING_GUIDE Issue 21)"
        index = _read_index(index_path, remedy)
        suffixes = tuple(f"__{field}" for field in ("avg_min", "avg_max", *STATISTICS_FIELDS))
        arrays = read_npz(path, remedy, lambda member: member.endswith(suffixes))
        layers = {}
        for name, entry in index.items():
            prefix = name.replace(".", "_")
            low, high, shift, counts, edges = (
                arrays.get(f"{prefix}__{field}")
                for field in ("avg_min", "avg_max", "shift", "hist_counts", "hist_edges")
            )
            extremes = (arrays.get(f"{prefix}__min"), arrays.get(f"{prefix}__max"))
            extremes = None if any(array is None for array in extremes) else extremes
            if low is None or high is None:
                raise StoreError(
                    f"{path}: no {prefix}__avg_min and __avg_max for layer {name} of {index_path.name}; {remedy}"
                )
            layers[name] = LayerStatistics(low, high, extremes, shift, counts, edges, entry)
            fault = _statistics_fault(layers[name])
            if fault:
                raise StoreError(f"{path}: {name}: {fault}; {remedy}")
        return layers


def _read_index(path: Path, remedy: str) -> dict[str, Mapping[str, Any]]:
    try:
        index = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{path}: missing; {remedy}") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise StoreError(f"{path}: not valid JSON ({error}); {remedy}") from None
    if not isinstance(index, dict) or not index or not all(isinstance(entry, dict) for entry in index.values()):
        raise StoreError(f"{path}: not an index of layers; {remedy}")
    return index


def _statistics_fault(layer: LayerStatistics) -> str | None:
    """What makes a layer's statistics unusable, or None."""
    if layer.avg_min.ndim != 1 or layer.avg_min.shape != layer.avg_max.shape or not layer.avg_min.size:
        return f"avg_min {layer.avg_min.shape} and avg_max {layer.avg_max.shape} are not of equal length"
    low, high = layer.extremes or (None, None)
    arrays = {"avg_min": layer.avg_min, "avg_max": layer.avg_max, "shift": layer.shift, "min": low, "max": high}
    for field, array in arrays.items():
        if array is not None and array.shape != layer.avg_min.shape:
            return f"{field} {array.shape} is not of the length of avg_min {layer.avg_min.shape}"
        if array is not None and not np.isfinite(array).all():
            return f"{field} holds NaN or infinity"
    if (layer.avg_min > layer.avg_max).any():
        return "avg_min is above avg_max"
    if any(isinstance(value, float) and not math.isfinite(value) for value in layer.entry.values()):
        return "the index holds NaN or infinity"
    if layer.counts is not None:
        if layer.edges is None or layer.edges.shape != (layer.counts.size + 1,):
            return "hist_counts and hist_edges do not belong together"
        if not (layer.edges[1:] > layer.edges[:-1]).all():
            return "the histogram has bins of zero width"
        if layer.counts.min() < 0 or not layer.counts.any():
            return "the histogram is empty or negative"
    return None


def read_statistics(path: Path) -> ActivationStatistics:
    """Open layer_statistics.json; `timestep_dir` may be absolute, beside the file, or relative to the working folder.

    Raises StoreError when the format is not per_timestep_npz_v2 or an entry is missing.
    """
    content = read_json(path, STATISTICS_FORMAT, COLLECT)
    keys, sigmas = content.get("step_keys"), content.get("sigma_map")
    if not isinstance(keys, list) or not keys:
        raise StoreError(f"{path}: no valid entry 'step_keys'; run {COLLECT} to make it anew")
    for key in map(str, keys):
        if not isinstance(sigmas, dict) or not isinstance(sigmas.get(key), (int, float)):
            raise StoreError(f"{path}: 'sigma_map' has no sigma for step {key}; run {COLLECT} to make it anew")
    folder = Path(str(content.get("timestep_dir", "timestep_stats")))
    candidates = [path.parent / folder, folder]  # an absolute folder is both
    timestep_dir = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if timestep_dir is None:
        raise StoreError(f"{path}: its 'timestep_dir' {folder} is neither beside it nor in the working folder")
    keys = [str(key) for key in keys]
    return ActivationStatistics(
        path, timestep_dir, keys, {key: float(sigmas[key]) for key in keys}, content.get("metadata") or {}
    )


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
    if path.exists():
        with path.open("rb") as file:
            if f'"format":"{own_format}"'.encode() not in file.read(200).replace(b'": "', b'":"'):
                raise StoreError(f"{path}: exists and is no {own_format} file; give another {option}")


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
