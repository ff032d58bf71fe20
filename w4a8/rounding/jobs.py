"""The jobs of stage 3W: what is left of them, what they cost, and how one runs, from its checkpoint to its files."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.block_cache import block_keys, boundary_shapes, holds_ends
from calibration_store.checkpoint import Layers
from calibration_store.errors import OptionError, StoreError
from calibration_store.files import remove_file, write_json
from calibration_store.layout import WeightPaths
from calibration_store.names import block_of
from calibration_store.stage_folder import shown
from calibration_store.weights import (
    LOSSES,
    WEIGHTS_FORMAT,
    read_quantized_block,
    write_losses,
    write_quantized_block,
)
from w4a8.cli.progress import ProgressBar
from w4a8.cli.words import format_bytes
from w4a8.memory import device_memory
from w4a8.model.layers import Layer, model_blocks, model_layers
from w4a8.model.parts import check_finite
from w4a8.parallel import cores
from w4a8.quantized.arithmetic import grid_position
from w4a8.rounding.checkpoint import Checkpoint
from w4a8.rounding.samples import Samples
from w4a8.rounding.settings import Settings
from w4a8.rounding.training import NotFiniteError, Training, train
from w4a8.rounding.units import UNITS, Job, Unit

MODEL_UNIT_LIMIT = 100_000_000  # weights up to which the default unit is the whole model
BYTES_PER_WEIGHT = 3 + 2 * 16  # codes and alpha, and a checkpoint being replaced by the next


@dataclass(frozen=True)
class Rounding:
    """A run of stage 3W: the model, what is trained in which pieces, and from what."""

    open: Callable[[], nn.Module]  # the transformer, float32, whose weights are read when they are used
    mmdit: nn.Module  # one such that is only looked at
    paths: WeightPaths
    cache: Mapping[str, Any]  # the block cache's metadata
    schedule: Sequence[float]  # noise levels of the calibration run, num_steps + 1
    settings: Settings
    unit: str  # a name of units.UNITS
    blocks: list[str]

    @property
    def unit_class(self) -> type[Unit]:
        return UNITS[self.unit]

    @cached_property
    def layers(self) -> dict[str, Layer]:
        return {name: layer for name, layer in model_layers(self.mmdit).items() if layer.block in self.blocks}

    @cached_property
    def jobs(self) -> list[Job]:
        return self.unit_class.jobs(self.layers, self.blocks)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What the run is (plan.json), and most of metadata.json."""
        cache = self.cache
        return {
            "format": WEIGHTS_FORMAT,
            "model_version": cache.get("model_version"),
            "calibration_run": cache.get("calibration_run"),
            "weights_fingerprint": cache.get("weights_fingerprint"),
            "unit": self.unit,
            "block_names": self.blocks,
            **asdict(self.settings),
            "num_samples": len(cache["samples"]),
            "range_sigmas": [self.schedule[step] for step in cache["key_timesteps"]],
            "schedule": self.schedule[:-1],
            "selected_image_ids": cache["selected_image_ids"],
            "key_timesteps": cache["key_timesteps"],
        }

    def is_finished(self, job: Job) -> bool:
        """Whether every block of the job is on disk, valid, and of this model's layers."""
        try:
            found: Layers = {}
            for block in job.blocks:
                found |= read_quantized_block(self.paths, block, self.plan)
                losses = LOSSES.read(self.paths.losses(block))
                if losses["unit"] != job.name or len(losses["stages"]) != len(job.parts):
                    return False
        except StoreError:
            return False
        shapes = {name: layer.shape for name, layer in self.layers.items() if layer.block in job.blocks}
        return {name: fields["q"].shape for name, fields in found.items()} == shapes

    def bytes_of(self, jobs: Sequence[Job]) -> int:
        """What these jobs take on the disk at most."""
        shapes = [self.layers[name].shape for job in jobs for part in job.parts for name in part.layers]
        return BYTES_PER_WEIGHT * sum(out * width for out, width in shapes)

    def __str__(self) -> str:
        settings = self.settings
        return (
            f"{len(self.layers)} layers of {len(self.blocks)} blocks, W{settings.weight_bits}"
            f"{f'A{settings.activation_bits}' if settings.activation_bits else ''}, "
            f"{f'groups of {settings.group_size}' if settings.group_size else 'per output channel'}, unit {self.unit}, "
            f"{settings.iters} iterations of {settings.batch_size} ({settings.micro_batch} at once), {len(self.cache['samples'])} cached samples"
        )

    def opened(self, job: Job) -> nn.Module:
        """The transformer with the job's blocks in memory; what else it needs is read when it is used."""
        mmdit = self.open()
        for name in job.blocks:
            check_finite(model_blocks(mmdit)[name].module, f"{self.plan['model_version']}, {name}")
        return mmdit

    def training(self, mmdit: nn.Module, job: Job, index: int, samples: Samples) -> Training:
        return Training(self.unit_class(mmdit, job, job.parts[index], samples, self.settings))

    def samples(self, job: Job) -> Samples:
        if holds_ends(self.cache):
            return Samples.of_ends(self.paths.calib_dir, self.cache, self.mmdit.config.patch_size)
        return Samples.of_stretch(self.paths.calib_dir, self.cache, job.blocks)


