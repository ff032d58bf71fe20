"""The base class of all jobs of stage 3W, and how one job runs from its checkpoint to its files."""

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from calibration_store.errors import StoreError
from calibration_store.files import write_json
from calibration_store.names import block_of
from calibration_store.rounding_checkpoint import Layers
from calibration_store.weights import read_losses, read_quantized_block
from w4a8.backend.progress import ProgressBar
from w4a8.rounding.job_checkpoint import JobCheckpoint
from w4a8.rounding.run import RoundingRun
from w4a8.rounding.training import NotFiniteError, Training, train
from w4a8.rounding.training_samples import TrainingSamples
from w4a8.rounding.units import UnitSpec


@dataclass(frozen=True)
class Job(ABC):
    """Layers that are trained together, the samples of this training, and the files that it ends in.

    A phase of stage 3W is a subclass, one class in one file, listed in `phases.PHASES`. A subclass defines the abstract
    methods; the other ones have a default. The stage calls them in this order. `of_run` makes the phase's jobs.
    `is_finished` decides which jobs are left: it reads the block files and `losses_paths`, and asks `is_complete`.
    `bytes_written` is held against the disk's room. A dry run then times iteration `timed_from` of the training that
    `trial` gives with `few_samples`, scales the seconds by `iterations` and `iteration_cost`, takes `peak_bytes` and
    `sample_bytes` into account, and ends. A real run calls `run_job` for every job that is left (where
    `is_one_process`, each process does jobs of its own): `open`, `samples` and `training` build the training,
    `Training.step` runs `iterations` times, `Training.measure` gives the losses, and rank 0 calls `write`, after a last
    checkpoint where `saves_before_writing`.
    """

    run: RoundingRun
    spec: UnitSpec

    # identity

    @classmethod
    @abstractmethod
    def of_run(cls, run: RoundingRun) -> list["Job"]:
        """Return the jobs of this phase, in order; an empty list where the run leaves the phase out.

        The method must be cheap, since it is called more than once in a run.
        """

    @property
    def name(self) -> str:
        """The name that checkpoints, losses and the progress bar bear; unique in a run."""
        return self.spec.name

    @property
    def trained_blocks(self) -> list[str]:
        """The names of the blocks that have a layer to train."""
        blocks = set(map(block_of, self.spec.layers))
        return [block for block in self.spec.blocks if block in blocks]

    @property
    def alone(self) -> "Job":
        """The same job without other processes."""
        return replace(self, run=self.run.alone)

    @property
    def is_one_process(self) -> bool:
        """True where one process does the whole job while the others do other jobs of the same phase.

        Such jobs must come before those that all processes share.
        """
        return False

    # estimates of a dry run

    @property
    @abstractmethod
    def iterations(self) -> int:
        """The number of iterations of the whole job."""

    @property
    def trial(self) -> "Job":
        """The job whose first iterations a dry run times in place of this one's."""
        return self

    @property
    def timed_from(self) -> int:
        """The iteration that a dry run times; it must cost as much as the most expensive one."""
        return 0

    @property
    def iteration_cost(self) -> float:
        """The cost of one iteration, in iterations of a block."""
        return 1.0

    @property
    def bytes_written(self) -> int:
        """The largest number of bytes that the job takes on the disk, checkpoints included."""
        return 0

    @abstractmethod
    def peak_bytes(self) -> int:
        """Estimate the peak memory in bytes from shapes alone; return 0 where only a trial run can tell."""

    def sample_bytes(self) -> int:
        """Return the number of bytes that one cached sample takes in memory, where the training draws from a window."""
        return 0

    def check_inputs(self) -> None:  # noqa: B027  (most jobs need nothing else)
        """Raise a UserError where files that the job needs beside the cache are not there; called before any work."""

    # finished jobs

    @abstractmethod
    def losses_paths(self) -> list[Path]:
        """Return the files that hold the job's losses."""

    def is_complete(self, layers: Layers) -> bool:
        """Return whether these layers, from the job's valid files, hold everything that the job adds."""
        return True

    def is_finished(self) -> bool:
        """Return whether the job's files are on the disk, valid, of this run and of this model's layers."""
        run = self.run
        try:
            found: Layers = {}
            for block in self.trained_blocks:
                found |= read_quantized_block(run.paths, block, run.plan_on_disk)
            for path in self.losses_paths():
                losses = read_losses(path, run.plan)
                if losses["unit"] != self.name or len(losses["stages"]) != 1:
                    return False
            complete = self.is_complete(found)
        except StoreError:
            return False
        shapes = {name: run.layers[name].shape for name in self.spec.layers}
        return {name: fields["q"].shape for name, fields in found.items()} == shapes and complete

    # the work itself

    @abstractmethod
    def open(self) -> nn.Module:
        """Return the transformer with everything that the job needs of it.

        Weights that are not read yet are read when they are used.
        """

    @abstractmethod
    def samples(self, mmdit: nn.Module) -> TrainingSamples:
        """Return the samples that the job is trained on."""

    def few_samples(self, mmdit: nn.Module) -> TrainingSamples:
        """Return samples for a trial run; the call must write nothing."""
        return self.samples(mmdit)

    @abstractmethod
    def training(self, mmdit: nn.Module, samples: TrainingSamples) -> Training:
        """Return the training at its first iteration."""

    @abstractmethod
    def write(self, training: Training, losses: Mapping[str, Any], keep_alpha: bool) -> None:
        """Write the files of a finished training: every trained block's, and the losses at `losses_paths`.

        losses: as `Training.measure` gives them, with the curve; keep_alpha: block files also hold the rounding
        variables.
        """

    def saves_before_writing(self) -> bool:
        """Return whether a last checkpoint is needed because `write` changes several files one after the other."""
        return False


