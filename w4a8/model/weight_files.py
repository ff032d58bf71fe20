"""Open weight files."""

from pathlib import Path

import mlx.core as mx


def load_arrays(path: Path) -> dict[str, mx.array]:
    """Open a safetensors file: name -> array, each read when it is used.

    Raises what `mx.load` raises, RuntimeError or ValueError, for a file that is none.
    """
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)  # MLX's stubs also name the results for .npy, and with metadata
    return arrays
