"""The settings that decide the result of stage 3W, beside the cache of samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibration_store.choices import PRODUCT_PRECISIONS, ProductPrecision, RestKind
from w4a8.effort import Effort
from w4a8.options import RoundingOptions

TUNE_SHARE = 0.3  # last share of the iterations: codes are decided; scales, zero points, biases and ranges are trained
INPUTS_FROM = 0.5  # share of the iterations after which inputs are quantized, too: not from the first one on
LR_SCALES = 1e-3
LR_LAST_SCALES = 3e-4  # of the last phase, where all grids move at once
LR_UNROLLED_SCALES, LR_UNROLLED_REST = 2e-4, 1e-3  # against finished latents
WARM_UP_SHARE = 0.1  # of the last phase, in which its learning rates rise
LR_REST = (
    3e-3  # relative to the size of each parameter of the 16-bit rest, at these inputs of a matrix and blocks of a model
)
REST_INPUTS, REST_BLOCKS = 192, 8
BLOWN, SLOWER = 2.0, 0.25  # the last phase begins anew, slower, where its loss reaches so many times that of its start
SLOWEST = 0.01  # the pace from which on it goes on as it is
# Learning rates of the rounding variables, by rounding method: the rate at LR_ITERS iterations, and the largest one. Few
# iterations must move them as far as many do.
DEFAULT_LR_ALPHA = {"ste": (4e-3, 8e-3), "sigmoid": (1e-2, 1e-2)}
LR_ITERS = 1000
EVALUATED = 64  # samples that a loss is measured on
FLOAT32, BFLOAT16 = PRODUCT_PRECISIONS
# Rules for the inputs: dynamic per token, or a learned range for each noise level.
TOKEN_RULE, BLOCK_RULE, STATIC_RULE = "token", "block", "static"

Indices = Sequence[int] | np.ndarray  # indices of cached samples


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that decide the result of a run beside the cache, as plan.json notes them.

    Defaults are those of the options, where these have any.
    """

    iters: int = 400
    batch_size: int = 16
    weight_bits: int = RoundingOptions.weight_bits
    activation_bits: int = RoundingOptions.activation_bits  # 0: inputs stay as they are
    group_size: int = RoundingOptions.group_size
    rounding: str = RoundingOptions.rounding  # a name of methods.METHODS
    qdrop: float = RoundingOptions.qdrop  # share of input elements left unquantized while ranges are trained
    lr_alpha: float = DEFAULT_LR_ALPHA["ste"][0]
    lr_activation_scale: float = RoundingOptions.lr_activation_scale
    regularizer_weight: float = 0.01  # weight of sigmoid's pull to 0 or 1; round-to-nearest has a loss of 1
    seed: int = RoundingOptions.seed
    micro_batch: int = 0  # samples whose gradients are made at once; 0: the whole batch
    window: int = 0  # samples that an iteration draws from, a window that moves over them all; 0: all of them
    activation_rule: str = RoundingOptions.activation_rule
    block_inputs: str = "original"  # inputs that blocks are trained on; noted because 0.8.0 also had "mixed"
    end_to_end: int = 0  # iterations of the last phase, all blocks' grids against the model's output
    unrolled: int = 0  # more iterations of it, against finished latents
    rest: RestKind = "none"  # the 16-bit parameters that the last phase trains, too: all, vectors or none
    rest_bits: int = RoundingOptions.rest_bits  # of adaLN's matrices in the export that is trained for
    precision: ProductPrecision = "float32"  # of products and attention; losses, sums and master values are float32
    migrate: bool = RoundingOptions.migrate  # wide input channels are migrated into the weights before they are rounded
    layer_bits: Mapping[str, int] = field(default_factory=dict)  # layers whose codes have other bits than weight_bits
    average_bits: float | None = None  # budget under which layer_bits were chosen out of bit_choices
    bit_choices: Sequence[int] = ()
    excluded: Sequence[str] = ()  # layers that stay as they are

    @classmethod
    def of(cls, options: RoundingOptions, effort: Effort, before: Mapping[str, Any] | None = None) -> "Settings":
        """Return the settings that these options give; the model, memory and single layers' bits decide the rest.

        effort: iterations, and samples of each; before: the plan that --resume goes on with.
        """
        rate = default_lr_alpha(options.rounding, effort.iters) if before is None else before["lr_alpha"]
        rate = rate if options.lr_alpha is None else options.lr_alpha
        return cls(
            iters=effort.iters,
            batch_size=effort.batch_size,
            weight_bits=options.weight_bits,
            activation_bits=options.activation_bits,
            group_size=options.group_size,
            rounding=options.rounding,
            qdrop=options.qdrop,
            lr_alpha=rate,
            lr_activation_scale=options.lr_activation_scale,
            seed=options.seed,
            activation_rule=options.activation_rule,
            rest_bits=options.rest_bits,
            unrolled=effort.unrolled,
            migrate=options.migrate,
        )

    @property
    def chunk(self) -> int:
        """The number of samples in memory at once."""
        return self.micro_batch or self.batch_size

    def micro_batches(self, indices: Indices) -> list[Indices]:
        """Cut the samples into micro-batches of at most `chunk`, in the order in which their gradients are added."""
        return [indices[start : start + self.chunk] for start in range(0, len(indices), self.chunk)]

    @property
    def rounding_iters(self) -> int:
        """The number of iterations that move the rounding variables; the later ones tune grids and ranges."""
        return round(self.iters * (1 - TUNE_SHARE))

    @property
    def inputs_from(self) -> int:
        """The first iteration whose inputs are quantized; `iters` where they never are."""
        return round(self.iters * INPUTS_FROM) if self.activation_bits else self.iters

    def bits(self, layer: str) -> int:
        """Return the number of bits of a layer's codes."""
        return self.layer_bits.get(layer, self.weight_bits)


def default_lr_alpha(rounding: str, iters: int) -> float:
    """Return the learning rate of the rounding variables of a method, for a number of iterations: it falls with its root."""
    rate, largest = DEFAULT_LR_ALPHA[rounding]
    return min(largest, float(f"{rate * math.sqrt(LR_ITERS / iters):.2g}"))


def warmed_cosine(iteration: int, iterations: int) -> float:
    """Return `cosine`, times a rise from 0 to 1 over the first tenth of the iterations."""
    return min(1.0, (iteration + 1) / max(1.0, WARM_UP_SHARE * iterations)) * cosine(iteration / iterations)


def cosine(progress: float) -> float:
    """Return ½·(1 + cos(π·progress)): 1 at the start of a schedule, 0 from its end (progress 1) on."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