def run_job(
    job: Job, bar: ProgressBar, count: Callable[[], Any], checkpoint_seconds: float | None, keep_alpha: bool,
    own: bool = False,
) -> None:  # fmt: skip
    """Train a job from its checkpoint, if there is one, and let rank 0 write its files.

    count: called after every iteration; own: every process has a job of its own, and checkpoints bear the job's name.
    Raises StoreError where a loss is not finite.
    """
    run, ranks = job.run, job.run.ranks
    mmdit, checkpoint = job.open(), JobCheckpoint(run.paths, job.spec, run.plan, own)
    samples = job.samples(mmdit)
    training = job.training(mmdit, samples)
    saved = checkpoint.load()
    ranks.barrier()  # nobody writes the checkpoint before every process has read it
    if saved is not None:
        iteration, arrays = saved
        try:
            training.restore(arrays, iteration)
            bar.n += iteration
        except ValueError as error:
            checkpoint.discard(error)
    writes = partial(checkpoint.save, training)
    save = writes if ranks.rank == 0 else lambda: None
    losses = train_or_explain(job, training, bar, save, checkpoint_seconds, count)
    if job.saves_before_writing():
        save()
    if ranks.rank == 0:
        job.write(training, losses, keep_alpha)
        checkpoint.remove()
    ranks.barrier()  # the next job may read these files
    del mmdit, samples, training, writes, save
    gc.collect()  # objects that refer to themselves would stay in memory beside the next block
    mx.clear_cache()


def train_or_explain(
    job: Job, training: Training, bar: ProgressBar, save: Callable[[], None], checkpoint_seconds: float | None,
    count: Callable[[], Any],
) -> dict[str, Any]:  # fmt: skip
    """Train, and return the losses.

    Where a loss is not finite, leave the last good state on the disk and raise StoreError with the way to go on.
    """
    try:
        return train(training, bar, save, checkpoint_seconds, count)
    except NotFiniteError as error:
        save()
        if job.run.ranks.rank == 0:
            write_json(job.run.paths.plan, {**job.run.plan, "diverged": training.unit.name})
        job.run.ranks.barrier()
        raise StoreError(
            f"{training.unit.name}: {error}; the last good state, iteration {training.iteration}, is kept: "
            "--resume goes on from it, also with a lower --lr-alpha or --lr-activation-scale "
            "(Issue 25)"
        ) from None
