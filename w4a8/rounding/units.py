"""What is trained together for its own output: one class a kind of unit, a block or the whole model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from w4a8.analysis.clipping_ranges import channel_clipping_range
from w4a8.backend.parallel import compiled, on_every_core, streams_for
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.backend.sums import summed
from w4a8.model.hooks import substituted_layers
from w4a8.model.layers import Layer, model_blocks, model_layers, run_final_layer
from w4a8.quantized.activation_rules import DynamicPerToken, Learned
from w4a8.quantized.arithmetic import grid_position, searched_grid
from w4a8.quantized.layer import QuantizedLayer, deployed_grid
from w4a8.rounding.methods import METHODS, Arrays
from w4a8.rounding.quantized_forward import QuantizedForward
from w4a8.rounding.settings import EVALUATED, STATIC_RULE, Settings
from w4a8.rounding.training_samples import SampleBatch, TrainingSamples, spread_over

STATE_KEYS = ("alpha", "scale", "zero_point", "bias", "range")
Gradients = dict[str, Arrays]  # of weights, biases and ranges
SMALLEST_RANGE, SMALLEST_ERROR = 1e-8, 1e-20


@dataclass(frozen=True)
class UnitSpec:
    """Layers that are trained together, and the stretch of blocks that they belong to."""

    name: str
    blocks: list[str]
    layers: list[str]


@dataclass(frozen=True)
class QuantizedUnit:
    """A point of a unit's training as a quantized model: its layers, and the rule for their inputs (None: as they are)."""

    layers: Mapping[str, QuantizedLayer]
    rule: Learned | DynamicPerToken | None = None

    @property
    def weights(self) -> Arrays:
        return {name: layer.weight for name, layer in self.layers.items()}

    @property
    def biases(self) -> Arrays:
        return {name: layer.deployed_bias for name, layer in self.layers.items() if layer.bias is not None}

    @property
    def ranges(self) -> Arrays:
        return self.rule.ranges if isinstance(self.rule, Learned) else {}


@dataclass(frozen=True)
class UnitGrids:
    """Where the training of a unit's layers starts from, found in the weights alone."""

    nearest: dict[str, QuantizedLayer]  # round-to-nearest on a min-max grid
    floor: Arrays  # (out, in) float32: the code below each weight on the searched grid
    start: dict[str, Arrays]  # α, scale and zero point by layer

    @classmethod
    def search(cls, weights: Arrays, settings: Settings) -> "UnitGrids":
        """Search a grid for each layer, on every core."""
        dense = {name: np.array(weight, np.float32) for name, weight in weights.items()}
        method, found = METHODS[settings.rounding](settings), cls({}, {}, {key: {} for key in STATE_KEYS})

        def grids(name: str) -> tuple[QuantizedLayer, np.ndarray, np.ndarray]:
            bits, group = settings.bits(name), settings.group_size
            grid = deployed_grid(*searched_grid(dense[name], bits, group))
            return QuantizedLayer.nearest(dense[name], bits, group), *grid

        for name, (nearest, scale, zero_point) in zip(dense, on_every_core(grids, dense), strict=True):
            position = grid_position(dense[name], scale, zero_point)
            found.nearest[name], found.floor[name] = nearest, mx.array(np.floor(position))
            found.start["alpha"][name] = method.first_alpha(position - np.floor(position))
            found.start["scale"][name], found.start["zero_point"][name] = mx.array(scale), mx.array(zero_point)
        return found


@dataclass(frozen=True)
class UnitMeasures:
    """What was measured with the unquantized unit, and with round-to-nearest, on training samples."""

    norms: list[float]  # mean squared error of each output with round-to-nearest, which losses are relative to
    shifts: Arrays  # (channels,) of post-GELU inputs
    ranges: Arrays  # clipping ranges to start from, by input


