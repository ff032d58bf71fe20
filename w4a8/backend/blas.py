"""Fast matrix products on Linux CPUs: OpenBLAS in the place of the reference BLAS in MLX's wheel.

MLX's library calls `cblas_sgemm` through a slot that the dynamic linker fills. This module points the slot at the
function of the package scipy-openblas32 (60 times faster; benchmarks/generation_speed.py). It does so when MLX is
imported, by whomever, since loading OpenBLAS takes longer than `--help` should; or at once, where MLX is there already.

OpenBLAS's threads sleep while they wait (OPENBLAS_THREAD_TIMEOUT): spinning threads take the core from whoever works
there. There are as many threads as CPUs that this process may use.
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

PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # every BLAS function that MLX calls
_OPENBLAS: list[ctypes.CDLL] = []


def cores() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int) -> None:
    """Set the number of threads of every later matrix product, in whichever thread it is asked for."""
    for openblas in _OPENBLAS:
        openblas.scipy_openblas_set_num_threads(count)


class _BeforeMlx(importlib.abc.MetaPathFinder):
    """Finds nothing; notices that MLX is about to be imported."""

    def find_spec(self, fullname, path=None, target=None) -> None:
        if fullname == "mlx.core":
            sys.meta_path.remove(self)
            _replace_products()


def _replace_products() -> None:
    """Point MLX's calls of matrix products at OpenBLAS; warn where that is not possible."""
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2⁴ cycles, the shortest that OpenBLAS takes
    package = importlib.util.find_spec("scipy_openblas32")
    if package is None:
        reason = "scipy-openblas32 is not installed"
    else:
        # Its own import makes every symbol global, and NumPy's OpenBLAS then calls kernels of this one: wrong products.
        openblas = ctypes.CDLL(str(next(Path(package.origin).parent.glob("lib/libscipy_openblas*.so"))))
        functions = {name: ctypes.cast(openblas[f"scipy_{name}"], ctypes.c_void_p).value for name in PRODUCTS}
        library = Path(importlib.metadata.distribution("mlx-cpu").locate_file("mlx/lib/libmlx.so"))
        if library.exists() and redirect_calls(library, functions):
            _OPENBLAS.append(openblas)
            return
        reason = f"{library} calls no {PRODUCTS[0]}"
    warnings.warn(f"matrix products are slow: {reason} (Issue 15)", stacklevel=2)


class _LinkMap(ctypes.Structure):
    """The head of glibc's struct link_map."""

    _fields_ = (("address", ctypes.c_size_t), ("name", ctypes.c_char_p), ("dynamic", ctypes.c_size_t))


class _Dynamic(ctypes.Structure):
    """Elf64_Dyn."""

    _fields_ = (("tag", ctypes.c_int64), ("value", ctypes.c_uint64))


class _Relocation(ctypes.Structure):
    """Elf64_Rela; the upper half of `info` is the symbol's index."""

    _fields_ = (("offset", ctypes.c_uint64), ("info", ctypes.c_uint64), ("addend", ctypes.c_int64))


RTLD_DI_LINKMAP = 2
DT_PLTRELSZ, DT_STRTAB, DT_SYMTAB, DT_JMPREL = 2, 5, 6, 23
SYMBOL_BYTES = 24  # of Elf64_Sym, which begins with its name's place in the string table


def redirect_calls(path: Path, addresses: dict[str, int]) -> int:
    """Let the shared library at `path` call the functions at these addresses by their names; return the number of calls changed.

    It changes the slots of the library's procedure linkage table (System V ABI, chapter 5, "Dynamic Linking"). Whatever
    else the process has loaded keeps calling what it called.
    """
    process, link_map = ctypes.CDLL(None), ctypes.POINTER(_LinkMap)()
    process.dlinfo(ctypes.c_void_p(ctypes.CDLL(str(path))._handle), RTLD_DI_LINKMAP, ctypes.byref(link_map))
    base, place, table = link_map.contents.address, link_map.contents.dynamic, {}
    while (entry := _Dynamic.from_address(place)).tag:
        table[entry.tag] = entry.value
        place += ctypes.sizeof(_Dynamic)
    count = table.get(DT_PLTRELSZ, 0) // ctypes.sizeof(_Relocation)
    redirected = 0
    for relocation in (_Relocation * count).from_address(table[DT_JMPREL]) if count else ():
        symbol = table[DT_SYMTAB] + SYMBOL_BYTES * (relocation.info >> 32)
        name = ctypes.string_at(table[DT_STRTAB] + ctypes.c_uint32.from_address(symbol).value).decode()
        if name in addresses:
            slot = base + relocation.offset
            page = ctypes.c_void_p(slot - slot % mmap.PAGESIZE)
            process.mprotect(
                page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE
            )  # read-only where linked with -z now
            ctypes.c_void_p.from_address(slot).value = addresses[name]
            redirected += 1
    return redirected


def _is_needed() -> bool:
    """Return whether MLX is its Linux CPU build: on CUDA matrix products never reach this BLAS, macOS has Accelerate."""
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
