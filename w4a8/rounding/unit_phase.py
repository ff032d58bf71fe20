"""The first phase: every unit learns its rounding, grids and ranges for its own output (BRECQ, AdaRound)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.block_cache import VELOCITY, block_keys, boundary_shapes, holds_ends, stored_shapes
from calibration_store.names import block_of
from calibration_store.rounding_checkpoint import Layers
from calibration_store.weights import write_losses, write_quantized_block
from w4a8.model.layers import model_blocks, num_weights
from w4a8.model.parts import check_finite
from w4a8.quantized.arithmetic import grid_position
from w4a8.rounding.iteration_bytes import IterationBytes
from w4a8.rounding.jobs import Job
from w4a8.rounding.run import RoundingRun
from w4a8.rounding.settings import FLOAT32
from w4a8.rounding.sixteen_bits import QUERIES
from w4a8.rounding.training import Training
from w4a8.rounding.training_samples import Samples, TrainingSamples
from w4a8.rounding.unit_training import UnitTraining
from w4a8.rounding.units import MODEL

BYTES_PER_WEIGHT = 3 + 2 * 16  # codes and alpha, and a checkpoint being replaced by the next
SECOND_ATTENTION = 1.35  # arrays of a sample where image tokens attend a second time, over those of a plain block


class UnitPhase(Job):
    """The learned rounding of one unit: a block, or the whole model."""

    @classmethod
    def of_run(cls, run: RoundingRun) -> list[Job]:
        """Return a job for each unit, in the order of the model."""
        specs = run.unit_class.specs(run.layers, run.blocks)
        return [cls(run, spec) for spec in specs if spec.layers]  # a unit whose layers are all excluded is left out

    @property
    def iterations(self) -> int:
        """The number of iterations of the whole job."""
        return self.run.settings.iters

    @property
    def trial(self) -> Job:
        """The job that a dry run times: the first one, whose inputs are cached, where boundaries must be made."""
        return self if self.run.boundaries is None else self.of_run(self.run)[0]

    @property
    def timed_from(self) -> int:
        """An iteration that moves rounding and grids, with quantized inputs if any are: it costs the most."""
        settings = self.run.settings
        return max(0, min(settings.inputs_from, settings.rounding_iters - 2))

    @property
    def is_one_process(self) -> bool:
        """True where processes share out the blocks, which need nothing of each other: all boundaries are cached."""
        run = self.run
        return run.ranks.size > 1 and not holds_ends(run.cache) and run.unit != MODEL

    @property
    def bytes_written(self) -> int:
        """The largest number of bytes that the job takes on the disk, checkpoints included."""
        return BYTES_PER_WEIGHT * num_weights(self.run.layers[name] for name in self.spec.layers)

    @property
    def iteration_cost(self) -> float:
        """The cost of one iteration, in iterations of a block."""
        return len(self.spec.blocks)

    def peak_bytes(self) -> int:
        """Return 0: a trial run of the first unit tells."""
        return 0

    def iteration_bytes(self) -> IterationBytes:
        """Estimate the memory that an iteration takes, from shapes alone."""
        run = self.run
        cached, config = boundary_shapes(run.cache), run.mmdit.config
        shapes = [cached[key] for key in block_keys(run.cache, self.spec.blocks[0])[0]]
        rows, hidden, tokens = shapes[0][0], shapes[0][-1], sum(shape[1] for shape in shapes)
        second = any(
            "attn2" in layer.name for name in self.spec.blocks for layer in model_blocks(run.mmdit)[name].layers
        )
        arrays = int(rows * tokens * hidden * (SECOND_ATTENTION if second else 1))
        scores = rows * config.num_heads * tokens**2
        weights = num_weights(run.layers[name] for name in self.spec.layers)
        some = 0 if mx.cuda.is_available() else scores // tokens * min(QUERIES, tokens)
        half = run.settings.precision != FLOAT32
        return IterationBytes.of_shapes(weights, arrays, scores, some, len(self.spec.blocks), half)

    def sample_bytes(self) -> int:
        """Return the number of bytes that one cached sample takes in memory."""
        run, blocks = self.run, self.spec.blocks
        stored, walked = stored_shapes(run.cache), np.dtype(run.boundary_dtype).itemsize
        shapes = stored | boundary_shapes(run.cache)
        inputs, outputs = block_keys(run.cache, blocks[0], blocks[-1])
        outputs = [VELOCITY] if holds_ends(run.cache) and run.unit == MODEL else outputs
        keys = [*inputs, "modulation_input", *outputs]
        return sum((2 if key in stored else walked) * int(np.prod(shapes[key])) for key in keys)

    def losses_paths(self) -> list[Path]:
        """Return a file for each trained block."""
        return [self.run.paths.losses(block) for block in self.trained_blocks]

    def open(self) -> nn.Module:
        """Return the transformer. Raises ModelError where a weight of the unit's blocks is not finite."""
        mmdit = self.run.open()
        for name in self.spec.blocks:
            check_finite(model_blocks(mmdit)[name].module, f"{self.run.plan['model_version']}, {name}")
        return mmdit

    def samples(self, mmdit: nn.Module) -> TrainingSamples:
        """Return the inputs and outputs of the unit's blocks; make the boundaries that are needed and not cached."""
        run = self.run
        if run.boundaries is not None:
            return run.boundaries.samples(mmdit, self.spec.blocks[0])
        return Samples.of_cache(run.paths.calib_dir, run.cache, mmdit, self.spec.blocks)

    def few_samples(self, mmdit: nn.Module) -> TrainingSamples:
        """Return samples for a trial run, without a boundary on the disk."""
        run = self.run
        return self.samples(mmdit) if run.boundaries is None else run.boundaries.few(mmdit, run.settings.batch_size)

    def training(self, mmdit: nn.Module, samples: TrainingSamples) -> Training:
        """Return the unit's training at its first iteration."""
        return UnitTraining(self.run.unit_class.build(mmdit, self.spec, samples, self.run.settings, self.run.ranks))

    def write(self, training: Training, losses: Mapping[str, Any], keep_alpha: bool) -> None:
        """Write the learned layers, or, where held-out samples are no better off with them, round-to-nearest."""
        assert isinstance(training, UnitTraining)
        kept_nearest = not losses["end"] < losses["nearest"]
        trained = trained_layers(training, kept_nearest)
        stages = [{**losses, "kept_nearest": kept_nearest, "layers": len(trained)}]
        for block in self.trained_blocks:
            layers = {name: dict(fields) for name, fields in trained.items() if block_of(name) == block}
            for fields in () if keep_alpha else layers.values():
                del fields["alpha"]
            write_quantized_block(self.run.paths, block, layers, self.run.plan)
            write_losses(self.run.paths.losses(block), self.name, stages, self.run.plan)


