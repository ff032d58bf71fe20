"""The only place that knows folders, file names, formats and keys; NumPy, no MLX, no command line.

A module a format, which it declares, checks, reads and writes: manifest, samples, pictures (1), block_cache, cache_plan
(2W), partials, statistics (2A), weights, checkpoint (3W), configs (3A, 3A'), evaluation (4), model_folder. Below them:
layout (where files are), names (layers and keys), stage_folder (the life of a stage), schema, npz, files, errors.
FORMAT strings and keys are a contract (calibration_data/README.md): extra keys may be added, existing ones keep their
meaning.

Other programs read with `read_manifest`, `read_cached_block`, `read_cached_ends`, `read_statistics`, `read_config`,
`read_quantized_block`, which raise StoreError in one line; they are found here when they are asked for.
"""

import importlib

READERS = {
    "read_manifest": "manifest",
    "read_cached_block": "block_cache",
    "read_cached_ends": "block_cache",
    "read_statistics": "statistics",
    "read_config": "configs",
    "read_quantized_block": "weights",
    "StoreError": "errors",
}


def __getattr__(name: str):
    if name in READERS:
        return getattr(importlib.import_module(f"calibration_store.{READERS[name]}"), name)
    raise AttributeError(f"calibration_store has no {name}")
