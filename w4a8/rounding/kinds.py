"""The kinds of units: layer, sublayer, block and whole model."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.names import layer_role
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.model.layers import Layer, run_final_layer
from w4a8.rounding.quantized_forward import QuantizedForward
from w4a8.rounding.settings import Settings
from w4a8.rounding.training_samples import SampleBatch, TrainingSamples
from w4a8.rounding.units import Arrays, Gradients, Job, QuantizedUnit, Unit, UnitSpec


class BlockUnit(Unit):
    """A block for its outputs (BRECQ)."""


class ModelUnit(Unit):
    """Every block at once, for the velocity that the model gives."""

    @classmethod
    def jobs(cls, layers: Mapping[str, Layer], blocks: Sequence[str]) -> list[Job]:
        return [Job("model", list(blocks), [UnitSpec("model", list(layers))])]

    def outputs(self, batch: SampleBatch, stand_in: QuantizedForward) -> list[mx.array]:
        return [run_final_layer(self.mmdit, self.run(batch, stand_in)[0], batch.modulation)]

    def targets(self, batch: SampleBatch) -> list[mx.array]:
        given = batch.outputs[0]
        return [given if self.samples.holds_velocity else run_final_layer(self.mmdit, given, batch.modulation)]


class SublayerUnit(Unit):
    """TaQ-DiT: attention and MLP of a block apart, each for the outputs of its last layers."""

    last_roles: ClassVar[tuple[str, ...]] = ("attn.o_proj", "mlp.fc2")

    @classmethod
    def parts(cls, block: str, layers: Mapping[str, Layer], names: list[str]) -> list[UnitSpec]:
        return [
            UnitSpec(f"{block} {what}", [name for name in names if layers[name].role.startswith(f"{module}.")])
            for what, module in (("attention", "attn"), ("MLP", "mlp"))
        ]

    @property
    def last_layers(self) -> list[str]:
        return [name for name in self.layers if layer_role(name) in self.last_roles]

    def outputs(self, batch: SampleBatch, stand_in: QuantizedForward) -> list[mx.array]:
        stand_in.keep(self.last_layers)
        self.run(batch, stand_in)
        return [stand_in.outputs.pop(name) for name in self.last_layers]

    def targets(self, batch: SampleBatch) -> list[mx.array]:
        return self.outputs(batch, QuantizedForward({}, {}))


class LayerUnit(Unit):
    """Layers of a block that are each trained for their own output: ‖(Ŵ − W)·X‖² = tr(E·XXᵀ·Eᵀ) needs only XXᵀ."""

    def __init__(
        self, mmdit: nn.Module, job: Job, part: UnitSpec, samples: TrainingSamples, settings: Settings, ranks: SingleProcess = SINGLE_PROCESS
    ):
        self._grams: dict[tuple[int, ...], Arrays] = {}
        super().__init__(mmdit, job, part, samples, settings, ranks)

    def mean_squares(self, state: QuantizedUnit, indices: Sequence[int]) -> list[float]:
        return [square.item() for square in self.gram_squares(state.weights, self.grams(indices))]

    def loss(self, indices: Sequence[int], state: QuantizedUnit) -> float:
        squares = self.gram_squares(state.weights, self.grams(indices))
        errors = [(square / norm).item() for square, norm in zip(squares, self.norms, strict=True)]
        return sum(errors) / len(errors)

    def loss_with_ranges(self, indices: Sequence[int], state: QuantizedUnit) -> float | None:
        """Not known: the Gram matrix is that of the unquantized inputs, and ranges keep their first value."""
        return None

    def gram_squares(self, weights: Arrays, grams: Arrays) -> list[mx.array]:
        """Squared output error of each layer, unevaluated."""
        errors = [weights[name] - self.weights[name] for name in self.layers]
        return [(e * (e @ grams[self.input_of[name]])).sum() for name, e in zip(self.layers, errors, strict=True)]

    def grams(self, indices: Sequence[int]) -> Arrays:
        """XXᵀ per input, (channels, channels), divided by the number of samples."""
        key = tuple(indices)
        if key not in self._grams:
            totals: Arrays = {}
            for seen in self.watch(list(dict.fromkeys(self.input_of.values())), indices):
                totals = {name: totals.get(name, 0) + x.T @ x / len(indices) for name, x in seen.items()}
                mx.eval(totals)
            self._grams[key] = totals
        return self._grams[key]

    def gradients(
        self, state: QuantizedUnit, indices: np.ndarray, iteration: int, near: Sequence[int] = ()
    ) -> tuple[mx.array, Gradients]:
        """Over all training samples; biases and ranges are left alone."""
        grams, quantized = self.grams(self.samples.training), state.weights
        squares = self.gram_squares(quantized, grams)
        loss = sum(square / norm for square, norm in zip(squares, self.norms, strict=True)) / len(self.layers)
        weights = {}
        for name, norm in zip(self.layers, self.norms, strict=True):
            error = quantized[name] - self.weights[name]
            weights[name] = 2 * (error @ grams[self.input_of[name]]) / norm / len(self.layers)
        return loss, {
            "weights": weights,
            "biases": {name: bias * 0 for name, bias in state.biases.items()},
            "ranges": {name: value * 0 for name, value in state.ranges.items()},
        }


MODEL = "model"
UNITS: dict[str, type[Unit]] = {"block": BlockUnit, "sublayer": SublayerUnit, "layer": LayerUnit, MODEL: ModelUnit}
