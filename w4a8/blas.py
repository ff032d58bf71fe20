"""Fast matrix products on Linux CPUs: torch's BLAS in front of the reference BLAS in MLX's wheel. Imported first.

libmlx calls `sgemm_` through the dynamic linker, so a library that was loaded globally before it takes its place
(60 times faster; benchmarks/generation_speed.py). torch is installed anyway: DiffusionKit imports it. Loading it takes
0.3 s, which `--help` should not: it happens when MLX is imported, by whomever.
"""

import ctypes
import importlib.abc
import importlib.metadata
import importlib.util
import platform
import sys
import warnings
from pathlib import Path


class _BeforeMlx(importlib.abc.MetaPathFinder):
    """Finds nothing; notices that MLX is about to be imported."""

    def find_spec(self, fullname, path=None, target=None) -> None:
        if fullname == "mlx.core":
            sys.meta_path.remove(self)
            _load_fast_blas()


def _load_fast_blas() -> None:
    torch = importlib.util.find_spec("torch")
    if torch is not None:
        ctypes.CDLL(str(Path(torch.origin).parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)


def _is_needed() -> bool:
    """Only MLX's Linux CPU wheel has the slow BLAS; on CUDA matrix products never reach it."""
    if platform.system() != "Linux":
        return False
    try:
        importlib.metadata.distribution("mlx-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if "mlx.core" in sys.modules:
    if _is_needed():
        warnings.warn("mlx.core was imported before w4a8: matrix products stay slow (Issue 15)", stacklevel=2)
elif _is_needed():
    sys.meta_path.insert(0, _BeforeMlx())
