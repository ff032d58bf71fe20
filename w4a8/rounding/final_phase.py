"""The last phase: scales, zero points, biases and ranges of all blocks together against the model's output; codes stay.

This is EfficientQAT's second phase (Chen et al. 2024).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.block_cache import block_keys, boundary_shapes
from calibration_store.manifest import read_manifest
from calibration_store.rest_weights import read_rest, write_rest
from calibration_store.rounding_checkpoint import Layers
from calibration_store.weights import read_losses, read_quantized_block, write_losses, write_quantized_block
from w4a8.backend.parallel import working_cores
from w4a8.model.layers import half_dtype, num_weights
from w4a8.quantized.layer import deployed_grid
from w4a8.rounding.finished_latents import UNROLLED, FinishedLatents, LastSteps, read_ends
from w4a8.rounding.jobs import Job
from w4a8.rounding.methods import Arrays
from w4a8.rounding.rest import bytes_of_rest, narrow_untrained, untrained_matrices
from w4a8.rounding.run import RoundingRun
from w4a8.rounding.settings import (
    BLOWN,
    EVALUATED,
    FLOAT32,
    LR_LAST_SCALES,
    LR_REST,
    LR_UNROLLED_REST,
    LR_UNROLLED_SCALES,
    SLOWER,
    SLOWEST,
    warmed_cosine,
)
from w4a8.rounding.training import OPTIMIZERS, Adam, NotFiniteError, Training
from w4a8.rounding.training_samples import Samples, TrainingSamples, spread_over
from w4a8.rounding.unit_phase import UnitPhase
from w4a8.rounding.units import MODEL, UnitSpec
from w4a8.rounding.whole_model import WholeModel

EVALUATED_IMAGES = 32  # images that the loss of finished latents is measured on
# Fields that are kept as {field}_before: their values at the start of this phase.
KEPT_BEFORE = ("scale", "zero_point", "bias", "act_scale", "act_scales")


class FinalTraining(Training):
    """The training of a `WholeModel`."""

    unit: WholeModel
    finished: FinishedLatents | None
    # All layers move at once, and where inputs have channels of one sign, a group's zero point changes the output much.
    codes_per_step = 1.0
    gained = False  # held-out samples are better off, as they are deployed; `measure` decides

    def __init__(self, unit: WholeModel, finished: FinishedLatents | None = None):
        """finished: the loss of finished latents, for the iterations after the first `end_to_end` ones."""
        self.finished, self.finished_norm = finished, 1.0
        super().__init__(unit)
        judged, quantized = spread_over(unit.samples.training, EVALUATED), bool(self.settings.activation_bits)
        self.level = unit.loss(judged, unit.start, quantized)  # as the training sees it, but for QDrop
        self.fixed = self._unhurried(1.0)
        if finished is not None:
            self.finished_norm = finished.loss(self._judged(finished.last.training), None)

    def _unhurried(self, pace: float) -> Arrays:
        """Return the pace, a factor of the learning rates, and the running loss, which begins at the start's."""
        return {"pace": mx.array(pace), "running": mx.array(self.level)}

    def restore(self, arrays: Mapping[str, np.ndarray], iteration: int) -> None:
        """Go on as Training.restore says; a run of 0.9.0 before the pace was kept has none."""
        begun = self._unhurried(1.0)
        super().restore({f"fixed|{name}": np.array(array) for name, array in begun.items()} | dict(arrays), iteration)

    @staticmethod
    def _judged(images: Sequence[int]) -> Sequence[int]:
        return spread_over(images, EVALUATED_IMAGES)

    @property
    def iters(self) -> int:
        """The number of iterations."""
        return self.settings.end_to_end + self.settings.unrolled

    @property
    def inputs_from(self) -> int:
        """The first iteration whose inputs are quantized: here all are."""
        return 0

    def step(self) -> float:
        """Take one iteration as Training.step says."""
        before = self.settings.end_to_end
        if self.iteration >= before and self.finished is not None:
            if self.iteration == before:
                self.optimizers = {name: Adam(1e-3, bias_correction=True) for name in OPTIMIZERS}  # another loss
            loss, slopes = self.finished.slopes(self.state, self.drawn_images(self.finished.last.training))
            rate = warmed_cosine(self.iteration - before, self.settings.unrolled)
            rates = LR_UNROLLED_SCALES * rate, LR_UNROLLED_REST * rate
        else:
            drawn, following = self.drawn(self.iteration), min(self.iteration + 1, before - 1)
            self.unit.samples.keep([*drawn, *self.drawn(following)])
            loss, slopes = self.unit.slopes(self.state, drawn, self.iteration)
            rate = warmed_cosine(self.iteration, before)
            rate *= float(self.fixed["pace"])
            rates = LR_LAST_SCALES * rate, LR_REST * rate
        self._note(loss, slopes)
        ranges, rest = slopes.pop("ranges"), slopes.pop("rest")
        self.move_grids(slopes, rates[0])
        if rest:
            self.move_rest(rest, rates[1])
        if ranges:
            self.move_ranges(ranges)
        if self.iteration >= before:
            return self._finished(mx.exp(loss) / self.finished_norm)
        found = self._finished(loss)
        running = 0.75 * float(self.fixed["running"]) + 0.25 * found
        self.fixed = {**self.fixed, "running": mx.array(running)}
        if running > BLOWN * self.level and float(self.fixed["pace"]) > SLOWEST:
            self._begin_slower()
        return found

    def _begin_slower(self) -> None:
        """Go back to the start of the phase, with smaller learning rates: the loss has left its level."""
        self.state = {key: dict(value) for key, value in self.unit.start.items()}
        self.optimizers = {name: Adam(1e-3, bias_correction=True) for name in OPTIMIZERS}
        self.fixed = self._unhurried(SLOWER * float(self.fixed["pace"]))
        self._good = (self._parts(), self.iteration)

    def drawn_images(self, training: Sequence[int]) -> np.ndarray:
        """Return the images of an iteration, sorted: half as many as samples. Seed and iteration decide."""
        random = np.random.default_rng([self.settings.seed, self.iteration])
        count = min(max(1, self.settings.batch_size // 2), len(training))
        return np.sort(random.choice(training, count, replace=False))

    def measure(self) -> dict[str, Any]:
        """Return the losses on held-out samples, and the last loss on training samples, too.

        The loss "hardened" of the first phase is here the start's. Raises NotFiniteError where a loss is not finite.
        """
        unit, with_inputs = self.unit, bool(self.settings.activation_bits)
        held_out, chosen = (spread_over(ids, EVALUATED) for ids in (unit.samples.held_out, unit.samples.training))
        start = unit.loss(held_out, unit.start)
        end = unit.loss(held_out, self.state)
        deployed = unit.loss(held_out, self.state, with_inputs) if with_inputs else None
        losses = {
            "nearest": unit.loss(held_out, None),
            "start": start,
            "hardened": start,
            "end": end,
            "end_activations": deployed,
            "end_training": unit.loss(chosen, self.state),
        }
        if self.finished is not None:
            judged = self._judged(self.finished.last.held_out)
            points = ((None, False), (unit.start, with_inputs), (self.state, with_inputs))
            found = [self.finished.loss(judged, state, inputs) / self.finished_norm for state, inputs in points]
            self.gained = found[2] < found[1]
        elif deployed is None:
            self.gained = end < start
        else:
            self.gained = deployed < unit.loss(held_out, unit.start, True)
        if not all(math.isfinite(value) for value in losses.values() if value is not None):
            raise NotFiniteError(f"a held-out loss is not finite after iteration {self.iteration}")
        return losses if self.finished is None else {**losses, "finished_latents": found}


def before_phase(fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a layer's fields as they were before this phase; its own fields, where this phase has not been applied."""
    kept = {name.removesuffix("_before"): array for name, array in fields.items() if name.endswith("_before")}
    return {name: array for name, array in fields.items() if not name.endswith("_before")} | kept


def after_phase(training: FinalTraining, name: str, fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a layer's fields with the trained values, if held-out samples gain by them, and the values before."""
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
        """Return the one job of this phase; none where the run has no iterations for it."""
        spec = UnitSpec(WholeModel.name, run.blocks, list(run.layers))
        return [cls(run, spec)] if run.settings.end_to_end and spec.layers else []

    @property
    def iterations(self) -> int:
        """The number of iterations of the whole job."""
        return self.run.settings.end_to_end + self.run.settings.unrolled

    @property
    def in_one_piece(self) -> bool:
        """True where gradients come from one graph of all blocks."""
        return self.run.unit == MODEL or self.run.one_graph

    @property
    def iteration_cost(self) -> float:
        """The cost of one iteration, in iterations of a block, whose parts cost alike: once forwards, twice backwards.

        Unless the model is run in one piece, every block is run once more forwards. Against finished latents half as many
        images pass every unrolled step, once more forwards.
        """
        settings = self.run.settings
        parts = 3 if self.in_one_piece else 4
        unrolled = settings.unrolled * UNROLLED * (parts + 1) / parts / 2
        return len(self.run.blocks) * parts / 3 * (settings.end_to_end + unrolled) / self.iterations

    def peak_bytes(self) -> int:
        """Estimate the peak memory in bytes.

        It is the codes and grids of all layers, the tokens between the blocks, and the gradients of one block. In one piece
        it takes less than an iteration of the model as a unit, which has rounding variables, too: where that is the first
        phase, its trial tells.
        """
        run, settings = self.run, self.run.settings
        if run.unit == MODEL:
            return 0
        if self.in_one_piece:
            return UnitPhase(run, self.spec).iteration_bytes().peak(settings.chunk)
        units = [job for job in UnitPhase.of_run(run) if isinstance(job, UnitPhase)]
        sizes = [num_weights(run.layers[name] for name in job.spec.layers) for job in units]
        cached = boundary_shapes(run.cache)
        tokens = sum(4 * math.prod(cached[key]) for key in block_keys(run.cache, run.blocks[0])[0])
        at_once = min(settings.chunk * working_cores(), settings.batch_size)
        grids = 8 * 4 * sum(sizes) // (settings.group_size or 1024)  # scales, zero points, their moments and slopes
        largest = max((job.iteration_bytes() for job in units), key=lambda one: one.peak(1))
        one = replace(largest, weights=4 * max(sizes), blocks=1)
        rest = bytes_of_rest(run.mmdit, settings.rest)
        left = sum(place.owner[place.key].size for place in untrained_matrices(run.mmdit, settings.rest))
        rest += left * (4 if settings.precision == FLOAT32 else 2)
        return sum(sizes) + grids + rest + at_once * tokens * len(run.blocks) + one.peak(at_once)

    def losses_paths(self) -> list[Path]:
        """Return the one file that holds the losses."""
        return [self.run.paths.end_to_end_losses]

    def is_complete(self, layers: Layers) -> bool:
        """Return whether this phase has been applied to all layers: they say where it began. The rest must be there, too.

        Raises StoreError for a damaged rest.
        """
        run = self.run
        if read_losses(run.paths.end_to_end_losses, run.plan)["stages"][0].get("rest"):
            read_rest(run.paths, run.plan_on_disk)
        return all("scale_before" in fields for fields in layers.values())

    def check_inputs(self) -> None:
        """Raise StoreError where finished latents are trained on, and stage 1's are not there."""
        run = self.run
        if run.settings.unrolled:
            read_ends(run.paths.calib_dir, read_manifest(run.paths.calib_dir), run.cache["selected_image_ids"])

    def open(self) -> nn.Module:
        """Return the transformer; beside 16-bit products, matrices that no phase trains have 16 bits, too."""
        run, settings = self.run, self.run.settings
        mmdit = run.open()
        return mmdit if settings.precision == FLOAT32 else narrow_untrained(mmdit, settings.rest, half_dtype(run.mmdit))

    def samples(self, mmdit: nn.Module) -> Samples:
        """Return the inputs of the first block, and the outputs of the whole model."""
        return Samples.of_cache(self.run.paths.calib_dir, self.run.cache, mmdit, self.run.blocks)

    def training(self, mmdit: nn.Module, samples: TrainingSamples) -> Training:
        """Return the training, which starts where the first phase's files end."""
        run = self.run
        layers: Layers = {}
        for block in self.trained_blocks:
            layers |= read_quantized_block(run.paths, block, run.plan)
        before = {name: before_phase(fields) for name, fields in layers.items()}
        in_one_piece = self.in_one_piece
        opened = None if in_one_piece else self.open
        whole = WholeModel.build(mmdit, run.blocks, samples, run.settings, before, run.ranks, in_one_piece, opened)
        if not run.settings.unrolled:
            return FinalTraining(whole)
        assert isinstance(samples, Samples)  # as `samples` gives them
        return FinalTraining(whole, FinishedLatents(whole, self.last_steps(samples)))

    def last_steps(self, samples: Samples) -> LastSteps:
        """Return the end of every image's sampling. Raises StoreError where stage 1's latents are not there."""
        return LastSteps.read(self.run.paths.calib_dir, self.run.cache, samples, self.run.schedule)

    def saves_before_writing(self) -> bool:
        """Return True: a kill between two blocks' files must not cost the training."""
        return True

    def write(self, training: Training, losses: Mapping[str, Any], keep_alpha: bool) -> None:
        """Write every block's file again, with the trained values where held-out samples are better off."""
        assert isinstance(training, FinalTraining)
        paths, plan = self.run.paths, self.run.plan
        rest = training.unit.stored_rest(training.state) if training.gained else {}
        write_rest(paths, rest, plan)
        for block in self.trained_blocks:
            layers = read_quantized_block(paths, block, plan)
            write_quantized_block(paths, block, {n: after_phase(training, n, f) for n, f in layers.items()}, plan)
        noted = {"kept_nearest": False, "kept_start": not training.gained, "layers": len(training.unit.layers)}
        stages = [{**losses, **noted, "rest": len(rest)}]
        write_losses(paths.end_to_end_losses, self.name, stages, plan)
