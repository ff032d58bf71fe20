"""The memory that a run may use."""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

# MLX looks at its limit between kernels: on an H200 a run under a limit of 17 GB took 17.8 GB.
LIMIT_SHARE = 0.92
_given: list[int] = []  # limits of `limited_memory`, the one in force last
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def device_memory() -> int:
    """Return the bytes that MLX may use here.

    The limit is MLX's own, a share of the device's memory; on a CPU the limits of the process and its cgroup count,
    too.
    """
    limits = [_given[-1] if _given else mx.get_memory_limit()]
    if mx.default_device() == mx.Device(mx.cpu):
        limits += _process_limits()
    return min(limit for limit in limits if limit > 0)


@contextlib.contextmanager
def limited_memory(num_bytes: int | None) -> Iterator[None]:
    """Let MLX use at most so many bytes until exit, and all that follows `device_memory`; None changes nothing.

    MLX's own limit is LIMIT_SHARE of it.
    """
    if num_bytes is None:
        yield
        return
    _given.append(min(num_bytes, device_memory()))
    before = mx.set_memory_limit(int(LIMIT_SHARE * _given[-1]))
    try:
        yield
    finally:
        mx.set_memory_limit(before)
        _given.pop()


def memory_beside_gpu() -> int:
    """Return the bytes of the host's memory that this process may use; 0 where a GPU shares them, or there is none."""
    if not mx.cuda.is_available() or mx.default_device() == mx.Device(mx.cpu):
        return 0
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_process_limits()]
    return min(limit for limit in limits if limit > 0)


def _process_limits() -> list[int]:
    """Return the limits in bytes of the process and its cgroup; one that is not set is negative, or very large."""
    limits = [] if sys.platform == "darwin" else [resource.getrlimit(resource.RLIMIT_AS)[0]]
    files = (path.read_text().strip() for path in CGROUP_LIMITS if path.exists())
    return limits + [int(text) for text in files if text.isdigit()]
