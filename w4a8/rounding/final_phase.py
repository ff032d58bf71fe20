"""The last phase: scales, zero points, biases and ranges of all blocks together against the model's output; codes stay.

As EfficientQAT's second phase (Chen et al. 2024). In the memory of one block: the tokens between the blocks are kept, each
block is run again where its gradients are made, and its weights are unpacked there.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.block_cache import block_keys, boundary_shapes
from calibration_store.names import block_of
from calibration_store.rounding_checkpoint import Layers
from calibration_store.weights import read_quantized_block, write_losses, write_quantized_block
from w4a8.backend.parallel import on_every_core, streams_for, working_cores
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.backend.sums import summed
from w4a8.model.hooks import substituted_layers
from w4a8.model.layers import model_blocks, model_layers, run_final_layer
from w4a8.quantized.layer import QuantizedLayer, deployed_grid
from w4a8.rounding.iteration_bytes import IterationBytes
from w4a8.rounding.jobs import Job
from w4a8.rounding.quantized_forward import QuantizedForward
from w4a8.rounding.run import RoundingRun, num_weights
from w4a8.rounding.settings import EVALUATED, STATIC_RULE, Settings
from w4a8.rounding.training import NotFiniteError, Training, grid_slopes
from w4a8.rounding.training_samples import SampleBatch, Samples, TrainingSamples, spread_over
from w4a8.rounding.unit_phase import UnitPhase
from w4a8.rounding.units import SMALLEST_ERROR, Arrays, Gradients, UnitSpec, input_rule, step_rows

KEPT_BEFORE = ("scale", "zero_point", "bias", "act_scale", "act_scales")  # as {field}_before: where the phase began


class WholeModel:
    """The quantized model whose grids are trained: its layers' files, and its output for the samples."""

    name = "end to end"

    def __init__(
        self, mmdit: nn.Module, blocks: Sequence[str], samples: TrainingSamples, settings: Settings, layers: Layers,
        ranks: SingleProcess = SINGLE_PROCESS, norm: float = 1.0,
    ):  # fmt: skip
        """layers: arrays of all blocks' files before this phase; ranks: the processes that share the work.

        norm: mean squared error of the output with round-to-nearest; `build` measures it.
        """
        self.mmdit, self.samples, self.settings, self.ranks, self.norm = mmdit, samples, settings, ranks, norm
        self.layers = list(layers)
        found = model_layers(mmdit)
        self.input_of = {name: found[name].input_owner for name in layers}
        self._blocks = [model_blocks(mmdit)[name] for name in blocks]
        self._of_block = {block: [name for name in layers if block_of(name) == block] for block in blocks}
        self._codes = {name: mx.array(fields["q"]) for name, fields in layers.items()}
        self._shifts = {name: mx.array(fields["act_shift"]) for name, fields in layers.items() if "act_shift" in fields}
        of_input = {self.input_of[name]: fields for name, fields in reversed(layers.items())}
        ranges = {name: f.get("act_scales", f.get("act_scale")) for name, f in of_input.items()}
        self.start: dict[str, Arrays] = {
            "scale": {name: mx.array(fields["scale"]) for name, fields in layers.items()},
            "zero_point": {name: mx.array(fields["zero_point"]) for name, fields in layers.items()},
            "bias": {name: mx.array(fields["bias"]) for name, fields in layers.items() if "bias" in fields},
            "range": {name: mx.log(mx.array(value)) for name, value in ranges.items() if value is not None},
        }

    @classmethod
    def build(
        cls, mmdit: nn.Module, blocks: Sequence[str], samples: TrainingSamples, settings: Settings, layers: Layers,
        ranks: SingleProcess = SINGLE_PROCESS,
    ) -> "WholeModel":  # fmt: skip
        """Return the model, with its norm measured on training samples."""
        whole = cls(mmdit, blocks, samples, settings, layers, ranks)
        whole.norm = max(whole.loss(spread_over(samples.training, EVALUATED), None), SMALLEST_ERROR)
        return whole

    def loss(self, indices: Sequence[int], state: Mapping[str, Arrays] | None, with_inputs: bool = False) -> float:
        """Mean squared error of the output relative to round-to-nearest's (state None) on the training samples."""
        return self._mean_square(indices, state, with_inputs) / self.norm

    def slopes(self, state: Mapping[str, Arrays], indices: np.ndarray, iteration: int) -> tuple[mx.array, Gradients]:
        """Loss and its slopes along what `Training.move_grids` moves, and along the ranges; micro-batches in their order."""
        parts = self.settings.micro_batches(indices)
        moved = {key: state[key] for key in ("scale", "zero_point", "bias")}
        ranges = self._ranges(state, self.layers) if self.settings.activation_rule == STATIC_RULE else {}
        with streams_for(len(parts)) as streams:
            return summed(
                self.ranks,
                len(parts),
                len(streams),
                lambda numbers: self._of_parts(state, [parts[i] for i in numbers], streams, len(indices), iteration),
                (mx.array(0.0), moved | {"ranges": ranges}),
            )

    # what a block is at a point of the training

    def _block_parameters(self, block: str, state: Mapping[str, Arrays] | None) -> dict[str, Arrays]:
        """Dense weights, biases and ranges of a block's layers; state None: rounded to nearest, inputs as they are."""
        names, layers = self._of_block[block], model_layers(self.mmdit)
        if state is None:
            bits, group = self.settings.bits, self.settings.group_size
            dense = {name: np.array(layers[name].weight) for name in names}
            found = on_every_core(lambda name: QuantizedLayer.nearest(dense[name], bits(name), group), names)
            nearest = {name: layer.as_mlx() for name, layer in zip(names, found, strict=True)}
            biases = {name: layers[name].bias for name in names if layers[name].bias is not None}
            return {"weights": {name: layer.weight for name, layer in nearest.items()}, "biases": biases, "ranges": {}}
        quantized = {
            name: QuantizedLayer(
                self._codes[name].astype(mx.float32), state["scale"][name], state["zero_point"][name], state["bias"].get(name)
            )
            for name in names
        }  # fmt: skip
        return {
            "weights": {name: layer.weight for name, layer in quantized.items()},
            "biases": {name: layer.deployed_bias for name, layer in quantized.items() if layer.bias is not None},
            "ranges": self._ranges(state, names),
        }

    def _ranges(self, state: Mapping[str, Arrays], names: Sequence[str]) -> Arrays:
        return {name: mx.exp(state["range"][self.input_of[name]]) for name in names if state["range"]}

    def _run(
        self, block: Any, parameters: dict[str, Arrays], tokens: Sequence[mx.array], modulation: mx.array,
        rows: mx.array | None, key: mx.array | None,
    ) -> list[mx.array]:  # fmt: skip
        """A block's tokens. rows: which cached step each row is of, None: inputs as they are; key: of QDrop, None: no drop."""
        quantize = None
        if rows is not None:
            quantize = input_rule(self.settings, parameters["ranges"], self._shifts).of_rows(rows)
        drop = 0.0 if key is None else self.settings.qdrop
        stand_in = QuantizedForward(parameters["weights"], parameters["biases"], quantize, drop, key)
        with substituted_layers(self.mmdit, stand_in.compute, self._of_block[block.name]):
            given = block.run(tokens, modulation)
        stand_in.let_go()
        return given

    def _square(self, tokens: mx.array, batch: SampleBatch) -> mx.array:
        """Mean squared error of the output; batch: as TrainingSamples.batch."""
        target = batch.outputs[0]
        if not self.samples.holds_velocity:
            target = run_final_layer(self.mmdit, target, batch.modulation)
        return mx.mean(mx.square(run_final_layer(self.mmdit, tokens, batch.modulation) - target))

    def _mean_square(self, indices: Sequence[int], state: Mapping[str, Arrays] | None, with_inputs: bool) -> float:
        """Over these samples; block by block over all of them, so that each is unpacked once."""
        every = self.settings.micro_batches(indices)
        parts = [every[number] for number in self.ranks.owned_indices(len(every))]
        tokens = [self.samples.batch(part).tokens for part in parts]
        modulations = [self.samples.batch(part).modulation for part in parts]
        mx.eval(tokens, modulations)
        for block in self._blocks:
            parameters = self._block_parameters(block.name, state)
            mx.eval(parameters)
            for index, part in enumerate(parts):
                rows = step_rows(self.samples, part, modulations[index]) if with_inputs else None
                tokens[index] = self._run(block, parameters, tokens[index], modulations[index], rows, None)
                mx.eval(tokens[index])
        squares = [self._square(given[0], self.samples.batch(part)) for given, part in zip(tokens, parts, strict=True)]
        own = mx.array([square.item() for square in squares] + [0.0] * (-(-len(every) // self.ranks.size) - len(parts)))
        found = mx.stack(self.ranks.gathered(own, own), axis=1).reshape(-1).tolist()  # in their order
        return sum(square * len(part) for square, part in zip(found, every, strict=False)) / len(indices)

    # gradients, a block at a time

    def _of_parts(
        self,
        state: Mapping[str, Arrays],
        parts: list[np.ndarray],
        streams: Sequence[mx.Stream],
        count: int,
        iteration: int,
    ) -> list[tuple[mx.array, Gradients]]:
        """(loss, slopes) of each of some micro-batches, which are run side by side; their shares of `count` samples."""
        settings, ways = self.settings, list(zip(range(len(parts)), streams, strict=False))
        batches = [self.samples.batch(part) for part in parts]
        rows = [None] * len(parts)
        if settings.activation_bits:
            rows = [step_rows(self.samples, part, batch.modulation) for part, batch in zip(parts, batches, strict=True)]

        def key_of(index: int, block: Any) -> mx.array:
            return mx.random.key(hash((settings.seed, iteration, int(parts[index][0]), block.index)) % 2**32)

        kept: list[list[list[mx.array]]] = [[batch.tokens] for batch in batches]  # what enters every block
        for block in self._blocks:
            parameters = self._block_parameters(block.name, state)
            mx.eval(parameters)
            for index, stream in ways:
                with mx.stream(stream):
                    key = key_of(index, block)
                    kept[index].append(
                        self._run(block, parameters, kept[index][-1], batches[index].modulation, rows[index], key)
                    )
            mx.eval([each[-1] for each in kept])
        losses, slopes_of = [], []
        for index, stream in ways:
            with mx.stream(stream):
                square = partial(self._square, batch=batches[index])
                loss, slope = mx.value_and_grad(square)(kept[index].pop()[0])
                share = len(parts[index]) / count / self.norm
                loss, slope = share * loss, share * slope
                losses.append(loss)
                slopes_of.append([slope])
        mx.eval(losses, slopes_of)
        totals: list[Gradients] = [{} for _ in parts]
        for block in reversed(self._blocks):
            parameters = self._block_parameters(block.name, state)
            mx.eval(parameters)
            for index, stream in ways:
                with mx.stream(stream):
                    run = partial(
                        self._weighted,
                        block,
                        batches[index].modulation,
                        rows[index],
                        key_of(index, block),
                        slopes_of[index],
                    )
                    given, slopes_of[index] = mx.grad(run, argnums=(0, 1))(parameters, kept[index].pop())
                    totals[index] = merged(totals[index], self._reduced(block.name, state, given))
            mx.eval(slopes_of, totals)
        return list(zip(losses, totals, strict=True))

    def _weighted(
        self, block: Any, modulation: mx.array, rows: mx.array | None, key: mx.array, slopes: Sequence[mx.array],
        parameters: dict[str, Arrays], tokens: list[mx.array],
    ) -> mx.array:  # fmt: skip
        """Σ given · slope: its gradients are those of the loss."""
        given = self._run(block, parameters, tokens, modulation, rows, key)
        return sum((one * mx.stop_gradient(slope)).sum() for one, slope in zip(given, slopes, strict=False))

    def _reduced(self, block: str, state: Mapping[str, Arrays], gradients: dict[str, Arrays]) -> Gradients:
        """Of a block's dense gradients, what `Training.move_grids` and `move_ranges` need."""
        codes = {name: self._codes[name].astype(mx.float32) for name in self._of_block[block]}
        found = grid_slopes(codes, state["scale"], state["zero_point"], gradients["weights"])
        ranges = gradients["ranges"] if self.settings.activation_rule == STATIC_RULE else {}
        return found | {"bias": gradients["biases"], "ranges": ranges}


def merged(totals: Gradients, found: Gradients) -> Gradients:
    return {kind: totals.get(kind, {}) | layers for kind, layers in found.items()}


class FinalTraining(Training):
    """The training of a `WholeModel`."""

    unit: WholeModel
    codes_per_step = 1.0  # all layers at once: where inputs have channels of one sign, a group's zero point moves much
    gained = False  # whether held-out samples are better off, as they are deployed; known once it was measured

    @property
    def iters(self) -> int:
        return self.settings.end_to_end

    @property
    def inputs_from(self) -> int:
        return 0

    def step(self) -> float:
        """As Training.step."""
        loss, slopes = self.unit.slopes(self.state, self.drawn(self.iteration), self.iteration)
        self._check(loss, slopes)
        ranges = slopes.pop("ranges")
        self.move_grids(slopes, self.iteration / self.iters)
        if ranges:
            self.move_ranges(ranges)
        return self._finished(loss)

    def measure(self) -> dict[str, Any]:
        """Losses on held-out samples, at the end on training samples, too; what 3W's other phases call hardened is the start."""
        unit, with_inputs = self.unit, bool(self.settings.activation_bits)
        held_out, chosen = (spread_over(ids, EVALUATED) for ids in (unit.samples.held_out, unit.samples.training))
        start = unit.loss(held_out, unit.start)
        losses = {
            "nearest": unit.loss(held_out, None),
            "start": start,
            "hardened": start,
            "end": unit.loss(held_out, self.state),
            "end_activations": unit.loss(held_out, self.state, with_inputs) if with_inputs else None,
            "end_training": unit.loss(chosen, self.state),
        }
        judged = (
            (unit.loss(held_out, unit.start, True), losses["end_activations"])
            if with_inputs
            else (start, losses["end"])
        )
        self.gained = judged[1] < judged[0]
        if not all(math.isfinite(value) for value in losses.values() if value is not None):
            raise NotFiniteError(f"a held-out loss is not finite after iteration {self.iteration}")
        return losses


def before_phase(fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A layer's fields as they were before this phase: its own, where it has not been applied."""
    kept = {name.removesuffix("_before"): array for name, array in fields.items() if name.endswith("_before")}
    return {name: array for name, array in fields.items() if not name.endswith("_before")} | kept


def after_phase(training: FinalTraining, name: str, fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A layer's fields with what was trained, if it made anything better, and what was there before."""
    before = before_phase(fields)
    noted = {f"{key}_before": before[key] for key in KEPT_BEFORE if key in before}
    if not training.gained:
        return before | noted
    state = training.state
    scale, zero_point = deployed_grid(np.array(state["scale"][name]), np.array(state["zero_point"][name]))
    after = {"scale": scale, "zero_point": zero_point}
    if name in state["bias"]:
        after["bias"] = np.array(state["bias"][name].astype(mx.float16).astype(mx.float32))
    if state["range"]:
        ranges = np.exp(np.array(state["range"][training.unit.input_of[name]], np.float32))
        after["act_scale"] = ranges.max()
        after |= {"act_scales": ranges} if ranges.ndim else {}
    return before | after | noted


class FinalPhase(Job):
    """The last phase of a run whose units are smaller than the model."""

    @classmethod
    def of_run(cls, run: RoundingRun) -> list[Job]:
        spec = UnitSpec(WholeModel.name, run.blocks, list(run.layers))
        return [cls(run, spec)] if run.settings.end_to_end and spec.layers else []

    @property
    def iterations(self) -> int:
        return self.run.settings.end_to_end

    @property
    def iteration_cost(self) -> float:
        """Every block is run twice forwards."""
        return len(self.run.blocks) * 4 / 3

    def peak_bytes(self) -> int:
        """Codes and grids of all layers, the tokens between the blocks, and the gradients of one block."""
        run, settings = self.run, self.run.settings
        units = [job for job in UnitPhase.of_run(run) if isinstance(job, UnitPhase)]
        sizes = [num_weights(run.layers[name] for name in job.spec.layers) for job in units]
        cached = boundary_shapes(run.cache)
        tokens = sum(4 * math.prod(cached[key]) for key in block_keys(run.cache, run.blocks[0])[0])
        at_once = min(settings.chunk * working_cores(), settings.batch_size)
        grids = 8 * 4 * sum(sizes) // (settings.group_size or 1024)  # scales, zero points, their moments and slopes
        largest = max((job.iteration_bytes() for job in units), key=lambda one: one.peak(1))
        one = IterationBytes(4 * max(sizes), largest.sample, 1)
        return sum(sizes) + grids + at_once * tokens * len(run.blocks) + one.peak(at_once)

    def losses_paths(self) -> list[Path]:
        return [self.run.paths.end_to_end_losses]

    def is_complete(self, layers: Layers) -> bool:
        return all("scale_before" in fields for fields in layers.values())

    def open(self) -> nn.Module:
        return self.run.open()

    def samples(self, mmdit: nn.Module) -> Samples:
        return self.run.whole_samples()

    def training(self, mmdit: nn.Module, samples: Samples) -> Training:
        run, layers = self.run, {}
        for block in self.trained_blocks:
            layers |= read_quantized_block(run.paths, block, run.plan)
        before = {name: before_phase(fields) for name, fields in layers.items()}
        return FinalTraining(WholeModel.build(mmdit, run.blocks, samples, run.settings, before, run.ranks))

    def saves_before_writing(self) -> bool:
        return True

    def write(self, training: Training, losses: Mapping[str, Any], keep_alpha: bool) -> None:
        """Write every block's file again, with what was trained where held-out samples are better off."""
        assert isinstance(training, FinalTraining)
        paths, plan = self.run.paths, self.run.plan
        for block in self.trained_blocks:
            layers = read_quantized_block(paths, block, plan)
            write_quantized_block(paths, block, {n: after_phase(training, n, f) for n, f in layers.items()}, plan)
        stages = [{**losses, "kept_nearest": False, "layers": len(training.unit.layers)}]
        write_losses(paths.end_to_end_losses, self.name, stages, plan)
