"""The phases of stage 3W in their order: their jobs, how these run, and estimates of the work that is left."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from calibration_store.errors import OptionError
from calibration_store.files import remove_file
from calibration_store.layout import WeightPaths
from w4a8.backend.estimates import Estimate
from w4a8.backend.progress import ProgressBar
from w4a8.rounding.final_phase import FinalPhase
from w4a8.rounding.job_checkpoint import JobCheckpoint
from w4a8.rounding.jobs import Job, run_job
from w4a8.rounding.run import RoundingRun
from w4a8.rounding.training import NotFiniteError
from w4a8.rounding.unit_phase import UnitPhase

PHASES: tuple[type[Job], ...] = (UnitPhase, FinalPhase)


def jobs_of(run: RoundingRun) -> list[Job]:
    """Return the jobs of a run, in order."""
    return [job for phase in PHASES for job in phase.of_run(run)]


def run_jobs(
    jobs: Sequence[Job], todo: Sequence[Job], bar: ProgressBar, checkpoint_seconds: float | None, keep_alpha: bool
) -> None:
    """Train what is left, job by job.

    Processes share every job. Where a phase's jobs need nothing of each other (`Job.is_one_process`), processes share
    out the jobs instead.
    """
    run = jobs[0].run
    paths, ranks, own = run.paths, run.ranks, [job for job in jobs if job.is_one_process]
    for job in todo:
        job.check_inputs()
    if todo and ranks.rank == 0:
        remove_file(paths.metadata)  # it describes files that are about to change
    bar.n = sum(job.iterations for job in own if job not in todo)
    if own:
        bar.begin_phase(beyond_count(jobs))
    for number, job in enumerate(own):
        if job in todo and ranks.owns(number):
            bar.set_description(job.name)
            run_job(job.alone, bar, partial(ranks.advance, bar), checkpoint_seconds, keep_alpha, own=True)
    ranks.barrier()
    cost = None
    for number, job in list(enumerate(jobs))[len(own) :]:
        if job.iteration_cost != cost:
            cost = job.iteration_cost
            bar.begin_phase(beyond_count(jobs[number:]))
        bar.n = sum(one.iterations for one in jobs[:number])
        bar.set_description(job.name)
        if run.boundaries is not None and not isinstance(job, UnitPhase):
            run.boundaries.finish()  # no later job needs them
        if job in todo:
            run_job(job, bar, bar.update, checkpoint_seconds, keep_alpha)
    bar.n = sum(job.iterations for job in jobs)
    if ranks.rank == 0:
        remove_file(paths.checkpoint)  # an earlier run's: `own` jobs remove only the checkpoints that bear their names
    if run.boundaries is not None:
        run.boundaries.finish()


def beyond_count(jobs: Sequence[Job]) -> float:
    """Return the extra time of jobs whose iterations cost more than the first job's, in iterations of the first job."""
    return sum(job.iterations * (job.iteration_cost / jobs[0].iteration_cost - 1) for job in jobs)


def bytes_written(todo: Sequence[Job]) -> int:
    """Return the largest number of bytes that these jobs take on the disk, boundaries between blocks included."""
    boundaries = next((job.run.boundaries for job in todo if isinstance(job, UnitPhase)), None)
    return sum(job.bytes_written for job in todo) + (0 if boundaries is None else boundaries.num_bytes())


def losses_by_job(jobs: Sequence[Job], losses: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, losses) of every job.

    losses: as metadata.json has them, by block; the last phase's by its name.
    """
    return [(job.name, (losses.get(job.name) or losses[job.trained_blocks[0]])["stages"][0]) for job in jobs]


# --- before the work begins ---------------------------------------------------------------------------------


class NothingLearned(OptionError):
    """The first iterations diverge."""

    exit_code = 1


def estimate_rounding(jobs: Sequence[Job], todo: Sequence[Job], resumed: bool) -> Estimate:
    """Estimate the work that is left from a timed trial of the first job that is left.

    resumed: the first job goes on from its checkpoint. Raises NothingLearned when its first iterations are not finite.
    """
    mx.reset_peak_memory()
    first, at_once = todo[0], 1
    if first.is_one_process:
        first, at_once = first.alone, first.run.ranks.size
    run, settings = first.run, first.run.settings
    tried = first.trial
    mmdit = tried.open()
    samples = tried.few_samples(mmdit)
    training = tried.training(mmdit, samples)
    try:
        for _ in range(2):
            training.step()
        training.iteration = tried.timed_from
        for _ in range(2):
            start = time.perf_counter()
            training.step()
            seconds = time.perf_counter() - start
    except NotFiniteError as error:
        raise NothingLearned(f"{tried.name}: {error}: nothing can be learned with these options") from None
    left = sum(job.iterations for job in todo)
    saved = JobCheckpoint(run.paths, todo[0].spec, run.plan).load() if resumed else None
    if saved is not None:
        left -= min(saved[0], todo[0].iterations)
    costs = left + beyond_count([tried, *todo])
    peak = max(mx.get_peak_memory(), *(job.peak_bytes() for job in jobs))
    peak += settings.window * max(job.sample_bytes() for job in jobs)
    if run.boundaries is not None and any(isinstance(job, UnitPhase) for job in todo):
        peak += run.boundaries.memory_bytes()
    return Estimate(
        work=f"{len(todo)} of {len(jobs)} units, {left} iterations",
        seconds=seconds * costs / at_once,
        bytes_written=bytes_written(todo),
        folder=run.paths.root,
        peak_bytes=peak + samples.held_bytes,
    )


def print_shares(run: RoundingRun, jobs: Sequence[Job], todo: Sequence[Job]) -> None:
    """Print which share of the work each process has."""
    ranks, own = run.ranks, [job for job in jobs if job.is_one_process]
    if own:
        counts = [sum(own[number] in todo for number in one.owned_indices(len(own))) for one in ranks.every_rank()]
        ranks.print_shares(counts, "blocks")
    else:
        parts = run.settings.micro_batches(range(run.settings.batch_size))
        counts = [len(one.owned_indices(len(parts))) for one in ranks.every_rank()]
        ranks.print_shares(counts, "micro-batches of an iteration")


def kept_after_interrupt(paths: WeightPaths) -> str:
    """Return a sentence about the files that an interrupted run leaves."""
    names = [path.stem for path in paths.owned_files() if path.parent == paths.root and path.suffix == ".npz"]
    names = [name for name in names if name not in (paths.rest.stem, paths.migration.stem)]
    blocks = [name for name in names if not name.startswith("checkpoint")]
    kept = [f"finished blocks ({', '.join(blocks)})"] if blocks else []
    kept += ["a checkpoint"] if len(blocks) < len(names) else []
    return (
        f"{' and '.join(kept)} kept in {paths.root}" if kept else "nothing was finished, and no checkpoint written, yet"
    )
