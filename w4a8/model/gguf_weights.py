"""Read the weights of GGUF files: packed ones as the numbers that they unpack to, by the format's own package, gguf."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from calibration_store.errors import UserError
from w4a8.backend.lazy_imports import deferred

with deferred("gguf"):
    import gguf

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # where ComfyUI-GGUF notes shapes that it changed


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF file does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def gguf_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of a GGUF file, in the order of PyTorch. Raises UserError for a damaged one."""
    return {tensor.name: shape_of_tensor(reader, tensor) for reader in [_open(path)] for tensor in reader.tensors}


def gguf_arrays(path: Path) -> dict[str, mx.array]:
    """Read {name: array} of a GGUF file; 32-bit numbers stay, everything else becomes float16. Raises UserError."""
    reader, found = _open(path), {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        try:
            with np.errstate(all="ignore"):  # what is not finite is named when weights are checked
                numbers = gguf.quants.dequantize(tensor.data, kind)
        except NotImplementedError:
            raise UserError(
                f"{path}: {tensor.name} is packed as {kind.name}, which the package gguf does not unpack; "
                "give the original model's weights"
            ) from None
        dtype = np.float32 if kind.name in ("F32", "F64") else np.float16
        with np.errstate(all="ignore"):
            found[tensor.name] = mx.array(numbers.reshape(shape_of_tensor(reader, tensor)).astype(dtype))
    return found


def shape_of_tensor(reader: "gguf.GGUFReader", tensor: "gguf.ReaderTensor") -> tuple[int, ...]:
    """Return a tensor's shape (…, out, in); GGUF lists the sides the other way round."""
    noted = reader.get_field(f"{ORIGINAL_SHAPE}{tensor.name}")
    sides = noted.contents() if noted is not None else reversed(tensor.shape.tolist())
    return tuple(int(side) for side in sides)


def _open(path: Path) -> "gguf.GGUFReader":
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise UserError(f"{path}: a GGUF file that is truncated or damaged ({error}); download it again") from None
    if not reader.tensors:
        raise UserError(f"{path}: a GGUF file that holds no weights; download it again")
    return reader
