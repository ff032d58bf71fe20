"""Methods of learning a rounding, one class each. Each weight has a rounding variable α and rounds up where α >= 0."""

from abc import ABC, abstractmethod

import mlx.core as mx
import numpy as np

from w4a8.quantized.differentiable import (
    rectified_sigmoid,
    rectified_sigmoid_gradient,
    rectified_sigmoid_inverse,
    rounding_regularizer_gradient,
)
from w4a8.rounding.settings import Settings

Arrays = dict[str, mx.array]  # by layer
WARM_UP, BETA_START, BETA_END = 0.2, 20, 2  # AdaRound's regularizer, as shares of the rounding iterations
DECIDE_FROM, DECIDED_AT, DECIDE_EVERY = 0.4, 0.98, 10  # the most decided variables are fixed on the way, all at the end


class RoundingMethod(ABC):
    """A method: the start of α, the codes that α stands for while it moves, and how it moves.

    An object keeps no state of a training.
    """

    def __init__(self, settings: Settings):
        self.settings = settings

    @abstractmethod
    def first_alpha(self, fraction: np.ndarray) -> mx.array:
        """Return the α of the unrounded weight; fraction, (out, in), is its distance above the lower code, 0 to 1."""

    def begin(self, alphas: Arrays) -> Arrays:
        """Return the arrays beside α, by layer, that the training follows from; here none."""
        return {}

    @abstractmethod
    def up(self, alpha: mx.array) -> mx.array:
        """Return how far each weight is rounded up, 0 to 1, while α moves; once decided, every method uses α >= 0."""

    @abstractmethod
    def gradient(
        self, alpha: mx.array, slope: mx.array, fixed: mx.array | None, progress: float, count: int
    ) -> mx.array:
        """Return d loss / dα from slope, d loss / d code; all are (out, in).

        fixed: the layer's array from `begin`; progress: the share of the rounding iterations that are done; count: the
        number of rounding variables in all layers.
        """

    @abstractmethod
    def settle(
        self, before: Arrays, moved: Arrays, fixed: Arrays, progress: float, iteration: int
    ) -> tuple[Arrays, Arrays]:
        """Return (α, the arrays that `begin` gave) after the optimizer has moved α from `before` to `moved`."""


class StraightThrough(RoundingMethod):
    """Hard codes from the start; gradients pass the rounding as if it were not there."""

    def first_alpha(self, fraction: np.ndarray) -> mx.array:
        """Return fraction − ½, so that the start is round-to-nearest."""
        return mx.array(fraction) - 0.5

    def up(self, alpha: mx.array) -> mx.array:
        """Return 1 where α >= 0, else 0."""
        return (alpha >= 0).astype(mx.float32)

    def gradient(
        self, alpha: mx.array, slope: mx.array, fixed: mx.array | None, progress: float, count: int
    ) -> mx.array:
        """Return the slope itself."""
        return slope

    def settle(
        self, before: Arrays, moved: Arrays, fixed: Arrays, progress: float, iteration: int
    ) -> tuple[Arrays, Arrays]:
        """Clip α to −½ … ½."""
        return {name: mx.clip(alpha, -0.5, 0.5) for name, alpha in moved.items()}, fixed


class Sigmoid(RoundingMethod):
    """AdaRound's rectified sigmoid h(α), pulled to 0 or 1 by a regularizer, and hardened (Nagel et al. 2020)."""

    def first_alpha(self, fraction: np.ndarray) -> mx.array:
        """Return the α whose h(α) is the fraction, so that the start is the unrounded weight."""
        return rectified_sigmoid_inverse(mx.clip(mx.array(fraction), 1e-4, 1 - 1e-4))

    def begin(self, alphas: Arrays) -> Arrays:
        """Return flags that are 1 where a variable is decided; at the start none is."""
        return {name: alpha * 0 for name, alpha in alphas.items()}

    def up(self, alpha: mx.array) -> mx.array:
        """Return h(α)."""
        return rectified_sigmoid(alpha)

    def gradient(
        self, alpha: mx.array, slope: mx.array, fixed: mx.array | None, progress: float, count: int
    ) -> mx.array:
        """Return (slope + regularizer's slope after a warm-up)·h'(α), and 0 for decided variables."""
        assert fixed is not None  # `begin` gives flags to every layer
        if progress > WARM_UP:
            beta = BETA_START + (BETA_END - BETA_START) * max(0.0, (progress - WARM_UP) / (1 - WARM_UP))
            pull = rounding_regularizer_gradient(rectified_sigmoid(alpha), beta)
            slope = slope + self.settings.regularizer_weight / count * pull
        return mx.where(fixed > 0, 0, slope * rectified_sigmoid_gradient(alpha))

    def settle(
        self, before: Arrays, moved: Arrays, fixed: Arrays, progress: float, iteration: int
    ) -> tuple[Arrays, Arrays]:
        """Keep decided variables where they are; every tenth iteration of the later ones, decide more of them."""
        moved = {name: mx.where(fixed[name] > 0, before[name], alpha) for name, alpha in moved.items()}
        if progress > DECIDE_FROM and iteration % DECIDE_EVERY == 0:
            return self._decide(moved, fixed, (progress - DECIDE_FROM) / (DECIDED_AT - DECIDE_FROM))
        return moved, fixed

    def _decide(self, alphas: Arrays, fixed: Arrays, share: float) -> tuple[Arrays, Arrays]:
        """Fix the most decided share of each layer's sigmoids at 0 or 1 and go on with the others."""
        decided, now_fixed = {}, {}
        for name, alpha in alphas.items():
            distance = mx.where(fixed[name] > 0, 1.0, mx.abs(rectified_sigmoid(alpha) - 0.5))
            position = max(0, int((1 - share) * (distance.size - 1)))
            now_fixed[name] = (distance >= mx.sort(distance.reshape(-1))[position]).astype(mx.float32)
            decided[name] = mx.where(now_fixed[name] > 0, mx.where(alpha >= 0, 10.0, -10.0), alpha)
        return decided, now_fixed


METHODS: dict[str, type[RoundingMethod]] = {"ste": StraightThrough, "sigmoid": Sigmoid}
