"""Units: layers that are trained together for their own output. One class a kind: a block, or the whole model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from calibration_store.errors import StoreError
from w4a8.analysis.clipping_ranges import channel_clipping_range
from w4a8.backend.parallel import compiled, streams_for
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.backend.sums import summed
from w4a8.model.layers import Layer, half_dtype, model_blocks, model_layers, run_final_layer
from w4a8.quantized.activation_rules import Learned, Quantize
from w4a8.quantized.dynamic_rules import Dynamic, DynamicPerBlock, DynamicPerToken
from w4a8.quantized.layer import QuantizedLayer
from w4a8.rounding.methods import METHODS, Arrays
from w4a8.rounding.quantized_forward import OVERFLOW, PRODUCT_DTYPES, QuantizedForward, original_forward
from w4a8.rounding.settings import BLOCK_RULE, EVALUATED, FLOAT32, STATIC_RULE, Indices, Settings
from w4a8.rounding.training_samples import SampleBatch, TrainingSamples, spread_over
from w4a8.rounding.unit_grids import UnitGrids

Gradients = dict[str, Arrays]  # by kind: weights, biases and ranges
LossParts = Callable[[QuantizedForward, SampleBatch], list[mx.array]]  # an error of each output
SMALLEST_RANGE, SMALLEST_ERROR = 1e-8, 1e-20


@dataclass(frozen=True)
class UnitSpec:
    """Layers that are trained together, and the stretch of blocks that they belong to."""

    name: str
    blocks: list[str]
    layers: list[str]


@dataclass(frozen=True)
class QuantizedUnit:
    """A point of a unit's training as a quantized model: its layers, and the rule for their inputs.

    Without a rule inputs stay as they are.
    """

    layers: Mapping[str, QuantizedLayer]
    rule: Learned | Dynamic | None = None

    @property
    def weights(self) -> Arrays:
        """The dense weights Ŵ (out, in) float32 by layer."""
        return {name: layer.weight for name, layer in self.layers.items()}

    @property
    def biases(self) -> Arrays:
        """The biases (out,) of the layers that have one, as they are deployed."""
        return {name: layer.deployed_bias for name, layer in self.layers.items() if layer.bias is not None}

    @property
    def ranges(self) -> Arrays:
        """The learned ranges by layer, () or (steps,); none where the rule has none."""
        return dict(self.rule.ranges) if isinstance(self.rule, Learned) else {}


@dataclass(frozen=True)
class UnitMeasures:
    """Measurements of the unquantized unit, and of round-to-nearest, on training samples."""

    norms: list[float]  # mean squared error of each output with round-to-nearest, which losses are relative to
    shifts: Arrays  # (channels,) by post-GELU layer
    ranges: Arrays  # clipping ranges to start from, () or (steps,), by input


class Unit:
    """Layers, the loss of their output, and the state that their training starts from.

    A subclass defines the output. `build` makes a unit; the constructor stores.
    """

    def __init__(
        self, mmdit: nn.Module, spec: UnitSpec, samples: TrainingSamples, settings: Settings, ranks: SingleProcess,
        grids: UnitGrids, measures: UnitMeasures,
    ):  # fmt: skip
        """Store the layers' weights and biases, and the start of their training.

        ranks: the processes that share the work on this unit.
        """
        self.mmdit, self.samples, self.settings, self.ranks = mmdit, samples, settings, ranks
        self.name, self.layers = spec.name, spec.layers
        self._products = PRODUCT_DTYPES[settings.precision]
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
        cls, mmdit: nn.Module, spec: UnitSpec, samples: TrainingSamples, settings: Settings,
        ranks: SingleProcess = SINGLE_PROCESS,
    ) -> "Unit":  # fmt: skip
        """Search the layers' grids, measure norms, shifts and ranges on training samples, and return the unit.

        Grids are searched in the weights alone; the rest is measured with a first unit that has grids and nothing else.
        """
        layers = model_layers(mmdit)
        grids = UnitGrids.search({name: layers[name].weight for name in spec.layers}, settings)
        bare = cls(mmdit, spec, samples, settings, ranks, grids, UnitMeasures([], {}, {}))
        chosen = spread_over(samples.training, EVALUATED)
        norms = [max(error, SMALLEST_ERROR) for error in bare.mean_squares(bare.nearest_state(), chosen)]
        if settings.precision != FLOAT32 and not all(map(math.isfinite, norms)):
            raise StoreError(f"{spec.name}: {OVERFLOW}")
        return cls(mmdit, spec, samples, settings, ranks, grids, UnitMeasures(norms, *bare.measured_inputs(chosen)))

    @classmethod
    def specs(cls, layers: Mapping[str, Layer], blocks: Sequence[str]) -> list[UnitSpec]:
        """Return the units of a run, in order; here each block is one."""
        names = {block: [name for name, one in layers.items() if one.block == block] for block in blocks}
        return [UnitSpec(block, [block], names[block]) for block in blocks]

    # the unit's output, quantized and not

    def run(self, batch: SampleBatch, forward: QuantizedForward) -> list[mx.array]:
        """Return the tokens that the last block gives for a batch, with substituted layers."""
        tokens = batch.tokens
        with forward.installed(self.mmdit, self._blocks):
            for block in self._blocks:
                tokens = block.run(tokens, batch.modulation)
        return tokens

    def outputs(self, batch: SampleBatch, forward: QuantizedForward) -> list[mx.array]:
        """Return the arrays that the loss is measured on: here the last block's tokens."""
        return self.run(batch, forward)

    def targets(self, batch: SampleBatch) -> list[mx.array]:
        """Return the unquantized unit's `outputs`: here as the samples have them, or else computed in the model's 16 bits."""
        if batch.outputs:
            return batch.outputs
        given = self.run(batch, original_forward(self._blocks, half_dtype(self.mmdit)))
        return [mx.stop_gradient(tokens.astype(mx.float32)) for tokens in given]

    # the loss

    def square_parts(self, forward: QuantizedForward, batch: SampleBatch) -> list[mx.array]:
        """Return the mean squared error of each output, unevaluated."""
        targets, given = self.targets(batch), self.outputs(batch, forward)
        return [mx.mean(mx.square(a - b)) for a, b in zip(given, targets, strict=True)]

    def loss_parts(self, forward: QuantizedForward, batch: SampleBatch) -> list[mx.array]:
        """Return the mean squared error of each output relative to round-to-nearest's, unevaluated."""
        return [square / norm for square, norm in zip(self.square_parts(forward, batch), self.norms, strict=True)]

    def mean_squares(self, state: QuantizedUnit, indices: Indices) -> list[float]:
        """Return the mean squared error of each output over these samples."""
        return self._over_batches(self.square_parts, [state], indices)[0]

    def losses(self, indices: Indices, states: Sequence[QuantizedUnit]) -> list[float]:
        """Return for each state the mean over outputs of the error over these samples.

        Errors are relative to round-to-nearest's, which is 1 on training samples.
        """
        return [sum(errors) / len(errors) for errors in self._over_batches(self.loss_parts, states, indices)]

    def _over_batches(self, parts: LossParts, states: Sequence[QuantizedUnit], indices: Indices) -> list[list[float]]:
        """Return for each state the mean of each of `parts` over these samples; processes share the micro-batches."""
        weights_of = {id(state.layers): state.weights for state in states}
        dense = [(weights_of[id(state.layers)], state.biases, state.rule) for state in states]
        mx.eval(weights_of)
        ranks, chunks = self.ranks, self.settings.micro_batches(indices)
        totals: list[list[float]] = [[] for _ in states]
        for start in range(0, len(chunks), ranks.size):
            last = len(chunks) - 1  # a rank without a chunk does the last one again
            chosen, following = (chunks[min(at + ranks.rank, last)] for at in (start, start + ranks.size))
            self.samples.keep(list(dict.fromkeys([*chosen, *following])))
            batch = self.samples.batch(chosen)
            if not batch.outputs:
                batch = batch._replace(outputs=self.targets(batch))
                mx.eval(batch.outputs)
            rows = step_rows(self.samples, chosen, batch.modulation)
            found = []
            for weights, biases, rule in dense:
                quantize = None if rule is None else of_rows(rule, self.settings, rows)
                forward = QuantizedForward(weights, biases, quantize, products=self._products)
                found.append(mx.stack(parts(forward, batch)))
                mx.eval(found[-1])
            for chunk, each in zip(chunks[start:], ranks.gathered(found, found), strict=False):
                share = len(chunk) / len(indices)
                for at, errors in enumerate(np.array(mx.stack(each)).tolist()):
                    totals[at] = [a + share * b for a, b in zip(totals[at] or [0.0] * len(errors), errors, strict=True)]
        return totals

    def _loss_and_gradients(self, with_inputs: bool) -> Callable:
        """Return a function (weights, biases and ranges; batch; step of each row; key) -> loss and gradients."""

        def loss_of(parameters: Gradients, batch: SampleBatch, rows: mx.array, key: mx.array) -> mx.array:
            quantize = of_rows(self.rule(parameters["ranges"]), self.settings, rows) if with_inputs else None
            weights, biases = parameters["weights"], parameters["biases"]
            forward = QuantizedForward(weights, biases, quantize, self.settings.qdrop, key, products=self._products)
            parts = self.loss_parts(forward, batch)
            return sum(parts, mx.array(0.0)) / len(parts)

        return mx.value_and_grad(loss_of)

    def gradients(
        self, state: QuantizedUnit, indices: Indices, iteration: int, near: Indices = ()
    ) -> tuple[mx.array, Gradients]:
        """Return the loss and its gradients with respect to weights, biases and ranges.

        near: the samples that the next iteration draws from. Gradients are made a micro-batch at a time, on a CPU one a
        core, and added in the order of the micro-batches, so that the result does not depend on what runs side by side.
        """
        settings, loss_of = self.settings, self._loss_and_gradients(state.rule is not None)
        parameters = {"weights": state.weights, "biases": state.biases, "ranges": state.ranges}
        mx.async_eval(parameters)
        parts = settings.micro_batches(indices)
        own = self.ranks.owned_indices(len(parts))

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
            left = [number for number in own if number > max(numbers, default=-1)]
            later = [index for number in left for index in parts[number]]  # of this iteration
            bringing = self.samples.keep([*later, *near])
            # Three cases need to wait here. Threads that bring samples need Python's lock. The next part needs the memory
            # of this one. Parts side by side on a CPU must end before BLAS gets all its threads back.
            wait = bringing or left or len(streams) > 1
            (mx.eval if wait else mx.async_eval)(found)
            return found

        with streams_for(len(parts)) as streams:  # a stream for each part, since threads decide the last bits
            return summed(self.ranks, len(parts), len(streams), found_of, (mx.array(0.0), parameters))

    # the unit at a point of its training

    def nearest_state(self) -> QuantizedUnit:
        """Return the unit rounded to nearest on min-max grids, with biases and activations as they are."""
        layers = {name: layer.as_mlx() for name, layer in self.nearest.items()}
        own = self.biases
        return QuantizedUnit({n: QuantizedLayer(q.codes, q.scale, q.zero_point, own.get(n)) for n, q in layers.items()})

    def codes(self, state: dict[str, Arrays], hard: bool) -> Arrays:
        """Return the codes (out, in) float32; between two integers while a method is undecided, unless `hard`."""
        up = self._decided if hard else self._undecided
        return {
            name: up(self._floor[name], alpha, mx.array(2.0 ** self.settings.bits(name) - 1))
            for name, alpha in state["alpha"].items()
        }

    def quantized(self, state: dict[str, Arrays], codes: Arrays, with_ranges: bool) -> QuantizedUnit:
        """Return the unit with these codes on the state's grids; with_ranges: its inputs are quantized, too."""
        layers = {
            name: QuantizedLayer(code, state["scale"][name], state["zero_point"][name], state["bias"].get(name))
            for name, code in codes.items()
        }
        if not (with_ranges and self.settings.activation_bits):
            return QuantizedUnit(layers)
        return QuantizedUnit(layers, self.rule(self.ranges(state)))

    def ranges(self, state: dict[str, Arrays]) -> Arrays:
        """Return the range of every layer's input: (), or (steps,) where ranges are learned for each noise level."""
        return {name: mx.exp(state["range"][self.input_of[name]]) for name in self.layers}

    def rule(self, ranges: Arrays) -> Learned | Dynamic:
        """Return the rule by which inputs are quantized."""
        return input_rule(self.settings, ranges, self.shifts)

    def measured_inputs(self, indices: Sequence[int]) -> tuple[Arrays, Arrays]:
        """Return the shifts of the post-GELU layers, and the ranges to start from of every input.

        A shift is (min + max) / 2 per channel, (channels,). A range is (), or where ranges are learned (steps,), one
        for each cached step. By the moments of x − shift over these samples, every token counted, a range costs no more
        than the full one.
        """
        if not self.settings.activation_bits:
            return {}, {}
        steps = self.samples.steps(indices)
        groups = [indices]
        if self.settings.activation_rule == STATIC_RULE:
            groups = [
                [i for i, at in zip(indices, steps, strict=True) if at == step] for step in self.samples.all_steps
            ]
        found = [self._input_moments(group or indices) for group in groups]  # a step without samples: all samples'
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
            by_step = self.settings.activation_rule == STATIC_RULE
            ranges[name] = mx.array(np.array(chosen if by_step else chosen[0], np.float32))
        return shifts, ranges

    def _input_moments(self, indices: Sequence[int]) -> dict[str, list[np.ndarray]]:
        """Return minimum, maximum, sum and sum of squares per channel, and the number of tokens, by input; float64."""
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
        """Yield the inputs (tokens, channels) of these layers in the unquantized unit, a few samples at a time."""
        size = min(8, self.settings.chunk)
        for begin in range(0, len(indices), size):
            watching = original_forward(self._blocks, self._products, names)
            self.run(self.samples.batch(indices[begin : begin + size]), watching)
            yield watching.inputs


