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
    start, count = time.perf_counter(), len(statistics.step_keys)
    steps = steps_of(replace(statistics, step_keys=statistics.step_keys[:1]))
    size = len(orjson.dumps(dict(config_of(steps)), default=list, option=orjson.OPT_SERIALIZE_NUMPY)) * count
    seconds = (time.perf_counter() - start) * count
    layers = next(iter(steps.values()))
    arrays = [value for layer in layers.values() for value in vars(layer).values() if isinstance(value, np.ndarray)]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = (
        resident + sum(array.nbytes for array in arrays) * (count - 1) + size // 2
    )  # half of the file: the entries as Python objects
    work = f"{len(layers)} layers at {count} steps"
    return Estimate(work=work, seconds=seconds, bytes_written=size, folder=output.parent, peak_bytes=peak)