class Unit:
    """Layers, the loss of their output, and the pieces that their training starts from. Subclasses define the output.

    `build` makes a unit; the constructor stores.
    """

    def __init__(
        self, mmdit: nn.Module, spec: UnitSpec, samples: TrainingSamples, settings: Settings, ranks: SingleProcess,
        grids: UnitGrids, measures: UnitMeasures,
    ):  # fmt: skip
        """ranks: the processes that share the work on this unit."""
        self.mmdit, self.samples, self.settings, self.ranks = mmdit, samples, settings, ranks
        self.name, self.layers = spec.name, spec.layers
        self.method = METHODS[settings.rounding](settings)
        self._decided = compiled(lambda floor, alpha, top: mx.clip(floor + (alpha >= 0).astype(mx.float32), 0, top))
        self._undecided = compiled(lambda floor, alpha, top: mx.clip(floor + self.method.up(alpha), 0, top))
        self._blocks = [model_blocks(mmdit)[name] for name in spec.blocks]
        layers = model_layers(mmdit)
        linears: dict[str, Layer] = {name: layers[name] for name in self.layers}
        self.input_of = {name: layer.input_owner for name, layer in linears.items()}
        self.weights = {name: layer.weight for name, layer in linears.items()}
        self.biases: Arrays = {name: layer.bias for name, layer in linears.items() if layer.bias is not None}
        self.nearest, self._floor = grids.nearest, grids.floor
        self.norms, self.shifts = measures.norms, measures.shifts
        ranges = {name: mx.log(value) for name, value in measures.ranges.items()}
        self.start: dict[str, Arrays] = grids.start | {"bias": dict(self.biases), "range": ranges}

    @classmethod
    def build(
        cls, mmdit: nn.Module, spec: UnitSpec, samples: TrainingSamples, settings: Settings, ranks: SingleProcess = SINGLE_PROCESS
    ) -> "Unit":  # fmt: skip
        """Search the layers' grids, measure norms, shifts and ranges on training samples, and return the unit."""
        layers = model_layers(mmdit)
        grids = UnitGrids.search({name: layers[name].weight for name in spec.layers}, settings)
        bare = cls(mmdit, spec, samples, settings, ranks, grids, UnitMeasures([], {}, {}))
        chosen = spread_over(samples.training, EVALUATED)
        norms = [max(error, SMALLEST_ERROR) for error in bare.mean_squares(bare.nearest_state(), chosen)]
        return cls(mmdit, spec, samples, settings, ranks, grids, UnitMeasures(norms, *bare.measured_inputs(chosen)))

    @classmethod
    def specs(cls, layers: Mapping[str, Layer], blocks: Sequence[str]) -> list[UnitSpec]:
        """Return the units of a run, in order; here each block is one."""
        return [UnitSpec(block, [block], [name for name, one in layers.items() if one.block == block]) for block in blocks]

    # what the unit gives, quantized and not

    def run(self, batch: SampleBatch, stand_in: QuantizedForward) -> list[mx.array]:
        """The tokens that the last block gives for a batch, with substituted layers."""
        tokens = batch.tokens
        with substituted_layers(self.mmdit, stand_in.compute):
            for block in self._blocks:
                tokens = block.run(tokens, batch.modulation)
        stand_in.let_go()
        return tokens

    def outputs(self, batch: SampleBatch, stand_in: QuantizedForward) -> list[mx.array]:
        """What the loss is measured on: here the block's outputs."""
        return self.run(batch, stand_in)

    def targets(self, batch: SampleBatch) -> list[mx.array]:
        """What the unquantized unit gives: here what the cache holds."""
        return batch.outputs

    # the loss

    def square_parts(self, stand_in: QuantizedForward, batch: SampleBatch) -> list[mx.array]:
        """Mean squared error of each output, unevaluated."""
        targets, given = self.targets(batch), self.outputs(batch, stand_in)
        return [mx.mean(mx.square(a - b)) for a, b in zip(given, targets, strict=True)]

    def loss_parts(self, stand_in: QuantizedForward, batch: SampleBatch) -> list[mx.array]:
        """The same, relative to round-to-nearest."""
        return [square / norm for square, norm in zip(self.square_parts(stand_in, batch), self.norms, strict=True)]

    def mean_squares(self, state: QuantizedUnit, indices: Sequence[int]) -> list[float]:
        """Mean squared error of each output over these samples."""
        return self._over_batches(self.square_parts, state, indices)

    def loss(self, indices: Sequence[int], state: QuantizedUnit) -> float:
        """Mean over outputs of the error relative to round-to-nearest: 1 for that on the training samples."""
        errors = self._over_batches(self.loss_parts, state, indices)
        return sum(errors) / len(errors)

    def _over_batches(self, parts, state: QuantizedUnit, indices: Sequence[int]) -> list[float]:
        weights, biases, chunks = state.weights, state.biases, self.settings.micro_batches(indices)
        totals, ranks = None, self.ranks
        for start in range(0, len(chunks), ranks.size):
            chosen = chunks[min(start + ranks.rank, len(chunks) - 1)]  # a rank without one does the last again
            batch = self.samples.batch(chosen)
            quantize = (
                None if state.rule is None else state.rule.of_rows(step_rows(self.samples, chosen, batch.modulation))
            )
            found = parts(QuantizedForward(weights, biases, quantize), batch)
            mx.eval(found)
            for chunk, each in zip(chunks[start:], ranks.gathered(found, found), strict=False):
                share = len(chunk) / len(indices)
                totals = [a + share * b.item() for a, b in zip(totals or [0.0] * len(each), each, strict=True)]
        return totals

    def _loss_and_gradients(self, with_inputs: bool) -> Callable:
        """(weights, biases and ranges; batch; step of each row; key) -> loss and gradients."""

        def loss_of(parameters: Gradients, batch: SampleBatch, rows: mx.array, key: mx.array) -> mx.array:
            quantize = self.rule(parameters["ranges"]).of_rows(rows) if with_inputs else None
            stand_in = QuantizedForward(parameters["weights"], parameters["biases"], quantize, self.settings.qdrop, key)
            parts = self.loss_parts(stand_in, batch)
            return sum(parts) / len(parts)

        return mx.value_and_grad(loss_of)

    def gradients(
        self, state: QuantizedUnit, indices: np.ndarray, iteration: int, near: Sequence[int] = ()
    ) -> tuple[mx.array, Gradients]:
        """Loss and its gradients with respect to weights, biases and ranges; near: what the next iteration draws from.

        Of a micro-batch at a time, on a CPU one a core, and summed in their order: who works side by side changes nothing.
        """
        settings, loss_of = self.settings, self._loss_and_gradients(state.rule is not None)
        parameters = {"weights": state.weights, "biases": state.biases, "ranges": state.ranges}
        mx.eval(parameters)
        parts = settings.micro_batches(indices)

        def found_of(numbers: Sequence[int]) -> list[tuple[mx.array, Gradients]]:
            found = []
            for number, stream in zip(numbers, streams, strict=False):
                part = parts[number]
                key = mx.random.key(hash((settings.seed, iteration, number * settings.chunk)) % 2**32)
                with mx.stream(stream):
                    batch = self.samples.batch(part)
                    share = len(part) / len(indices)
                    given = loss_of(parameters, batch, step_rows(self.samples, part, batch.modulation), key)
                    found.append(tree_map(partial(mx.multiply, share), given))
            mx.async_eval(found)
            self.samples.keep(near)
            mx.eval(found)
            return found

        with streams_for(len(parts)) as streams:  # as many as there are parts: threads decide the last bits
            return summed(self.ranks, len(parts), len(streams), found_of, (mx.array(0.0), parameters))

    # what the unit looks like at a point of its training

    def nearest_state(self) -> QuantizedUnit:
        """Round-to-nearest on a min-max grid, biases and activations as they are."""
        layers = {name: layer.as_mlx() for name, layer in self.nearest.items()}
        own = self.biases
        return QuantizedUnit({n: QuantizedLayer(q.codes, q.scale, q.zero_point, own.get(n)) for n, q in layers.items()})

    def codes(self, state: dict[str, Arrays], hard: bool) -> Arrays:
        """Codes (out, in) float32; between two of the grid's while a method is undecided, unless `hard`."""
        up = self._decided if hard else self._undecided
        return {
            name: up(self._floor[name], alpha, mx.array(2.0 ** self.settings.bits(name) - 1))
            for name, alpha in state["alpha"].items()
        }

    def quantized(self, state: dict[str, Arrays], codes: Arrays, with_ranges: bool) -> QuantizedUnit:
        """The unit with these codes on the state's grids."""
        layers = {
            name: QuantizedLayer(code, state["scale"][name], state["zero_point"][name], state["bias"].get(name))
            for name, code in codes.items()
        }
        if not (with_ranges and self.settings.activation_bits):
            return QuantizedUnit(layers)
        return QuantizedUnit(layers, self.rule(self.ranges(state)))

    def ranges(self, state: dict[str, Arrays]) -> Arrays:
        """Of every layer's input: (), or (steps,) where they are learned for each noise level."""
        return {name: mx.exp(state["range"][self.input_of[name]]) for name in self.layers}

    def rule(self, ranges: Arrays) -> Learned | DynamicPerToken:
        """How inputs are quantized while they are."""
        return input_rule(self.settings, ranges, self.shifts)

    def measured_inputs(self, indices: Sequence[int]) -> tuple[Arrays, Arrays]:
        """Shifts of the post-GELU layers, (min + max) / 2 per channel, and for every input the ranges to start from.

        A range (), or with learned ranges one for each cached step, (steps,). It costs no more than the full one by the
        moments of x − shift over these samples, every token counted.
        """
        if not self.settings.activation_bits:
            return {}, {}
        steps = self.samples.steps(indices)
        groups = [indices]
        if self.settings.activation_rule == STATIC_RULE:  # of a step that none of these is of: what all say
            groups = [
                [i for i, at in zip(indices, steps, strict=True) if at == step] for step in self.samples.all_steps
            ]
        found = [self._input_moments(group or indices) for group in groups]
        layers, shifts, ranges = model_layers(self.mmdit), {}, {}
        for name in found[0]:
            low = np.min([moments[name][0] for moments in found], axis=0)
            high = np.max([moments[name][1] for moments in found], axis=0)
            shift = np.zeros_like(low)
            if layers[name].is_post_gelu:
                shift = (low + high) / 2
                shifts[name] = mx.array(shift.astype(np.float32))
            chosen = []
            for low, high, total, squares, tokens in (moments[name] for moments in found):
                reach = np.maximum(np.abs(low - shift), np.abs(high - shift))
                power = np.maximum(squares / tokens - 2 * shift * total / tokens + shift * shift, 0)
                best = channel_clipping_range(reach, power, 1, [self.settings.activation_bits])[0]
                chosen.append(max(best, SMALLEST_RANGE))
            ranges[name] = mx.array(np.float32(chosen if self.settings.activation_rule == STATIC_RULE else chosen[0]))
        return shifts, ranges

    def _input_moments(self, indices: Sequence[int]) -> dict[str, list[np.ndarray]]:
        """Minimum, maximum, sum and sum of squares per channel, and the number of tokens, of every input; float64."""
        seen_of: dict[str, list[mx.array]] = {}
        for seen in self.watch(list(dict.fromkeys(self.input_of.values())), indices):
            for name, x in seen.items():
                new = [x.min(axis=0), x.max(axis=0), x.sum(axis=0), mx.square(x).sum(axis=0), mx.array(float(len(x)))]
                old = seen_of.get(name)
                seen_of[name] = new if old is None else [
                    mx.minimum(old[0], new[0]), mx.maximum(old[1], new[1]), *map(mx.add, old[2:], new[2:])
                ]  # fmt: skip
            mx.eval(seen_of)
        return {name: [np.array(array, np.float64) for array in arrays] for name, arrays in seen_of.items()}

    def watch(self, names: Sequence[str], indices: Sequence[int]) -> Iterator[Arrays]:
        """The inputs (tokens, channels) of these layers in the unquantized unit, a few samples at a time."""
        size = min(8, self.settings.chunk)
        for begin in range(0, len(indices), size):
            watching = QuantizedForward({}, {}, watched=names)
            self.run(self.samples.batch(indices[begin : begin + size]), watching)
            yield watching.inputs


