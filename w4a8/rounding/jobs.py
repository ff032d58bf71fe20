"""The jobs of stage 3W: how one runs, from its checkpoint to its files, and what is left of them."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from calibration_store.errors import OptionError, StoreError
from calibration_store.files import remove_file, write_json
from calibration_store.layout import WeightPaths
from calibration_store.names import block_of
from calibration_store.rounding_checkpoint import Layers
from calibration_store.weights import read_quantized_block, write_losses, write_quantized_block
from w4a8.backend.progress import ProgressBar
from w4a8.quantized.arithmetic import grid_position
from w4a8.rounding.final_phase import after_phase
from w4a8.rounding.job_checkpoint import JobCheckpoint
from w4a8.rounding.micro_batches import end_to_end_bytes, samples_bytes
from w4a8.rounding.run import END_TO_END, RoundingRun
from w4a8.rounding.training import NotFiniteError, Training, train
from w4a8.rounding.units import Job


def run_jobs(
    rounding: RoundingRun, todo: Sequence[Job], bar: ProgressBar, checkpoint_seconds: float, keep_alpha: bool
) -> None:
    """Train what is left, job by job. Ranks share every job, or, where blocks need nothing of each other, the jobs."""
    jobs, ranks, own = rounding.jobs, rounding.ranks, [job for job in rounding.jobs if rounding.is_one_ranks(job)]
    if todo and ranks.rank == 0:
        remove_file(rounding.paths.metadata)  # it describes files that are about to change
    bar.n = sum(rounding.iterations(job) for job in own if job not in todo)
    for number, job in enumerate(own):
        if job in todo and ranks.owns(number):
            bar.set_description(job.name)
            run_job(rounding.alone, job, bar, partial(ranks.advance, bar), checkpoint_seconds, keep_alpha, own=True)
    ranks.barrier()
    for number, job in list(enumerate(jobs))[len(own) :]:
        bar.n = sum(map(rounding.iterations, jobs[:number]))
        bar.set_description(job.name)
        if job in todo:
            run_job(rounding, job, bar, bar.update, checkpoint_seconds, keep_alpha)
    bar.n = sum(map(rounding.iterations, jobs))
    if ranks.rank == 0:
        remove_file(rounding.paths.checkpoint)  # of a job that ranks of their own have finished


def run_job(
    rounding: RoundingRun, job: Job, bar: ProgressBar, count: Callable[[], None], checkpoint_seconds: float, keep_alpha: bool,
    own: bool = False,
) -> None:  # fmt: skip
    """Train a job's parts, from its checkpoint if there is one, and write its blocks' files; rank 0 does.

    count: after every iteration; own: the ranks have a job each.
    """
    paths, settings, ranks, plan = rounding.paths, rounding.settings, rounding.ranks, rounding.plan
    mmdit, checkpoint = rounding.opened(job), JobCheckpoint(paths, job, plan, own)
    samples = rounding.samples(mmdit, job)
    position, saved, done = checkpoint.load(settings) or ({"stage": 0, "losses": []}, {}, {})
    ranks.barrier()  # every rank has read it
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
        writes = partial(checkpoint.save, index, training, done, losses)
        save = writes if ranks.rank == 0 else lambda: None
        found = train_part(rounding, training, bar, save, checkpoint_seconds, count)
        if job.name == END_TO_END:
            save()  # its files are written one after the other
            found["kept_nearest"] = False
            if ranks.rank == 0:
                write_end_to_end(rounding, job, training, found)
            break
        found["kept_nearest"] = not found["end"] < found["nearest"]
        done |= trained_layers(training, found["kept_nearest"])
        losses.append(found | {"layers": len(training.unit.layers)})
    else:
        for block in rounding.trained(job) if ranks.rank == 0 else ():
            layers = {name: dict(fields) for name, fields in done.items() if block_of(name) == block}
            for fields in () if keep_alpha else layers.values():
                del fields["alpha"]
            write_quantized_block(paths, block, layers, plan)
            write_losses(paths.losses(block), job.name, losses, plan)
    if ranks.rank == 0:
        checkpoint.remove()
    ranks.barrier()  # its files are there
    del mmdit, samples, training, writes, save
    gc.collect()  # what refers to itself would stay beside the next block
    mx.clear_cache()


def write_end_to_end(rounding: RoundingRun, job: Job, training: Training, found: Mapping[str, Any]) -> None:
    """Apply the last phase to every block's file, where it made the held-out samples better."""
    for block in rounding.trained(job):
        layers = read_quantized_block(rounding.paths, block, rounding.plan)
        after = {name: after_phase(training, name, fields) for name, fields in layers.items()}
        write_quantized_block(rounding.paths, block, after, rounding.plan)
    stages = [{**found, "layers": len(training.unit.layers)}]
    write_losses(rounding.paths.end_to_end_losses, job.name, stages, rounding.plan)


