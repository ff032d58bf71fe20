"""The training of one unit: rounding variables with scales, zero points and biases; then, with the codes decided, the latter.

Input ranges are trained from the middle of the iterations on.
"""

import math
from typing import Any

from w4a8.rounding.methods import Arrays
from w4a8.rounding.settings import EVALUATED, LR_SCALES, cosine
from w4a8.rounding.training import NotFiniteError, Training, grid_slopes
from w4a8.rounding.training_samples import spread_over
from w4a8.rounding.units import QuantizedUnit, Unit


class UnitTraining(Training):
    """The training of a `Unit`."""

    unit: Unit

    @property
    def iters(self) -> int:
        """The number of iterations."""
        return self.settings.iters

    @property
    def rounding_iters(self) -> int:
        """The number of iterations that move the rounding; the later ones tune scales, zero points and biases."""
        return self.settings.rounding_iters

    @property
    def inputs_from(self) -> int:
        """The first iteration whose inputs are quantized."""
        return self.settings.inputs_from

    def first_fixed(self) -> Arrays:
        """Return the arrays that the rounding method keeps beside α, at the start."""
        return self.unit.method.begin(self.state["alpha"])

    def changed_share(self) -> float:
        """Return the share of the weights whose α has changed its sign since the start, 0 to 1."""
        start = self.unit.start["alpha"]
        changed = [int(((alpha >= 0) != (start[name] >= 0)).sum()) for name, alpha in self.state["alpha"].items()]
        return sum(changed) / sum(alpha.size for alpha in start.values())

    def step(self) -> float:
        """Take one iteration as Training.step says."""
        unit, settings = self.unit, self.settings
        tuning = self.iteration >= self.rounding_iters
        codes = unit.codes(self.state, hard=tuning)
        quantized = unit.quantized(self.state, codes, with_ranges=self.iteration >= settings.inputs_from)
        following = min(self.iteration + 1, self.iters - 1)
        near = self.near(following) if settings.window else self.drawn(following)
        loss, gradients = unit.gradients(quantized, self.drawn(self.iteration), self.iteration, near)
        self._note(loss, gradients)
        slopes = grid_slopes(codes, self.state["scale"], self.state["zero_point"], gradients["weights"])
        done, whole = self.iteration, self.rounding_iters
        if tuning:
            done, whole = done - whole, max(1, self.iters - whole)
        else:
            self.round(gradients["weights"])
        self.move_grids(slopes | {"bias": gradients["biases"]}, LR_SCALES * cosine(done / whole))
        if gradients["ranges"]:
            self.move_ranges(gradients["ranges"])
        return self._finished(loss)

    def round(self, weight_gradients: Arrays) -> None:
        """Move the rounding variables; weight_gradients are d loss / dŴ (out, in) by layer."""
        settings, alphas, method = self.settings, self.state["alpha"], self.unit.method
        progress = self.iteration / self.rounding_iters
        count = sum(alpha.size for alpha in alphas.values())
        gradients = {}
        for name, alpha in alphas.items():
            scale = self.state["scale"][name]
            slope = (weight_gradients[name].reshape(*scale.shape, -1) * scale[..., None]).reshape(alpha.shape)
            gradients[name] = method.gradient(alpha, slope, self.fixed.get(name), progress, count)
        optimizer = self.optimizers["alpha"]
        optimizer.learning_rate = settings.lr_alpha * cosine(progress)
        moved = optimizer.apply_gradients(gradients, alphas)
        self.state["alpha"], self.fixed = method.settle(alphas, moved, self.fixed, progress, self.iteration)

    def measure(self) -> dict[str, Any]:
        """Return the losses of a finished training on held-out samples, and its last loss on training samples, too.

        All are relative to round-to-nearest on training samples. Raises NotFiniteError where one is not finite.
        """
        unit, state = self.unit, self.state
        held_out, chosen = (spread_over(ids, EVALUATED) for ids in (unit.samples.held_out, unit.samples.training))
        codes = unit.codes(state, hard=True)
        final = unit.quantized(state, codes, with_ranges=False)
        first = unit.quantized(unit.start, unit.codes(unit.start, hard=True), with_ranges=False)
        hardened = unit.quantized({**unit.start, "alpha": state["alpha"]}, codes, with_ranges=False)
        points = {"nearest": unit.nearest_state(), "start": first, "hardened": hardened, "end": final}
        if unit.settings.activation_bits:
            points["end_activations"] = QuantizedUnit(final.layers, unit.rule(unit.ranges(state)))
        losses: dict[str, float | None] = dict(zip(points, unit.losses(held_out, list(points.values())), strict=True))
        losses["end_activations"] = losses.get("end_activations")  # None where inputs stay as they are
        losses["end_training"] = unit.losses(chosen, [final])[0]
        for name, value in losses.items():
            if value is not None and not math.isfinite(value):
                raise NotFiniteError(f"the held-out loss {name!r} is not finite after iteration {self.iteration}")
        return losses
