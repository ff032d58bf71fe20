"""The choice of the samples that go through an iteration of stage 3W at once, and of those that are kept in memory."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from calibration_store.errors import OptionError
from calibration_store.sizes import format_bytes
from w4a8.backend.memory import device_memory
from w4a8.backend.parallel import working_cores
from w4a8.rounding.held_boundaries import IN_FILES, ON_DEVICE, ON_HOST, held_bytes, place_of_samples, room_for_samples
from w4a8.rounding.run import RoundingRun
from w4a8.rounding.settings import FLOAT32
from w4a8.rounding.training_samples import fit_in_memory
from w4a8.rounding.unit_phase import UnitPhase
from w4a8.rounding.units import UNITS, UnitSpec

WINDOW = 4  # batches that are kept in memory where there is no room for all samples
SMALLER = dict.fromkeys(UNITS, "a smaller --latent-size in stage 1") | {"model": "--unit block"}


def choose_micro_batch(run: RoundingRun, given: int | None, before: Mapping[str, Any] | None) -> RoundingRun:
    """Return the run with its micro-batch and window.

    The micro-batch is the one given (--micro-batch), or the one that an earlier run of this folder noted (before), or
    the largest that fits. Raises OptionError when not even one sample fits.
    """
    num_bytes = 0
    units, memory = [job for job in UnitPhase.of_run(run) if isinstance(job, UnitPhase)], device_memory()
    need = max((job.iteration_bytes() for job in units), key=lambda one: one.peak(1))
    noted = (before or {}).get("micro_batch")  # 0.8.0 noted more than there are samples
    if run.boundaries is not None and run.settings.precision != FLOAT32:
        num_bytes = held_bytes(run.cache, getattr(mx, run.boundary_dtype))
        run = replace(run, place=place_of_samples(num_bytes, need.peak(noted or 1), run.ranks))
        memory -= num_bytes if run.place == ON_DEVICE else 0
    count = len(run.cache["samples"])
    on_device = count if run.place == ON_DEVICE else 0
    size = min(run.settings.batch_size, count)  # a batch draws without replacement
    fits = need.micro_batch(size, memory)
    micro_batch = noted if noted and given in (None, noted) else run.ranks.from_rank_0(min(given or fits, size))
    peak = need.peak(min(micro_batch * working_cores(), size))
    if peak > memory:
        way = f"--micro-batch {fits}" if micro_batch > fits else SMALLER[run.unit]
        raise OptionError(
            f"iterations with {micro_batch} samples at once take about {format_bytes(peak)} of memory, and "
            f"{format_bytes(memory)} are there: {way} takes less"
        )
    if run.place == ON_HOST:
        on_device = room_for_samples(num_bytes, count, peak)
    window = (before or {}).get("window", 0)
    if before is None and run.place == IN_FILES and not fit_in_memory(count * max(job.sample_bytes() for job in units)):
        window = WINDOW * size
    settings = replace(run.settings, micro_batch=micro_batch, window=run.ranks.from_rank_0(window))
    one_graph = bool(run.ranks.from_rank_0(int(room_for_one_graph(run, micro_batch))))
    return replace(run, settings=settings, on_device=on_device, one_graph=one_graph)


def room_for_one_graph(run: RoundingRun, micro_batch: int) -> bool:
    """Return whether a GPU has room for a graph of all blocks at once.

    A CPU goes block by block, as 0.8.0 did, to the last bit.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return False
    every = UnitPhase(run, UnitSpec("", run.blocks, list(run.layers)))
    return every.iteration_bytes().fits(micro_batch, device_memory())
