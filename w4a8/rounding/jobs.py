"""The jobs of stage 3W: how one runs, from its checkpoint to its files, and what is left of them."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from calibration_store.checkpoint import Layers
from calibration_store.errors import OptionError, StoreError
from calibration_store.files import remove_file, write_json
from calibration_store.layout import WeightPaths
from calibration_store.names import block_of
from calibration_store.weights import read_quantized_block, write_losses, write_quantized_block
from w4a8.cli.progress import ProgressBar
from w4a8.quantized.arithmetic import grid_position
from w4a8.rounding.checkpoint import Checkpoint
from w4a8.rounding.end_to_end import after_phase
from w4a8.rounding.memory import end_to_end_bytes
from w4a8.rounding.run import END_TO_END, Rounding
from w4a8.rounding.training import NotFiniteError, Training, train
from w4a8.rounding.units import Job


def run_job(
    rounding: Rounding, job: Job, plan: Mapping[str, Any], bar: ProgressBar, checkpoint_seconds: float, keep_alpha: bool
) -> None:
    """Train a job's parts, from its checkpoint if there is one, and write its blocks' files."""
    paths, settings = rounding.paths, rounding.settings
    mmdit, checkpoint = rounding.opened(job), Checkpoint(paths, job, plan)
    samples = rounding.samples(mmdit, job)
    position, saved, done = checkpoint.load(settings) or ({"stage": 0, "losses": []}, {}, {})
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
        save = partial(checkpoint.save, index, training, done, losses)
        found = train_part(training, plan, paths, bar, save, checkpoint_seconds)
        if job.name == END_TO_END:
            save()  # its files are written one after the other
            found["kept_nearest"] = False
            write_end_to_end(rounding, job, training, found)
            break
        found["kept_nearest"] = not found["end"] < found["nearest"]
        done |= trained_layers(training, found["kept_nearest"])
        losses.append(found | {"layers": len(training.unit.layers)})
    else:
        for block in rounding.trained(job):
            layers = {name: dict(fields) for name, fields in done.items() if block_of(name) == block}
            for fields in () if keep_alpha else layers.values():
                del fields["alpha"]
            write_quantized_block(paths, block, layers)
            write_losses(paths.losses(block), job.name, losses)
    remove_file(paths.checkpoint)
    del mmdit, samples, training, save
    gc.collect()  # what refers to itself would stay beside the next block
    mx.clear_cache()


def write_end_to_end(rounding: Rounding, job: Job, training: Training, found: Mapping[str, Any]) -> None:
    """Apply the last phase to every block's file, where it made the held-out samples better."""
    for block in rounding.trained(job):
        layers = read_quantized_block(rounding.paths, block, rounding.plan)
        after = {name: after_phase(training, name, fields) for name, fields in layers.items()}
        write_quantized_block(rounding.paths, block, after)
    write_losses(rounding.paths.end_to_end_losses, job.name, [{**found, "layers": len(training.unit.layers)}])


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


END_TO_END_COST = (
    4 / 3
)  # iterations of a block that one of the last phase takes for each block: it runs them twice forwards


def estimate(rounding: Rounding, todo: Sequence[Job], started: Mapping[str, Any] | None) -> Estimate:
    """started: the position of the first job's checkpoint. Raises OptionError when nothing can be learned."""
    mx.reset_peak_memory()
    job = todo[0]
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
    return Estimate(left, seconds * costs, peak + samples.held_bytes)


class NothingLearned(OptionError):
    """The first iterations diverge."""

    exit_code = 1


def kept_after_interrupt(paths: WeightPaths) -> str:
    """What is on the disk."""
    files = [path for path in paths.owned_files() if path.parent == paths.root and path != paths.checkpoint]
    blocks = [path.stem for path in files if path.suffix == ".npz"]
    kept = [f"finished blocks ({', '.join(blocks)})"] if blocks else []
    kept += ["a checkpoint"] if paths.checkpoint.exists() else []
    return (
        f"{' and '.join(kept)} kept in {paths.root}" if kept else "nothing was finished, and no checkpoint written, yet"
    )
