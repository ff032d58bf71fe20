"""What decides the result of stage 3W, beside the cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

TUNE_SHARE = 0.3  # of the iterations: codes decided, scales, zero points, biases and ranges trained
LR_SCALES = 1e-3
ITERS = 400
EVALUATED = 64  # samples that a loss is measured on


@dataclass(frozen=True)
class Settings:
    """The options of a run, and its shares of iterations."""

    iters: int
    batch_size: int
    weight_bits: int
    activation_bits: int  # 0: inputs stay as they are
    group_size: int
    rounding: str  # a name of methods.METHODS
    qdrop: float
    lr_alpha: float
    lr_activation_scale: float
    regularizer_weight: float
    seed: int
    micro_batch: int = 0  # samples whose gradients are made at once; 0: the whole batch

    @property
    def chunk(self) -> int:
        """Samples in memory at once."""
        return self.micro_batch or self.batch_size

    @property
    def rounding_iters(self) -> int:
        return round(self.iters * (1 - TUNE_SHARE))


def cosine(progress: float) -> float:
    """1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def spread_over(indices: Sequence[int], count: int) -> Sequence[int]:
    """At most `count` of the indices, evenly."""
    return indices[:: -(-len(indices) // count)]