def trained_layers(training: UnitTraining, keep_nearest: bool) -> Layers:
    """Return the arrays of a trained unit's layers as block files hold them: {layer: {field: array}}.

    keep_nearest: the codes and grids of round-to-nearest in place of the learned ones.
    """
    unit, state = training.unit, training.state
    quantized = unit.nearest
    if not keep_nearest:
        quantized = dict(unit.quantized(state, unit.codes(state, hard=True), with_ranges=False).layers)
    layers: Layers = {}
    for name in unit.layers:
        fields = quantized[name].fields()
        if keep_nearest:
            lower = np.floor(grid_position(np.array(unit.weights[name]), fields["scale"], fields["zero_point"]))
            alpha = np.where(fields["q"] > lower, 0.5, -0.5)
        else:
            alpha = np.array(state["alpha"][name])
        bias = {key: fields.pop(key) for key in ("bias",) if key in fields}
        layers[name] = bias | {"alpha": half_alpha(alpha)} | fields
        if state["range"]:
            ranges = np.exp(np.array(state["range"][unit.input_of[name]], np.float32))
            layers[name]["act_scale"] = ranges.max()
            if ranges.ndim:
                layers[name]["act_scales"] = ranges
        if name in unit.shifts:
            layers[name]["act_shift"] = np.array(unit.shifts[name])
    return layers


def half_alpha(alpha: np.ndarray) -> np.ndarray:
    """Return α in float16 on the same side of 0: a negative α that would become 0 becomes the smallest negative."""
    half = alpha.astype(np.float16)
    return np.where((alpha < 0) & (half == 0), -np.finfo(np.float16).smallest_subnormal, half)
