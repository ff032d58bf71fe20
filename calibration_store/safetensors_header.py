"""Read names, dtypes and shapes of arrays from the header of a safetensors file. No array is read."""

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from calibration_store.errors import StoreError
from calibration_store.files import open_regular, read_bytes, why_unreadable

MODEL_FILES = "models/sd3-emoji shows the layout of a model folder"


def remedy_of(folder: Path) -> str:
    """Return what to do about a damaged file of a model folder: an export is made anew."""
    config = folder / "config.json"
    if config.is_file() and b'"export"' in read_bytes(config, MODEL_FILES):
        return "run export_quantized_model.py with --force, or copy the whole folder again"
    return "copy or download it again"


def weight_sizes(path: Path) -> dict[str, tuple[str, int]]:
    """Return {name: (dtype in safetensors' spelling, elements)} of a safetensors file's header. Raises StoreError."""
    return {name: (dtype, math.prod(shape)) for name, (dtype, shape) in _weight_header(path).items()}


def weight_dtypes(path: Path) -> dict[str, str]:
    """Return {name: dtype in safetensors' spelling} of a file, from its header. Raises StoreError."""
    return {name: dtype for name, (dtype, _) in _weight_header(path).items()}


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of a safetensors file, from its header. Raises StoreError."""
    return {name: shape for name, (_, shape) in _weight_header(path).items()}


def _weight_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with open_regular(path, MODEL_FILES, limit=None):
        pass  # safe_open would wait for a pipe or a device
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
            header = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except OSError as error:
        raise StoreError(f"{path}: {why_unreadable(path, error, MODEL_FILES)}") from None
    except (SafetensorError, MemoryError) as error:  # MemoryError: a header that claims more bytes than can be mapped
        raise StoreError(
            f"{path}: truncated or damaged, or no safetensors file ({error}); {remedy_of(path.parent)}"
        ) from None
    if not header:
        raise StoreError(f"{path}: holds no weights; {remedy_of(path.parent)}")
    return header