def choose_unit(
    mmdit: nn.Module, cached: Sequence[str], blocks: str | None, unit: str | None, group_size: int
) -> tuple[str, list[str]]:
    """(unit, blocks) of a run. Raises OptionError for blocks that are not cached and groups that do not fit."""
    every = list(model_blocks(mmdit))
    chosen = [name.strip() for name in blocks.split(",")] if blocks is not None else list(cached)
    unknown = [name for name in chosen if name not in cached]
    if unknown:
        raise OptionError(f"--blocks: {', '.join(map(shown, unknown))} not in the cache, which has {', '.join(cached)}")
    chosen = [name for name in cached if name in chosen]
    shapes = [layer.shape for layer in model_layers(mmdit).values() if layer.block in chosen]
    if group_size and any(width % group_size for _, width in shapes):
        widths = sorted({width for _, width in shapes})
        raise OptionError(f"--group-size {group_size} does not divide the layers' inputs ({widths})")
    if unit == "model" and chosen != every:
        raise OptionError(
            "--unit model needs every block: run cache_adaround_data.py without --blocks, and leave --blocks out here"
        )
    if unit is None:
        fits = sum(out * width for out, width in shapes) <= MODEL_UNIT_LIMIT
        unit = "model" if chosen == every and fits else "block"
    return unit, chosen


# --- memory -------------------------------------------------------------------------------------------------

# What the peak of an iteration was measured to be on a CPU (benchmarks/memory.py --fit), that of the first one of
# tuning: arrays of the unit's weights in float32 (the weights, floors, α, moments, codes, gradients, the state before);
# of a sample in a block's backward pass, (rows, tokens, hidden) and attention scores; shares of the latter that are
# there once, and for each block.
WEIGHT_ARRAYS, TOKEN_ARRAYS, SCORE_ARRAYS = 10, 86, 1.95
ONCE, EACH_BLOCK = 0.37, 0.61
MEMORY_SHARE = 0.75  # of the device's memory that an iteration may take