def train_part(
    rounding: RoundingRun, training: Training, bar: ProgressBar, save: Callable[[], None], checkpoint_seconds: float,
    count: Callable[[], None],
) -> dict[str, Any]:  # fmt: skip
    """`train`; a loss that is not finite leaves the last good state on the disk and ends the stage in a line."""
    try:
        return train(training, bar, save, checkpoint_seconds, count)
    except NotFiniteError as error:
        save()
        if rounding.ranks.rank == 0:
            write_json(rounding.paths.plan, {**rounding.plan, "diverged": training.unit.name})
        rounding.ranks.barrier()
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


END_TO_END_COST = (
    4 / 3
)  # iterations of a block that one of the last phase takes for each block: it runs them twice forwards


def estimate(rounding: RoundingRun, todo: Sequence[Job], started: Mapping[str, Any] | None) -> Estimate:
    """started: the position of the first job's checkpoint. Raises OptionError when nothing can be learned."""
    mx.reset_peak_memory()
    job, at_once = todo[0], 1
    if rounding.is_one_ranks(job):
        rounding, at_once = rounding.alone, rounding.ranks.size
    walks = rounding.walk is not None and job.name != END_TO_END
    if walks:
        job = rounding.jobs[0]  # whose inputs are cached
    mmdit = rounding.opened(job)
    samples = rounding.walk.few(mmdit, rounding.settings.batch_size) if walks else rounding.samples(mmdit, job)
    training = rounding.training(mmdit, job, 0, samples)
    try:
        for _ in range(2):
            training.step()
        training.iteration = 0 if job.name == END_TO_END else rounding.settings.rounding_iters
        for _ in range(2):
            start = time.perf_counter()
            training.step()
            seconds = time.perf_counter() - start
    except NotFiniteError as error:
        raise NothingLearned(f"{job.name}: {error}: nothing can be learned with these options") from None
    left = sum(rounding.iterations(job) for job in todo)
    if started is not None:
        left -= min(rounding.settings.iters * started["stage"] + started["iteration"], rounding.iterations(todo[0]))
    last = rounding.settings.end_to_end if todo[-1].name == END_TO_END and job.name != END_TO_END else 0
    costs = left + last * (len(rounding.blocks) * END_TO_END_COST - 1)
    peak = max(mx.get_peak_memory(), end_to_end_bytes(rounding))
    peak += rounding.settings.window * samples_bytes(rounding) // len(rounding.cache["samples"])
    return Estimate(left, seconds * costs / at_once, peak + samples.held_bytes)


def say_shares(rounding: RoundingRun, todo: Sequence[Job]) -> None:
    """Of a dry run: who does what."""
    ranks, own = rounding.ranks, [job for job in rounding.jobs if rounding.is_one_ranks(job)]
    if own:
        ranks.print_shares([sum(own[number] in todo for number in one.owned_indices(len(own))) for one in ranks.every_rank()], "blocks")
    else:
        parts = rounding.settings.micro_batches(range(rounding.settings.batch_size))
        ranks.print_shares([len(one.owned_indices(len(parts))) for one in ranks.every_rank()], "micro-batches of an iteration")


class NothingLearned(OptionError):
    """The first iterations diverge."""

    exit_code = 1


def kept_after_interrupt(paths: WeightPaths) -> str:
    """What is on the disk."""
    names = [path.stem for path in paths.owned_files() if path.parent == paths.root and path.suffix == ".npz"]
    blocks = [name for name in names if not name.startswith("checkpoint")]
    kept = [f"finished blocks ({', '.join(blocks)})"] if blocks else []
    kept += ["a checkpoint"] if len(blocks) < len(names) else []
    return (
        f"{' and '.join(kept)} kept in {paths.root}" if kept else "nothing was finished, and no checkpoint written, yet"
    )