class BlockUnit(Unit):
    """A block for its outputs (BRECQ)."""


class ModelUnit(Unit):
    """Every block at once, for the velocity that the model gives."""

    @classmethod
    def specs(cls, layers: Mapping[str, Layer], blocks: Sequence[str]) -> list[UnitSpec]:
        return [UnitSpec(MODEL, list(blocks), list(layers))]

    def outputs(self, batch: SampleBatch, stand_in: QuantizedForward) -> list[mx.array]:
        return [run_final_layer(self.mmdit, self.run(batch, stand_in)[0], batch.modulation)]

    def targets(self, batch: SampleBatch) -> list[mx.array]:
        given = batch.outputs[0]
        return [given if self.samples.holds_velocity else run_final_layer(self.mmdit, given, batch.modulation)]






MODEL = "model"
UNITS: dict[str, type[Unit]] = {"block": BlockUnit, MODEL: ModelUnit}


def step_rows(samples: TrainingSamples, indices: Sequence[int], rows: mx.array) -> mx.array:
    """For each of the rows of these samples, which of the cached steps it is of."""
    return mx.array(np.repeat(samples.steps(indices), len(rows) // len(indices)))


def input_rule(settings: Settings, ranges: Arrays, shifts: Arrays) -> Learned | DynamicPerToken:
    """How inputs are quantized while a model is trained."""
    bits = settings.activation_bits
    return Learned(ranges, shifts, bits) if settings.activation_rule == STATIC_RULE else DynamicPerToken(bits)
