"""What decides the result of stage 3W, beside the cache."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

TUNE_SHARE = 0.3  # of the iterations: codes decided, scales, zero points, biases and ranges trained
INPUTS_FROM = 0.5  # share of the iterations after which inputs are quantized, too: not from the first one on
LR_SCALES = 1e-3
ITERS = 400
EVALUATED = 64  # samples that a loss is measured on
TOKEN, STATIC = "token", "static"  # rules of the inputs: dynamic per token; a learned range for each noise level


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
    activation_rule: str = STATIC
    block_inputs: str = "original"  # or "mixed": half of the elements as the quantized blocks before give them
    end_to_end: int = 0  # iterations of the last phase, all blocks' grids against the model's output
    layer_bits: Mapping[str, int] = field(default_factory=dict)  # of layers whose codes are not of weight_bits
    average_bits: float | None = None  # under which layer_bits were chosen, of bit_choices
    bit_choices: Sequence[int] = ()
    excluded: Sequence[str] = ()  # layers that stay as they are
    step_weights: Sequence[float] = ()  # of an error at each cached step; () for all the same

    @property
    def chunk(self) -> int:
        """Samples in memory at once."""
        return self.micro_batch or self.batch_size

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


DATA_DEVIATION = 0.15  # of the latents' directions, most of which are small


def weights_of_steps(schedule: Sequence[float], cached: Sequence[int]) -> list[float]:
    """What an error of the velocity at each cached step does to the finished latent, 1 on average; schedule: sigmas, num_steps + 1.

    An Euler step adds Δσ·e. The rest of the way shrinks it: along a direction in which the data have the standard deviation s,
    by s / √(s²·(1 − σ)² + σ²), the flow of a Gaussian. A cached step stands for the steps of the schedule that are nearest.
    Measured on sd3-emoji (W4 in two of 20 steps at a time): √ of the finished latent's error over the error that was made is
    0.11 at sigma 1, 0.17 at 0.67, 0.35 at 0.43, 0.62 at 0.25, and by this formula 0.15, 0.22, 0.34 and 0.54.
    """
    found = [0.0] * len(cached)
    for step, (sigma, after) in enumerate(pairwise(schedule)):
        kept = DATA_DEVIATION**2 / (DATA_DEVIATION**2 * (1 - after) ** 2 + after**2)
        nearest = min(range(len(cached)), key=lambda index: abs(cached[index] - step))
        found[nearest] += (sigma - after) ** 2 * kept
    return [weight * len(found) / sum(found) for weight in found]


def cosine(progress: float) -> float:
    """1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def spread_over(indices: Sequence[int], count: int) -> Sequence[int]:
    """At most `count` of the indices, the same at every call; drawn, so that no step of the schedule is passed over."""
    if len(indices) <= count:
        return indices
    chosen = np.random.default_rng(len(indices)).choice(len(indices), count, replace=False)
    return [indices[position] for position in np.sort(chosen)]
