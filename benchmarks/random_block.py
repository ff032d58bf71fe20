"""What rounding_cost.py trains a block of random weights on, and where an iteration's time goes."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from w4a8.model.layers import Block
from w4a8.rounding.training import Training
from w4a8.rounding.training_samples import SampleBatch


class RandomSamples:
    """Stands for a block's cached samples: normal tokens, and what the unquantized block gives for them, float16."""

    def __init__(self, block: Block, count: int, tokens: int, text_tokens: int, hidden: int):
        random = np.random.default_rng(0)
        shapes = [(2, tokens, 1, hidden), (2, text_tokens, 1, hidden), (2, 1, 1, hidden)]
        self.arrays = [random.standard_normal((count, *shape), np.float32).astype(np.float16) for shape in shapes]
        self.training, self.held_out = list(range(count // 8, count)), list(range(count // 8))
        outputs = []
        for index in range(count):
            batch = self.batch([index])
            found = block.run(batch.tokens, batch.modulation)
            outputs.append([np.array(array.astype(mx.float16)) for array in found])
        self.arrays += [np.stack(part) for part in zip(*outputs, strict=True)]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    all_steps, holds_velocity = range(1), False

    def steps(self, indices: Sequence[int]) -> np.ndarray:
        """As stage 3W's Samples: all are of one step."""
        return np.zeros(len(indices), np.int64)

    def batch(self, indices: Sequence[int], key: mx.array | None = None) -> SampleBatch:
        """As stage 3W's Samples."""
        picked = (array[indices] for array in self.arrays)
        found = [mx.array(array.reshape(-1, *array.shape[2:])).astype(mx.float32) for array in picked]
        return SampleBatch(found[:2], found[2], found[3:])

    def keep(self, indices: Sequence[int]) -> None:
        """As stage 3W's Samples: all are in memory."""


def profile(training: Training) -> dict[str, float]:
    """Share of a rounding iteration that each part takes, each evaluated on its own."""
    unit, marks = training.unit, {}
    training.iteration = 0
    indices = np.array(unit.samples.training[: training.settings.batch_size])

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        mx.eval(found)
        marks[name] = time.perf_counter() - start
        return found

    timed("reading the batch", lambda: unit.samples.batch(indices))
    codes = unit.codes(training.state, hard=False)
    quantized = unit.quantized(training.state, codes, with_ranges=False)
    stand_in = quantized.substitution()
    timed("quantizing weights", lambda: stand_in.weights)
    batch = unit.samples.batch(indices)
    timed("forward", lambda: unit.loss_parts(stand_in, batch))
    gradients = timed("forward and backward", lambda: unit.gradients(quantized, indices, 0))[1]
    timed("rounding variables (Adam)", lambda: (training.round(gradients["weights"]), training.state)[1])
    others = sum(marks[name] for name in ("reading the batch", "quantizing weights", "forward"))
    marks["backward"] = max(0.0, marks.pop("forward and backward") - others)
    total = sum(marks.values())
    return {name: value / total for name, value in marks.items()}
