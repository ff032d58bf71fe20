"""Fast matrix products on Linux CPUs: OpenBLAS in the place of the reference BLAS in MLX's wheel.

MLX's library calls `cblas_sgemm` through a slot that the dynamic linker fills. This module points the slot at the
function of the package scipy-openblas32 (60 times faster; benchmarks/generation_speed.py). It does so when some module
imports MLX, since loading OpenBLAS takes longer than `--help` should, or at once where MLX is imported already.

OpenBLAS's threads sleep while they wait (OPENBLAS_THREAD_TIMEOUT): spinning threads would take the core from another
process. The number of threads is the number of CPUs that this process may use.
"""

import ctypes
import importlib.abc
import importlib.metadata
import importlib.util
import mmap
import os
import sys
import warnings
from pathlib import Path
from typing import Any

PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # every BLAS function that MLX calls
_OPENBLAS: list[ctypes.CDLL] = []


def cores() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int) -> None:
    """Set the number of threads of every later matrix product, whichever thread computes it."""
    for openblas in _OPENBLAS:
        openblas.scipy_openblas_set_num_threads(count)


class _BeforeMlx(importlib.abc.MetaPathFinder):
    """A finder that finds nothing, but notices that MLX is about to be imported."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Replace the matrix products when `mlx.core` is asked for; leave every import to the other finders."""
        if fullname == "mlx.core":
            sys.meta_path.remove(self)
            _replace_products()


def _replace_products() -> None:
    """Point MLX's calls of matrix products at OpenBLAS; warn where that is not possible."""
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2⁴ cycles, the shortest wait that OpenBLAS takes
    package = importlib.util.find_spec("scipy_openblas32")
    if package is None or package.origin is None:
        reason = "scipy-openblas32 is not installed"
    else:
        # Importing the package makes every symbol global; NumPy's OpenBLAS then calls its kernels: wrong products.
        openblas = ctypes.CDLL(str(next(Path(package.origin).parent.glob("lib/libscipy_openblas*.so"))))
        functions = {name: _address(openblas, f"scipy_{name}") for name in PRODUCTS}
        library = Path(str(importlib.metadata.distribution("mlx-cpu").locate_file("mlx/lib/libmlx.so")))
        if library.exists() and redirect_calls(library, functions):
            _OPENBLAS.append(openblas)
            return
        reason = f"{library} calls no {PRODUCTS[0]}"
    warnings.warn(f"matrix products are slow: {reason} (Issue 15)", stacklevel=2)


def _address(library: ctypes.CDLL, name: str) -> int:
    """Return the address of a library's function. Raises AttributeError where the library lacks it."""
    address = ctypes.cast(library[name], ctypes.c_void_p).value
    assert address is not None  # a symbol that was found is not at address 0
    return address


class _LinkMap(ctypes.Structure):
    """The head of glibc's struct link_map."""

    _fields_ = (("address", ctypes.c_size_t), ("name", ctypes.c_char_p), ("dynamic", ctypes.c_size_t))


class _Dynamic(ctypes.Structure):
    """An entry of the dynamic section, Elf64_Dyn."""

    _fields_ = (("tag", ctypes.c_int64), ("value", ctypes.c_uint64))


class _Relocation(ctypes.Structure):
    """A relocation, Elf64_Rela; the upper half of `info` is the symbol's index."""

    _fields_ = (("offset", ctypes.c_uint64), ("info", ctypes.c_uint64), ("addend", ctypes.c_int64))


RTLD_DI_LINKMAP = 2
DT_PLTRELSZ, DT_STRTAB, DT_SYMTAB, DT_JMPREL = 2, 5, 6, 23
SYMBOL_BYTES = 24  # size of Elf64_Sym, which begins with the offset of its name in the string table


def redirect_calls(path: Path, addresses: dict[str, int]) -> int:
    """Let the shared library at `path` call the functions at these addresses by their names.

    Return the number of changed calls. The function changes the slots of the library's procedure linkage table (System
    V ABI, chapter 5, "Dynamic Linking"). All other libraries of the process keep their own calls.
    """
    process, link_map = ctypes.CDLL(None), ctypes.POINTER(_LinkMap)()
    process.dlinfo(ctypes.c_void_p(ctypes.CDLL(str(path))._handle), RTLD_DI_LINKMAP, ctypes.byref(link_map))
    base, at, table = link_map.contents.address, link_map.contents.dynamic, {}
    while (entry := _Dynamic.from_address(at)).tag:
        table[entry.tag] = entry.value
        at += ctypes.sizeof(_Dynamic)
    count = table.get(DT_PLTRELSZ, 0) // ctypes.sizeof(_Relocation)
    redirected = 0
    for relocation in (_Relocation * count).from_address(table[DT_JMPREL]) if count else ():
        symbol = table[DT_SYMTAB] + SYMBOL_BYTES * (relocation.info >> 32)
        name = ctypes.string_at(table[DT_STRTAB] + ctypes.c_uint32.from_address(symbol).value).decode()
        if name in addresses:
            slot = base + relocation.offset
            page = ctypes.c_void_p(slot - slot % mmap.PAGESIZE)
            # The page is read-only where the library was linked with -z now.
            process.mprotect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
            ctypes.c_void_p.from_address(slot).value = addresses[name]
            redirected += 1
    return redirected


def _is_needed() -> bool:
    """Return whether MLX is its Linux CPU build.

    On CUDA no matrix product reaches this BLAS, and on macOS MLX has Accelerate.
    """
    try:
        importlib.metadata.distribution("mlx-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return sys.platform == "linux"


if _is_needed():
    if "mlx.core" in sys.modules:
        _replace_products()
    else:
        sys.meta_path.insert(0, _BeforeMlx())
