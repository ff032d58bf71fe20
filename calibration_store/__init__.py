"""Everything that the stages leave on the disk: folders, file names, formats and keys. No MLX, no command line.

Other programs import the readers in `__all__` from here; docs/api.md has an example of each. They are declared in
calibration_store/api.py and loaded when one of them is asked for, since every script's `--help` imports this package
(for its limits and choices) and must not wait for NumPy. `dir()` and type checkers see `__all__` as it is.

A module declares, checks, reads and writes one format: manifest, samples, pictures (1), block_cache, cache_plan,
sensitivity (2W), partials, statistics (2A), weights, rounding_checkpoint (3W), configs (3A, 3A'), evaluation (4),
model_folder, quantized_model (5). Below them: layout (where files are), names (layers and keys), stage_folder (the life
of a stage), choices, limits, schema, npz, histograms, files, sizes, errors. FORMAT strings and keys are a contract
(docs/formats.md): extra keys may be added, existing ones keep their meaning.
"""

import importlib
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from calibration_store.api import (
        ActivationStatistics,
        CachedBlock,
        CachedEnds,
        ExportedModel,
        LayerStatistics,
        StoreError,
        read_cache_metadata,
        read_cached_block,
        read_cached_ends,
        read_manifest,
        read_metrics,
        read_multitier_config,
        read_quant_config,
        read_quantized_block,
        read_quantized_model,
        read_sample,
        read_sensitivity,
        read_statistics,
        read_weights_metadata,
    )
else:  # a type checker that saw this function would believe every name

    def __getattr__(name: str) -> object:
        if name in __all__:
            return getattr(importlib.import_module("calibration_store.api"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
