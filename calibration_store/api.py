"""The readers of `calibration_store` for other people's programs, one for each file that a stage leaves.

Every reader takes the calibration folder (`--calib-dir`) first, checks the file against its declaration, and raises
StoreError in one line that names the file and what is wrong. A reader refuses a file that is of another calibration run
than the folder's manifest. docs/api.md has an example of each, docs/formats.md the meaning of every key.

The modules of the formats have functions of the same names for the stages, which take the paths that a stage holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration_store import configs, samples, statistics, weights
from calibration_store.block_cache import (
    CachedBlock,
    CachedEnds,
    read_cache_metadata,
    read_cached_block,
    read_cached_ends,
)
from calibration_store.errors import StoreError
from calibration_store.evaluation import METRICS
from calibration_store.layout import (
    ActivationPaths,
    CalibrationPaths,
    EvaluationPaths,
    QuantizedModelPaths,
    WeightPaths,
)
from calibration_store.manifest import read_manifest, refuse_other_run
from calibration_store.model_folder import check_exported, weight_file
from calibration_store.quantized_model import EXPORT, read_activations, read_export
from calibration_store.sensitivity import read_sensitivity
from calibration_store.statistics import ActivationStatistics, LayerStatistics

__all__ = [
    "ActivationStatistics",
    "CachedBlock",
    "CachedEnds",
    "ExportedModel",
    "LayerStatistics",
    "StoreError",
    "read_cache_metadata",
    "read_cached_block",
    "read_cached_ends",
    "read_manifest",
    "read_metrics",
    "read_multitier_config",
    "read_quant_config",
    "read_quantized_block",
    "read_quantized_model",
    "read_sample",
    "read_sensitivity",
    "read_statistics",
    "read_weights_metadata",
]


def read_sample(
    calib_dir: Path, image_id: int, step_index: int, manifest: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Read one sample of stage 1: the latent that the model is given at a step of an image.

    Returns x (1, h, w, 16) and timestep () in the run's stored dtype, sigma () float32, step_index () and image_id ()
    int32, is_final () bool. manifest: of `read_manifest`, where it has been read. Raises StoreError.
    """
    manifest = manifest or read_manifest(calib_dir)
    return samples.read_sample(CalibrationPaths(calib_dir), manifest, image_id, step_index)


def read_statistics(calib_dir: Path) -> ActivationStatistics:
    """Read the statistics of stage 2A; `read_step(key)` of the result reads those of one step, layer by layer.

    Raises StoreError.
    """
    path = ActivationPaths(calib_dir).statistics
    found = statistics.read_statistics(path)
    refuse_other_run(calib_dir, path, found.metadata, f"run {statistics.STATISTICS_FILE.made_by} with --force")
    return found


def read_quant_config(calib_dir: Path) -> dict[str, Any]:
    """Read quant_config.json of stage 3A: scale, shift and clipping range of each layer's input at each step.

    Raises StoreError.
    """
    return _config(calib_dir, ActivationPaths(calib_dir).quant_config, multitier=False)


def read_multitier_config(calib_dir: Path) -> dict[str, Any]:
    """Read quant_config_multitier.json of stage 3A': as `read_quant_config`, with bits of 4, 6 or 8 for each entry.

    Raises StoreError.
    """
    return _config(calib_dir, ActivationPaths(calib_dir).multitier_config, multitier=True)


def _config(calib_dir: Path, path: Path, multitier: bool) -> dict[str, Any]:
    config = configs.read_config(path, multitier)
    made_by = (configs.MULTITIER_CONFIG if multitier else configs.W4A8_CONFIG).made_by
    refuse_other_run(calib_dir, path, config.get("metadata") or {}, f"run {made_by} again to make it anew")
    return config


def read_weights_metadata(calib_dir: Path) -> dict[str, Any]:
    """Read the metadata of the learned rounding of stage 3W: blocks, bits, group size, options and losses.

    Raises StoreError.
    """
    path = WeightPaths(calib_dir).metadata
    metadata = weights.WEIGHTS_METADATA.read(path)
    refuse_other_run(calib_dir, path, metadata, f"run {weights.OPTIMIZE} with --force")
    return metadata


def read_quantized_block(
    calib_dir: Path, block: str, metadata: Mapping[str, Any] | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Read the learned rounding of one block, {layer: {field: array}}, with Ŵ = scale·(q − zero_point).

    Codes `q` (out, in) are uint8, `scale` and `zero_point` (out, groups) float32.
    `calibration_store.weights.layer_record` has the fields that may be there, too. metadata: of
    `read_weights_metadata`, where it has been read. Raises StoreError.
    """
    metadata = metadata or read_weights_metadata(calib_dir)
    if block not in metadata["block_names"]:
        path, known = WeightPaths(calib_dir).metadata, ", ".join(metadata["block_names"])
        raise StoreError(f"{path}: block {block} is not quantized (it has {known})")
    return weights.read_quantized_block(WeightPaths(calib_dir), block, metadata)


def read_metrics(calib_dir: Path) -> dict[str, Any]:
    """Read metrics.json of stage 4: PSNR in dB, SSIM and FLIP of every variant against the original model.

    calib_dir: the calibration folder, or the folder that stage 4 was given as --output. Raises StoreError.
    """
    own = EvaluationPaths(calib_dir)
    path = own.metrics if own.metrics.exists() else EvaluationPaths.below(calib_dir).metrics
    metrics = METRICS.read(path)
    refuse_other_run(calib_dir, path, metrics, f"run {METRICS.made_by} again")
    return metrics


@dataclass(frozen=True)
class ExportedModel:
    """The model folder that stage 5 wrote."""

    folder: Path
    config: dict[str, Any]  # config.json: `quantization` by layer, `export` with bits, run and digests
    activations: dict[str, Any] | None  # activations.json; None: exported without --activations
    weights: (
        Path  # mmdit.safetensors: the transformer's arrays, packed layers as `weight` uint32, `scales` and `biases`
    )


def read_quantized_model(calib_dir: Path) -> ExportedModel:
    """Read the description of the model that stage 5 exported, and check the digests of its files.

    calib_dir: the calibration folder, or the exported model folder itself. Raises StoreError.
    """
    own = QuantizedModelPaths(calib_dir)
    paths = own if own.config.exists() else QuantizedModelPaths.below(calib_dir)
    config = read_export(paths.root)
    check_exported(paths.root, config)
    refuse_other_run(calib_dir, paths.config, config["export"], f"run {EXPORT} with --force")
    activations = read_activations(paths.root) if config["export"]["activations"] else None
    return ExportedModel(paths.root, config, activations, weight_file(paths.root, "mmdit"))