class BlockUnit(Unit):
    """A block, trained for its outputs (BRECQ, Li et al. 2021)."""


class ModelUnit(Unit):
    """Every block at once, trained for the velocity that the model gives."""

    @classmethod
    def specs(cls, layers: Mapping[str, Layer], blocks: Sequence[str]) -> list[UnitSpec]:
        """Return the one unit of a run."""
        return [UnitSpec(MODEL, list(blocks), list(layers))]

    def outputs(self, batch: SampleBatch, forward: QuantizedForward) -> list[mx.array]:
        """Return the velocity, a patch a token."""
        return [run_final_layer(self.mmdit, self.run(batch, forward)[0], batch.modulation)]

    def targets(self, batch: SampleBatch) -> list[mx.array]:
        """Return the unquantized model's velocity; it is made from the last block's tokens where those are cached."""
        given = batch.outputs[0]
        return [given if self.samples.holds_velocity else run_final_layer(self.mmdit, given, batch.modulation)]


MODEL = "model"
UNITS: dict[str, type[Unit]] = {"block": BlockUnit, MODEL: ModelUnit}


def step_rows(samples: TrainingSamples, indices: Indices, rows: mx.array) -> mx.array:
    """Return the cached step of each of the rows of these samples, as a position in key_timesteps: (rows,)."""
    return mx.array(np.repeat(samples.steps(indices), len(rows) // len(indices)))


def of_rows(rule: Learned | Dynamic, settings: Settings, rows: mx.array) -> Quantize | DynamicPerToken:
    """Return the rule's function for rows of these cached steps, or the rule itself where one kernel applies it."""
    if settings.precision != FLOAT32 and isinstance(rule, DynamicPerToken):
        return rule
    return rule.of_rows(rows)


def input_rule(settings: Settings, ranges: Arrays, shifts: Arrays) -> Learned | Dynamic:
    """Return the rule by which inputs are quantized while a model is trained."""
    bits = settings.activation_bits
    if settings.activation_rule == STATIC_RULE:
        return Learned(ranges, shifts, bits)
    return DynamicPerBlock(bits) if settings.activation_rule == BLOCK_RULE else DynamicPerToken(bits)
