"""The whole quantized model: its loss, and the gradients of its grids, biases and ranges.

A small model is run in one piece. A large one takes the memory of one block: the tokens between the blocks are kept, each
block is run again where its gradients are made, and its weights are unpacked there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.names import block_of
from calibration_store.rounding_checkpoint import Layers
from w4a8.backend.parallel import on_every_core, streams_for
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.backend.sums import summed
from w4a8.model.layers import Block, half_dtype, model_blocks, model_layers, run_final_layer
from w4a8.quantized.layer import QuantizedLayer
from w4a8.rounding.methods import Arrays
from w4a8.rounding.quantized_forward import PRODUCT_DTYPES, QuantizedForward
from w4a8.rounding.rest import FINAL_LAYER, deployed_rest, placed, rest_places
from w4a8.rounding.settings import EVALUATED, STATIC_RULE, Indices, Settings
from w4a8.rounding.training import grid_slopes
from w4a8.rounding.training_samples import SampleBatch, TrainingSamples, spread_over
from w4a8.rounding.units import SMALLEST_ERROR, Gradients, input_rule, of_rows, step_rows

Head = Callable[[mx.array, Arrays], mx.array]  # (the last block's image tokens, the final layer's rest) -> a loss


@dataclass(frozen=True)
class Passes:
    """Micro-batches on their way through the blocks, side by side: their modulation inputs, steps and QDrop's keys."""

    modulations: Sequence[mx.array]
    rows: Sequence[mx.array | None]  # cached step of each row; None where inputs stay as they are
    streams: Sequence[mx.Stream]
    key_of: Callable[[int, Block], mx.array | None]  # (micro-batch, block) -> key; None: nothing is dropped

    @property
    def ways(self) -> list[tuple[int, mx.Stream]]:
        """The index and the stream of every micro-batch."""
        return list(zip(range(len(self.modulations)), self.streams, strict=False))


