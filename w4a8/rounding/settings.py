"""What decides the result of stage 3W, beside the cache."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

TUNE_SHARE = 0.3  # of the iterations: codes decided, scales, zero points, biases and ranges trained
INPUTS_FROM = 0.5  # share of the iterations after which inputs are quantized, too: not from the first one on
LR_SCALES = 1e-3
ITERS = 400
EVALUATED = 64  # samples that a loss is measured on
TOKEN_RULE, STATIC_RULE = "token", "static"  # rules of the inputs: dynamic per token; a learned range for each noise level


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
    window: int = 0  # samples that an iteration draws from, a window that moves over them all; 0: all of them
    activation_rule: str = STATIC_RULE
    block_inputs: str = "original"  # or "mixed": half of the elements as the quantized blocks before give them
    end_to_end: int = 0  # iterations of the last phase, all blocks' grids against the model's output
    layer_bits: Mapping[str, int] = field(default_factory=dict)  # of layers whose codes are not of weight_bits
    average_bits: float | None = None  # under which layer_bits were chosen, of bit_choices
    bit_choices: Sequence[int] = ()
    excluded: Sequence[str] = ()  # layers that stay as they are

    @property
    def chunk(self) -> int:
        """Samples in memory at once."""
        return self.micro_batch or self.batch_size

    def micro_batches(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """Samples in the order in which their gradients are added, so many at once."""
        return [indices[start : start + self.chunk] for start in range(0, len(indices), self.chunk)]

    @property
    def rounding_iters(self) -> int:
        return round(self.iters * (1 - TUNE_SHARE))

    @property
    def inputs_from(self) -> int:
        """The first iteration whose inputs are quantized; `iters` where they never are."""
        return round(self.iters * INPUTS_FROM) if self.activation_bits else self.iters

    def bits(self, layer: str) -> int:
        """Of a layer's codes."""
        return self.layer_bits.get(layer, self.weight_bits)


def cosine(progress: float) -> float:
    """1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def spread_over(indices: Sequence[int], count: int) -> Sequence[int]:
    """At most `count` of the indices, the same at every call; drawn, so that no step of the schedule is passed over."""
    if len(indices) <= count:
        return indices
    chosen = np.random.default_rng(len(indices)).choice(len(indices), count, replace=False)
    return [indices[position] for position in np.sort(chosen)]
