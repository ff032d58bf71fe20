"""The dry run of an analysis (3A, 3A'): estimate time, bytes and memory from the first step."""

import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from calibration_store.statistics import ActivationStatistics
from w4a8.analysis.steps import two_processes
from w4a8.backend.estimates import Estimate

_Steps = dict[str, dict[str, Any]]  # step key -> layer -> a LayerStep or a Decision


def estimate_analysis(
    statistics: ActivationStatistics, output: Path, steps_of: Callable[[ActivationStatistics], _Steps],
    config_of: Callable[[_Steps], Iterable],
) -> Estimate:  # fmt: skip
    """Analyze the first step, and return an estimate for all steps.

    output: the config that the analysis would write; steps_of: analyzes statistics; config_of: turns the analyzed steps
    into the entries (step key, layers) of the config.
    """
    start, count, processes = time.perf_counter(), len(statistics.step_keys), 1 + two_processes(statistics)
    steps = steps_of(replace(statistics, step_keys=statistics.step_keys[:1]))
    analyzed = time.perf_counter()
    size = len(orjson.dumps(dict(config_of(steps)), default=list, option=orjson.OPT_SERIALIZE_NUMPY)) * count
    seconds = ((analyzed - start) / processes + time.perf_counter() - analyzed) * count
    layers = next(iter(steps.values()))
    values = [value for layer in layers.values() for value in vars(layer).values()]
    arrays = {id(value): value.nbytes for value in values if isinstance(value, np.ndarray)}  # q, k and v share theirs
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = (
        processes * resident + sum(arrays.values()) * (count - 1) + size // 2
    )  # half of the file: the entries as Python objects
    work = f"{len(layers)} layers at {count} steps"
    return Estimate(work=work, seconds=seconds, bytes_written=size, folder=output.parent, peak_bytes=peak)