class WholeModel:
    """The quantized model whose grids are trained: the arrays of its layers' files, and the loss of its output.

    `build` makes one; the constructor stores.
    """

    name = "end to end"

    def __init__(
        self, mmdit: nn.Module, blocks: Sequence[str], samples: TrainingSamples, settings: Settings, layers: Layers,
        ranks: SingleProcess = SINGLE_PROCESS, at_once: bool = False, norm: float = 1.0,
        opened: Callable[[], nn.Module] | None = None,
    ):  # fmt: skip
        """Store the model, and take the start of the training from the layers' arrays.

        layers: arrays of all blocks' files before this phase; ranks: the processes that share the work; at_once: gradients
        are made in one piece; norm: mean squared error of the output with round-to-nearest, which `build` measures; opened:
        gives the model anew, so that weights that are rounded to nearest do not stay in memory.
        """
        self.at_once, self._opened = at_once, opened
        self.mmdit, self.samples, self.settings, self.ranks, self.norm = mmdit, samples, settings, ranks, norm
        self.layers = list(layers)
        found = model_layers(mmdit)
        self.input_of = {name: found[name].input_owner for name in layers}
        self._blocks = [model_blocks(mmdit)[name] for name in blocks]
        self._of_block = {block: [name for name in layers if block_of(name) == block] for block in blocks}
        self._codes = {name: mx.array(fields["q"]) for name, fields in layers.items()}
        self._half = half_dtype(mmdit)
        self.places = rest_places(mmdit, settings.rest)
        self._shifts = {name: mx.array(fields["act_shift"]) for name, fields in layers.items() if "act_shift" in fields}
        of_input = {self.input_of[name]: fields for name, fields in reversed(layers.items())}
        ranges = {name: f.get("act_scales", f.get("act_scale")) for name, f in of_input.items()}
        self.start: dict[str, Arrays] = {
            "scale": {name: mx.array(fields["scale"]) for name, fields in layers.items()},
            "zero_point": {name: mx.array(fields["zero_point"]) for name, fields in layers.items()},
            "bias": {name: mx.array(fields["bias"]) for name, fields in layers.items() if "bias" in fields},
            "range": {name: mx.log(mx.array(value)) for name, value in ranges.items() if value is not None},
            "rest": {
                path: place.owner[place.key].astype(mx.float32)
                for places in self.places.values()
                for path, place in places.items()
            },
        }

    @classmethod
    def build(
        cls, mmdit: nn.Module, blocks: Sequence[str], samples: TrainingSamples, settings: Settings, layers: Layers,
        ranks: SingleProcess = SINGLE_PROCESS, at_once: bool = False, opened: Callable[[], nn.Module] | None = None,
    ) -> "WholeModel":  # fmt: skip
        """Measure the norm on training samples, and return the model with it."""
        whole = cls(mmdit, blocks, samples, settings, layers, ranks, at_once, opened=opened)
        whole.norm = max(whole.loss(spread_over(samples.training, EVALUATED), None), SMALLEST_ERROR)
        return whole

    def loss(self, indices: Indices, state: Mapping[str, Arrays] | None, with_inputs: bool = False) -> float:
        """Return the mean squared error of the output over these samples, relative to the norm.

        state: a point of the training, None for round-to-nearest; with_inputs: inputs are quantized, too.
        """
        return self._mean_square(indices, state, with_inputs) / self.norm

    def slopes(self, state: Mapping[str, Arrays], indices: np.ndarray, iteration: int) -> tuple[mx.array, Gradients]:
        """Return the loss, and its slopes along the parameters that `Training.move_grids` moves and along the ranges.

        Micro-batches are added in their order, so that the sum does not depend on who computes them.
        """
        parts = self.settings.micro_batches(indices)
        moved = {key: state[key] for key in ("scale", "zero_point", "bias", "rest")}
        ranges = self.learned_ranges(state)
        with streams_for(len(parts)) as streams:
            return summed(
                self.ranks,
                len(parts),
                len(streams),
                lambda numbers: self._of_parts(state, [parts[i] for i in numbers], streams, len(indices), iteration),
                (mx.array(0.0), moved | {"ranges": ranges}),
            )

    # a block at a point of the training

    def _nearest_parameters(self, block: str, mmdit: nn.Module) -> dict[str, Arrays]:
        """Return what `_block_parameters` returns, with weights rounded to nearest and inputs as they are.

        mmdit: holds the weights; those of a model that was opened for it are dropped.
        """
        names, layers = self._of_block[block], model_layers(mmdit)
        bits, group = self.settings.bits, self.settings.group_size
        dense = {name: np.array(layers[name].weight) for name in names}
        biases = {name: bias for name in names if (bias := layers[name].bias) is not None}
        if mmdit is not self.mmdit:
            for name in names:
                layers[name].module["weight"] = mx.zeros((0, 0))
        found = on_every_core(lambda name: QuantizedLayer.nearest(dense[name], bits(name), group), names)
        nearest = {name: layer.as_mlx().weight for name, layer in zip(names, found, strict=True)}
        return {"weights": nearest, "biases": biases, "ranges": {}, "rest": {}}

    def _source(self, state: Mapping[str, Arrays] | None) -> nn.Module:
        """Return the model that weights are rounded to nearest from, where no state is given."""
        return self._opened() if state is None and self._opened is not None else self.mmdit

    def _parameters(self, block: str, state: Mapping[str, Arrays] | None, source: nn.Module) -> dict[str, Arrays]:
        """Return a block's parameters at a state; without one weights are rounded to nearest, and inputs stay as they are."""
        return self._nearest_parameters(block, source) if state is None else self._block_parameters(block, state)

    def _block_parameters(self, block: str, state: Mapping[str, Arrays]) -> dict[str, Arrays]:
        """Return dense weights, biases and ranges of a block's layers, and the block's rest by path, by kind."""
        names = self._of_block[block]
        codes = {name: self._codes[name].astype(mx.float32) for name in names}
        quantized = {
            name: QuantizedLayer(code, state["scale"][name], state["zero_point"][name], state["bias"].get(name))
            for name, code in codes.items()
        }
        return {
            "weights": {name: layer.weight for name, layer in quantized.items()},
            "biases": {name: layer.deployed_bias for name, layer in quantized.items() if layer.bias is not None},
            "ranges": self._ranges(state, names),
            "rest": self.rest_of(block, state),
        }

    def stored_rest(self, state: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        """Return the rest as rest.npz holds it, by path: float16 values, or bfloat16's where the model has these."""
        found = state["rest"]  # in an order that depends on the number of processes
        return {path: np.array(found[path].astype(self._half).astype(mx.float16)) for path in self.start["rest"]}

    def rest_of(self, owner: str, state: Mapping[str, Arrays] | None) -> Arrays:
        """Return the rest of a block, or of the final layer, as it is deployed, by path; none where it is not trained."""
        if state is None:
            return {}
        bits = self.settings.rest_bits
        return {path: deployed_rest(path, state["rest"][path], self._half, bits) for path in self.places[owner]}

    def learned_ranges(self, state: Mapping[str, Arrays]) -> Arrays:
        """Return the ranges of all inputs where they are learned, by layer; else none."""
        return self._ranges(state, self.layers) if self.settings.activation_rule == STATIC_RULE else {}

    def _ranges(self, state: Mapping[str, Arrays], names: Sequence[str]) -> Arrays:
        """Return the ranges of these layers' inputs, () or (steps,); none where no ranges are trained."""
        return {name: mx.exp(state["range"][self.input_of[name]]) for name in names if state["range"]}

    def _run(
        self, block: Block, parameters: dict[str, Arrays], tokens: Sequence[mx.array], modulation: mx.array,
        rows: mx.array | None, key: mx.array | None,
    ) -> list[mx.array]:  # fmt: skip
        """Return the tokens that a block gives.

        rows: the cached step of each row, None where inputs stay as they are; key: of QDrop, None where nothing is
        dropped.
        """
        quantize = None
        if rows is not None:
            quantize = of_rows(input_rule(self.settings, parameters["ranges"], self._shifts), self.settings, rows)
        drop, products = 0.0 if key is None else self.settings.qdrop, PRODUCT_DTYPES[self.settings.precision]
        weights, biases = parameters["weights"], parameters["biases"]
        forward = QuantizedForward(weights, biases, quantize, drop, key, products=products)
        installed = forward.installed(self.mmdit, [block], self._of_block[block.name])
        with installed, placed(self.places[block.name], parameters["rest"]):
            return block.run(tokens, modulation)

    def _square(self, tokens: mx.array, rest: Arrays, batch: SampleBatch) -> mx.array:
        """Return the mean squared error of the output of these image tokens.

        rest: of the final layer, by path; batch holds the target.
        """
        target = batch.outputs[0]
        if not self.samples.holds_velocity:
            target = run_final_layer(self.mmdit, target, batch.modulation)
        with placed(self.places[FINAL_LAYER], rest):
            output = run_final_layer(self.mmdit, tokens, batch.modulation)
        return mx.mean(mx.square(output - target))

    def _mean_square(self, indices: Indices, state: Mapping[str, Arrays] | None, with_inputs: bool) -> float:
        """Return the mean squared error of the output over these samples.

        All samples pass one block before the next, so that each block is unpacked once.
        """
        every = self.settings.micro_batches(indices)
        parts = [every[number] for number in self.ranks.owned_indices(len(every))]
        batches = [self.samples.batch(part) for part in parts]
        tokens, modulations = [batch.tokens for batch in batches], [batch.modulation for batch in batches]
        del batches  # their outputs are large
        mx.eval(tokens, modulations)
        source, working = self._source(state), list[mx.array]()
        for block in self._blocks:
            parameters = self._parameters(block.name, state, source)
            mx.eval(parameters)
            for index, part in enumerate(parts):
                rows = step_rows(self.samples, part, modulations[index]) if with_inputs else None
                tokens[index] = self._run(block, parameters, tokens[index], modulations[index], rows, None)
                mx.eval(working)  # the micro-batch before
                working = tokens[index]
                mx.async_eval(working)
        rest = self.rest_of(FINAL_LAYER, state)
        squares = [self._square(tokens[at][0], rest, self.samples.batch(part)) for at, part in enumerate(parts)]
        own = mx.array([float(one) for one in squares] + [0.0] * (-(-len(every) // self.ranks.size) - len(parts)))
        gathered = mx.stack(self.ranks.gathered(own, own), axis=1).reshape(-1)  # in the order of the micro-batches
        found: list[float] = np.array(gathered).tolist()
        return sum(square * len(part) for square, part in zip(found, every, strict=False)) / len(indices)

    # gradients, a block at a time

    def _of_parts(
        self,
        state: Mapping[str, Arrays],
        parts: Sequence[Indices],
        streams: Sequence[mx.Stream],
        count: int,
        iteration: int,
    ) -> list[tuple[mx.array, Gradients]]:
        """Return (loss, slopes) of each of some micro-batches, which are run side by side.

        Each micro-batch gives its share of the means over `count` samples.
        """
        settings = self.settings
        batches = [self.samples.batch(part) for part in parts]
        rows: list[mx.array | None] = [None] * len(parts)
        if settings.activation_bits:
            rows = [step_rows(self.samples, part, batch.modulation) for part, batch in zip(parts, batches, strict=True)]

        def key_of(index: int, block: Block) -> mx.array:
            return mx.random.key(hash((settings.seed, iteration, int(parts[index][0]), block.index)) % 2**32)

        passes = Passes([batch.modulation for batch in batches], rows, streams, key_of)
        shares = [len(part) / count / self.norm for part in parts]
        heads = [partial(self._share, share, batch) for share, batch in zip(shares, batches, strict=True)]
        losses, _, totals = self.gradients(state, [batch.tokens for batch in batches], passes, heads)
        return list(zip(losses, totals, strict=True))

    def _share(self, share: float, batch: SampleBatch, tokens: mx.array, rest: Arrays) -> mx.array:
        return share * self._square(tokens, rest, batch)

    def gradients(
        self, state: Mapping[str, Arrays], tokens: list[list[mx.array]], passes: Passes, heads: Sequence[Head]
    ) -> tuple[list[mx.array], list[list[mx.array]], list[Gradients]]:
        """Return by micro-batch: the value of its head, and its slopes along the first block's inputs and the parameters.

        tokens: the first block's inputs by micro-batch.
        """
        rest = self.rest_of(FINAL_LAYER, state)
        mx.eval(rest)
        if self.at_once:
            return self._gradients_at_once(state, tokens, passes, heads, rest)
        kept = self.forward(state, tokens, passes)
        values: list[mx.array] = []
        slopes_of: list[list[mx.array]] = []
        totals: list[Gradients] = []
        for index, stream in passes.ways:
            with mx.stream(stream):
                value, (slope, of_rest) = mx.value_and_grad(heads[index], argnums=(0, 1))(kept[index].pop()[0], rest)
                values.append(value)
                slopes_of.append([slope])
                totals.append({"rest": of_rest})
        mx.eval(values, slopes_of, totals)
        self._backward(state, kept, slopes_of, totals, passes)
        return values, slopes_of, totals

    def _gradients_at_once(
        self, state: Mapping[str, Arrays], tokens: list[list[mx.array]], passes: Passes, heads: Sequence[Head], rest: Arrays
    ) -> tuple[list[mx.array], list[list[mx.array]], list[Gradients]]:  # fmt: skip
        """Return what `gradients` returns, from one graph of all blocks, which keeps what every block computes."""
        parameters = {block.name: self._block_parameters(block.name, state) for block in self._blocks}
        mx.eval(parameters)

        def value_of(
            index: int, parameters: dict[str, dict[str, Arrays]], rest: Arrays, tokens: list[mx.array]
        ) -> mx.array:
            modulation, rows = passes.modulations[index], passes.rows[index]
            for block in self._blocks:
                key = passes.key_of(index, block)
                tokens = self._run(block, parameters[block.name], tokens, modulation, rows, key)
            return heads[index](tokens[0], rest)

        values, slopes_of, totals = list[mx.array](), list[list[mx.array]](), list[Gradients]()
        for index, stream in passes.ways:
            with mx.stream(stream):
                taken = mx.value_and_grad(partial(value_of, index), argnums=(0, 1, 2))
                value, (of_blocks, of_rest, slopes) = taken(parameters, rest, tokens[index])
                total: Gradients = {"rest": of_rest}
                for block, given in of_blocks.items():
                    total = merged(total, self._reduced(block, state, given))
                values.append(value)
                slopes_of.append(slopes)
                totals.append(total)
        mx.eval(values, slopes_of, totals)
        return values, slopes_of, totals

    def forward(
        self, state: Mapping[str, Arrays] | None, tokens: list[list[mx.array]], passes: Passes, keep: bool = True
    ) -> list[list[list[mx.array]]]:
        """Run micro-batches through all blocks, and return the inputs of every block and the last outputs of each.

        tokens: the first block's inputs by micro-batch. keep: without it the last outputs alone are returned. A block is
        described while the device computes the one before, and begins at that one's end, which frees its memory.
        """
        kept, source = [[each] for each in tokens], self._source(state)
        working: list[list[mx.array]] = []
        for block in self._blocks:
            parameters = self._parameters(block.name, state, source)
            for index, stream in passes.ways:
                with mx.stream(stream):
                    modulation, rows, key = passes.modulations[index], passes.rows[index], passes.key_of(index, block)
                    kept[index].append(self._run(block, parameters, kept[index][-1], modulation, rows, key))
                    if not keep:
                        del kept[index][0]
            mx.eval(working)
            working = [each[-1] for each in kept]
            mx.async_eval(parameters, working)
        mx.eval(working)
        return kept

    def _backward(
        self, state: Mapping[str, Arrays], kept: list[list[list[mx.array]]], slopes_of: list[list[mx.array]],
        totals: list[Gradients], passes: Passes,
    ) -> None:  # fmt: skip
        """Take slopes from the last block back to the first one, and put the slopes of the parameters into totals.

        kept: every block's inputs by micro-batch, which are used up. slopes_of: d loss / d tokens that the last block
        gives, by micro-batch; afterwards those of the first block's inputs. Blocks follow each other as in `forward`.
        """
        working: list[Any] = []
        for block in reversed(self._blocks):
            parameters = self._block_parameters(block.name, state)
            for index, stream in passes.ways:
                with mx.stream(stream):
                    modulation, rows, key = passes.modulations[index], passes.rows[index], passes.key_of(index, block)
                    run = partial(self._weighted, block, modulation, rows, key, slopes_of[index])
                    given, slopes_of[index] = mx.grad(run, argnums=(0, 1))(parameters, kept[index].pop())
                    totals[index] = merged(totals[index], self._reduced(block.name, state, given))
            mx.eval(working)
            working = [list(slopes_of), list(totals)]
            mx.async_eval(parameters, working)
        mx.eval(working)

    def _weighted(
        self, block: Block, modulation: mx.array, rows: mx.array | None, key: mx.array | None, slopes: Sequence[mx.array],
        parameters: dict[str, Arrays], tokens: list[mx.array],
    ) -> mx.array:  # fmt: skip
        """Return Σ tokens·slope of the block's tokens: its gradients are those of the loss."""
        given = self._run(block, parameters, tokens, modulation, rows, key)
        products = (one * mx.stop_gradient(slope) for one, slope in zip(given, slopes, strict=False))
        return sum((product.sum() for product in products), mx.array(0.0))

    def _reduced(self, block: str, state: Mapping[str, Arrays], gradients: dict[str, Arrays]) -> Gradients:
        """Turn a block's dense gradients into the slopes that `Training.move_grids` and `move_ranges` take."""
        codes = {name: self._codes[name].astype(mx.float32) for name in self._of_block[block]}
        found = grid_slopes(codes, state["scale"], state["zero_point"], gradients["weights"])
        ranges = gradients["ranges"] if self.settings.activation_rule == STATIC_RULE else {}
        return found | {"bias": gradients["biases"], "ranges": ranges, "rest": gradients["rest"]}


def merged(totals: Gradients, found: Gradients) -> Gradients:
    """Add another block's layers to each kind of slopes."""
    return {kind: totals.get(kind, {}) | layers for kind, layers in found.items()}