@dataclass(frozen=True)
class IterationBytes:
    """What an iteration takes: weights of the unit, one sample in one block, and how many blocks there are."""

    weights: int
    sample: int
    blocks: int

    def peak(self, samples: int) -> int:
        """At the peak, with so many samples at the same time."""
        return int(WEIGHT_ARRAYS * self.weights + samples * (ONCE + EACH_BLOCK * self.blocks) * self.sample)

    def micro_batch(self, batch_size: int, memory: int) -> int:
        """The largest micro-batch that fits, 1 at least; a CPU's cores share the batch."""
        streams = min(cores(), batch_size)
        parts = range(streams, batch_size + 1)  # of about the same size
        sizes = (-(-batch_size // count) for count in parts)
        return next((size for size in sizes if self.peak(size * streams) <= MEMORY_SHARE * memory), 1)


def iteration_bytes(rounding: Rounding) -> IterationBytes:
    """Of the largest unit, from shapes alone."""
    config, cached, found = rounding.mmdit.config, boundary_shapes(rounding.cache), []
    for job in rounding.jobs:
        shapes = [cached[key] for key in block_keys(rounding.cache, job.blocks[0])[0]]
        rows, hidden, tokens = shapes[0][0], shapes[0][-1], sum(shape[1] for shape in shapes)
        arrays, scores = rows * tokens * hidden, rows * config.num_heads * tokens**2
        weights = sum(out * width for name in job_layers(job) for out, width in [rounding.layers[name].shape])
        sample = 4 * int(TOKEN_ARRAYS * arrays + SCORE_ARRAYS * scores)
        found.append(IterationBytes(4 * weights, sample, len(job.blocks)))
    return max(found, key=lambda one: one.peak(1))


def job_layers(job: Job) -> list[str]:
    return [name for part in job.parts for name in part.layers]


SMALLER = dict.fromkeys(UNITS, "a smaller --latent-size in stage 1") | {"model": "--unit block"}


def choose_micro_batch(rounding: Rounding, given: int | None, before: Mapping[str, Any] | None) -> Rounding:
    """The run with its micro-batch: as given, as an earlier run of this folder had it, or as large as fits.

    Raises OptionError when not even one sample fits.
    """
    need, memory, size = iteration_bytes(rounding), device_memory(), rounding.settings.batch_size
    fits = need.micro_batch(size, memory)
    micro_batch = min(given or (before or {}).get("micro_batch") or fits, size)
    peak = need.peak(min(micro_batch * cores(), size))
    if peak > memory:
        way = f"--micro-batch {fits}" if micro_batch > fits else SMALLER[rounding.unit]
        raise OptionError(
            f"iterations with {micro_batch} samples at once take about {format_bytes(peak)} of memory, and "
            f"{format_bytes(memory)} are there: {way} takes less"
        )
    settings = replace(rounding.settings, micro_batch=micro_batch)
    return replace(rounding, settings=settings)


# --- one job ------------------------------------------------------------------------------------------------


def run_job(
    rounding: Rounding, job: Job, plan: Mapping[str, Any], bar: ProgressBar, checkpoint_seconds: float, keep_alpha: bool
) -> None:
    """Train a job's parts, from its checkpoint if there is one, and write its blocks' files."""
    paths, settings = rounding.paths, rounding.settings
    mmdit, samples, checkpoint = rounding.opened(job), rounding.samples(job), Checkpoint(paths, job, plan)
    position, saved, done = checkpoint.load(settings.weight_bits) or ({"stage": 0, "losses": []}, {}, {})
    losses = position["losses"]
    bar.n += settings.iters * position["stage"]
    for index in range(position["stage"], len(job.parts)):
        training = rounding.training(mmdit, job, index, samples)
        if saved:
            try:
                training.restore(saved, position["iteration"])
                bar.n += position["iteration"]
            except ValueError as error:
                checkpoint.discard(error)
            saved = {}
        found = train_part(
            training, plan, paths, bar, partial(checkpoint.save, index, training, done, losses), checkpoint_seconds
        )
        found["kept_nearest"] = not found["end"] < found["nearest"]
        done |= trained_layers(training, found["kept_nearest"])
        losses.append(found | {"layers": len(training.unit.layers)})
    for block in job.blocks:
        layers = {name: dict(fields) for name, fields in done.items() if block_of(name) == block}
        for fields in () if keep_alpha else layers.values():
            del fields["alpha"]
        write_quantized_block(paths, block, layers)
        write_losses(paths, block, job.name, losses)
    remove_file(paths.checkpoint)
    del mmdit, samples, training
    gc.collect()  # what refers to itself would stay beside the next block
    mx.clear_cache()


def train_part(
    training: Training, plan: Mapping[str, Any], paths: WeightPaths, bar: ProgressBar, save: Callable[[], None],
    checkpoint_seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """`train`; a loss that is not finite leaves the last good state on the disk and ends the stage in a line."""
    try:
        return train(training, bar, save, checkpoint_seconds)
    except NotFiniteError as error:
        save()
        write_json(paths.plan, {**plan, "diverged": training.unit.name})
        raise StoreError(
            f"{training.unit.name}: {error}; the last good state, iteration {training.iteration}, is kept: --resume goes "
            "on from it, also with a lower --lr-alpha or --lr-activation-scale (TROUBLESHOOTING_GUIDE Issue 25)"
        ) from None


def trained_layers(training: Training, keep_nearest: bool) -> Layers:
    """What the block files say of a trained unit's layers: {layer: {field: array}}."""
    unit, state = training.unit, training.state
    quantized = unit.nearest
    if not keep_nearest:
        quantized = unit.quantized(state, unit.codes(state, hard=True), with_ranges=False).layers
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
    """α in float16, on the same side of 0: what is below and too small becomes the smallest number below."""
    half = alpha.astype(np.float16)
    return np.where((alpha < 0) & (half == 0), -np.finfo(np.float16).smallest_subnormal, half)


# --- before it begins ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What is left to do, from a job set up and two timed iterations."""

    iterations: int
    seconds: float
    peak_bytes: int


def estimate(rounding: Rounding, todo: Sequence[Job], started: Mapping[str, Any] | None) -> Estimate:
    """started: the position of the first job's checkpoint. Raises OptionError when nothing can be learned."""
    mx.reset_peak_memory()
    samples = rounding.samples(todo[0])
    training = rounding.training(rounding.opened(todo[0]), todo[0], 0, samples)
    iters = rounding.settings.iters
    try:
        for _ in range(2):
            training.step()
        training.iteration = rounding.settings.rounding_iters
        for _ in range(2):
            start = time.perf_counter()
            training.step()
            seconds = time.perf_counter() - start
    except NotFiniteError as error:
        raise NothingLearned(f"{todo[0].name}: {error}: nothing can be learned with these options") from None
    left = iters * sum(len(job.parts) for job in todo)
    if started is not None:
        left -= iters * started["stage"] + min(started["iteration"], iters)
    return Estimate(left, seconds * left, mx.get_peak_memory() + samples.held_bytes)


class NothingLearned(OptionError):
    """The first iterations diverge."""

    exit_code = 1


def kept_after_interrupt(paths: WeightPaths) -> str:
    """What is on the disk."""
    blocks = [path.stem for path in paths.owned_files() if path.suffix == ".npz" and path != paths.checkpoint]
    kept = [f"finished blocks ({', '.join(blocks)})"] if blocks else []
    kept += ["a checkpoint"] if paths.checkpoint.exists() else []
    return (
        f"{' and '.join(kept)} kept in {paths.root}" if kept else "nothing was finished, and no checkpoint written, yet"
    )
