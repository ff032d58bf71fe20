"""Fast matrix products on Linux CPUs: torch's BLAS in front of the reference BLAS in MLX's wheel. Imported first.

libmlx calls `sgemm_` through the dynamic linker, so a library that was loaded globally before it takes its place
(60 times faster; benchmarks/generation_speed.py). Loading it takes 0.2 s, which `--help` should not: it happens when
MLX is imported, by whomever. torch itself is never imported.

Its threads sleep while they wait (OMP_WAIT_POLICY, which libgomp reads when it is loaded): spinning ones take the core
from whoever works there. There are as many as CPUs that this process may use.
"""

import ctypes
import importlib.abc
import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from pathlib import Path

_LOADED: list[ctypes.CDLL] = []


class _BeforeMlx(importlib.abc.MetaPathFinder):
    """Finds nothing; notices that MLX is about to be imported."""

    def __init__(self):
        self.torch = importlib.util.find_spec("torch")

    def find_spec(self, fullname, path=None, target=None) -> None:
        if fullname == "mlx.core":
            sys.meta_path.remove(self)
            if self.torch is not None:
                _load_fast_blas(Path(self.torch.origin).parent / "lib" / "libtorch_cpu.so")


def _load_fast_blas(library: Path) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _LOADED.append(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))


def cores() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int) -> None:
    """Threads of every matrix product from now on, whichever thread asks for it; nothing where the BLAS is not MKL.

    torch.set_num_threads, and OpenMP's own, would speak for the calling thread alone: MLX computes in others.
    """
    if _LOADED and hasattr(_LOADED[0], "mkl_serv_set_num_threads"):
        _LOADED[0].mkl_serv_set_num_threads(count)


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
