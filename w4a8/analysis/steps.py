"""The steps of statistics, one after the other: two processes read and analyze them where that takes long."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from calibration_store.statistics import ActivationStatistics
from w4a8.backend.blas import cores
from w4a8.backend.second_process import with_second_process

SECOND_PROCESS_BYTES = 32 * 2**20  # larger statistics are worth the start of a second process
_Result = TypeVar("_Result")


def two_processes(statistics: ActivationStatistics) -> bool:
    """Return whether a second process helps to analyze these statistics. No result depends on it."""
    files = [path for path in map(statistics.step_path, statistics.step_keys) if path.exists()]
    return len(files) > 1 and cores() > 1 and sum(path.stat().st_size for path in files) > SECOND_PROCESS_BYTES


def each_step(function: Callable[[str], _Result], statistics: ActivationStatistics) -> Iterator[tuple[str, _Result]]:
    """Yield (key, function(key)) of every step, in their order. The function and its results can be pickled."""
    keys = statistics.step_keys
    results = with_second_process(function, keys) if two_processes(statistics) else map(function, keys)
    yield from zip(keys, results, strict=True)
