"""The memory that a run may use."""

import resource
import sys
from pathlib import Path

import mlx.core as mx

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def device_memory() -> int:
    """Return the bytes that MLX may use here.

    The limit is MLX's own, a share of the device's memory; on a CPU the limits of the process and its cgroup count,
    too.
    """
    limits = [mx.get_memory_limit()]
    if mx.default_device() == mx.Device(mx.cpu):
        if sys.platform != "darwin":
            limits.append(resource.getrlimit(resource.RLIMIT_AS)[0])
        limits += [
            int(text) for path in CGROUP_LIMITS if path.exists() and (text := path.read_text().strip()).isdigit()
        ]
    return min(limit for limit in limits if limit > 0)
