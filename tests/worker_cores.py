"""Give each test process a core of its own, since threads that wait for another process's core slow small models down.

A test file that is about several cores is marked `all_cores`. macOS lets no process choose its cores.
"""

import os

import pytest

from w4a8.backend import blas

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Move this process to its cores before the fixtures of a test are made."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, …
    if CORES and worker:
        own = {CORES[int(worker.removeprefix("gw")) % len(CORES)]}
        os.sched_setaffinity(0, CORES if item.get_closest_marker("all_cores") else own)
        blas.set_threads(blas.cores())
