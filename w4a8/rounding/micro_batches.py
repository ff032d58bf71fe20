"""What an iteration of stage 3W takes of the memory, and how many samples go through it at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calibration_store.block_cache import VELOCITY, block_keys, boundary_shapes, holds_ends, stored_shapes
from calibration_store.errors import OptionError
from calibration_store.sizes import format_bytes
from w4a8.backend.memory import device_memory
from w4a8.backend.parallel import working_cores
from w4a8.rounding.kinds import MODEL, UNITS
from w4a8.rounding.run import END_TO_END, RoundingRun, job_layers, num_weights
from w4a8.rounding.training_samples import fit_in_memory

# What the peak of an iteration was measured to be on a CPU (benchmarks/peak_memory.py --fit), that of the first one of
# tuning: arrays of the unit's weights in float32 (the weights, floors, α, moments, codes, gradients, the state before);
# of a sample in a block's backward pass, (rows, tokens, hidden) and attention scores; shares of the latter that are
# there once, and for each block.
WEIGHT_ARRAYS, TRAINING_TOKEN_ARRAYS, TRAINING_SCORE_ARRAYS = 10, 86, 1.95
ONCE, EACH_BLOCK = 0.37, 0.61
WINDOW = 4  # batches that are kept in memory where all samples are too many
TRAINING_SHARE, MOST_MEMORY = 0.75, 20e9  # of the device's memory that an iteration may take, and in all


@dataclass(frozen=True)
class IterationBytes:
    """What an iteration takes: weights of the unit, one sample in one block, and how many blocks there are."""

    weights: int
    sample: int
    blocks: int

    def peak(self, samples: int) -> int:
        """At the peak, with so many samples at the same time."""
        return int(WEIGHT_ARRAYS * self.weights + samples * (ONCE + EACH_BLOCK * self.blocks) * self.sample)

    def micro_batch(self, batch_size: int, memory: int) -> int:
        """The largest micro-batch that fits, 1 at least; a CPU's cores share the batch."""
        streams = min(working_cores(), batch_size)
        parts = range(streams, batch_size + 1)  # of about the same size
        sizes = (-(-batch_size // count) for count in parts)
        return next((size for size in sizes if self.peak(size * streams) <= min(TRAINING_SHARE * memory, MOST_MEMORY)), 1)


def end_to_end_bytes(rounding: RoundingRun) -> int:
    """The peak of the last phase, from shapes alone: codes and grids of all, the tokens between the blocks, a block's gradients."""
    if not rounding.settings.end_to_end:
        return 0
    cached, settings = boundary_shapes(rounding.cache), rounding.settings
    sizes = [num_weights(map(rounding.layers.get, job_layers(job))) for job in rounding.jobs if job.name != END_TO_END]
    tokens = sum(4 * math.prod(cached[key]) for key in block_keys(rounding.cache, rounding.blocks[0])[0])
    at_once = min(settings.chunk * working_cores(), settings.batch_size)
    grids = 8 * 4 * sum(sizes) // (settings.group_size or 1024)  # scales, zero points, their moments and slopes
    block = iteration_bytes(rounding)
    one = IterationBytes(4 * max(sizes), block.sample, 1)
    return sum(sizes) + grids + at_once * tokens * len(rounding.blocks) + one.peak(at_once)


def iteration_bytes(rounding: RoundingRun) -> IterationBytes:
    """Of the largest unit, from shapes alone."""
    config, cached, found = rounding.mmdit.config, boundary_shapes(rounding.cache), []
    for job in rounding.jobs:
        if job.name == END_TO_END:  # a block at a time
            continue
        shapes = [cached[key] for key in block_keys(rounding.cache, job.blocks[0])[0]]
        rows, hidden, tokens = shapes[0][0], shapes[0][-1], sum(shape[1] for shape in shapes)
        arrays, scores = rows * tokens * hidden, rows * config.num_heads * tokens**2
        weights = sum(out * width for name in job_layers(job) for out, width in [rounding.layers[name].shape])
        sample = 4 * int(TRAINING_TOKEN_ARRAYS * arrays + TRAINING_SCORE_ARRAYS * scores)
        found.append(IterationBytes(4 * weights, sample, len(job.blocks)))
    return max(found, key=lambda one: one.peak(1))


SMALLER = dict.fromkeys(UNITS, "a smaller --latent-size in stage 1") | {"model": "--unit block"}


def choose_micro_batch(rounding: RoundingRun, given: int | None, before: Mapping[str, Any] | None) -> RoundingRun:
    """The run with its micro-batch and window: as given, as an earlier run of this folder had them, or as large as fits.

    Raises OptionError when not even one sample fits.
    """
    need, memory = iteration_bytes(rounding), device_memory()
    size = min(rounding.settings.batch_size, len(rounding.cache["samples"]))  # a batch holds no sample twice
    fits = need.micro_batch(size, memory)
    noted = (before or {}).get("micro_batch")  # 0.8.0 noted more than there are samples
    micro_batch = noted if noted and given in (None, noted) else rounding.ranks.from_rank_0(min(given or fits, size))
    peak = need.peak(min(micro_batch * working_cores(), size))
    if peak > memory:
        way = f"--micro-batch {fits}" if micro_batch > fits else SMALLER[rounding.unit]
        raise OptionError(
            f"iterations with {micro_batch} samples at once take about {format_bytes(peak)} of memory, and "
            f"{format_bytes(memory)} are there: {way} takes less"
        )
    window = (before or {}).get("window", 0)
    if before is None and not fit_in_memory(samples_bytes(rounding)):
        window = WINDOW * size
    settings = replace(rounding.settings, micro_batch=micro_batch, window=rounding.ranks.from_rank_0(window))
    return replace(rounding, settings=settings)


def samples_bytes(rounding: RoundingRun) -> int:
    """What all samples of a unit take, of the largest unit."""
    cache, found, walked = rounding.cache, [], np.dtype(rounding.boundary_dtype).itemsize
    stored = stored_shapes(cache)
    shapes = stored | boundary_shapes(cache)
    for job in rounding.jobs:
        if job.name != END_TO_END:
            inputs, outputs = block_keys(cache, job.blocks[0], job.blocks[-1])
            outputs = [VELOCITY] if holds_ends(cache) and rounding.unit == MODEL else outputs
            keys = [*inputs, "modulation_input", *outputs]
            keys += inputs if rounding.settings.block_inputs == "mixed" else []
            found.append(sum((2 if key in stored else walked) * math.prod(shapes[key]) for key in keys))
    return max(found) * len(cache["samples"])
