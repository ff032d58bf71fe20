"""Stage 3W: learn how to round the weights of every linear layer, and the clipping ranges of its inputs.

Reads   adaround_cache/ (stage 2W) and the model
Writes  adaround_weights/: {block}.npz with codes, scales, zero points and ranges, metadata.json

python optimize_adaround.py --calib-dir calibration_data/demo --iters 80 --resume

A unit (the whole model, a block, a sublayer, a layer) is quantized and trained against what it gave unquantized on the
cached samples (AdaRound, BRECQ, TaQ-DiT). First the rounding variables α: up where α >= 0. Then, with the codes
decided, scales, zero points, biases and activation ranges (LSQ) together. Every loss is relative: 1 is the error of
round-to-nearest on a min-max grid; in the table at the end on the samples of the column, in the files on the training
samples. All in float32.
"""

from dataclasses import replace
from pathlib import Path

from w4a8 import cli  # isort: skip  (first: it says what to do where packages are missing)

import click

OPTIONS = {
    "unit": "--unit", "block_names": "--blocks", "iters": "--iters", "batch_size": "--batch-size", "weight_bits": "--weight-bits",
    "activation_bits": "--activation-bits", "group_size": "--group-size", "rounding": "--rounding", "qdrop": "--qdrop",
    "lr_alpha": "--lr-alpha", "lr_activation_scale": "--lr-activation-scale", "regularizer_weight": "--regularizer-weight",
    "block_inputs": "--block-inputs", "end_to_end": "--end-to-end", "activation_rule": "--activation-rule",
    "average_bits": "--average-bits", "bit_choices": "--bit-choices", "layer_bits": "--bits", "excluded": "--exclude", "seed": "--seed", "micro_batch": "--micro-batch", "selected_image_ids": "cached images", "key_timesteps": "cached steps",
}  # fmt: skip


@cli.stage_command
@cli.calib_dir_option
@cli.model_location_options
@cli.rounding_options
@cli.max_bytes_option
@cli.resume_options
def main(**options) -> None:
    """Stage 3W: learned rounding (AdaRound, TaQ-DiT)."""
    if options["activation_bits"] == 1:
        raise click.UsageError("--activation-bits 1: a symmetric grid needs 2 bits or more; 0 leaves activations alone")
    run(**options | {key: int(options[key]) for key in ("weight_bits", "group_size")})


def run(
    calib_dir: Path, location: cli.ModelLocation, blocks: str | None, unit: str | None,
    end_to_end: int | None, micro_batch: int | None, lr_alpha: float | None, checkpoint_seconds: float, alpha: bool,
    average_bits: float | None, bit_choices: str, bits: tuple[str, ...], exclude: tuple[str, ...], sensitivity_only: bool,
    max_bytes: int | None, resume: bool, force: bool, dry_run: bool, **options,
) -> None:  # fmt: skip
    """Load the transformer, plan, check the cache, train what is left job by job, write the metadata."""
    from calibration_store.block_cache import read_cache_metadata
    from calibration_store.files import require_space
    from calibration_store.layout import BlockCachePaths, WeightPaths
    from calibration_store.manifest import read_manifest
    from calibration_store.stage_folder import StageFolder
    from calibration_store.weights import LEARNING_RATES, WEIGHTS_PLAN, write_weights_metadata
    from w4a8.backend.launched import join
    from w4a8.backend.parallel import run_cpu_streams_side_by_side
    from w4a8.model.runs import run_schedule, run_transformer
    from w4a8.report.tables import print_losses
    from w4a8.rounding.job_checkpoint import JobCheckpoint
    from w4a8.rounding.jobs import estimate, kept_after_interrupt, run_jobs, say_shares
    from w4a8.rounding.methods import METHODS
    from w4a8.rounding.micro_batches import choose_micro_batch
    from w4a8.rounding.run import RoundingRun, choose_end_to_end, choose_unit
    from w4a8.rounding.sensitivity import BitOptions, choose_bits, note_sensitivity
    from w4a8.rounding.settings import Settings
    from w4a8.rounding.training_samples import verified

    run_cpu_streams_side_by_side()  # before the schedule is evaluated
    if lr_alpha is None:
        lr_alpha = METHODS[options["rounding"]].default_lr
    cache, manifest, paths = read_cache_metadata(calib_dir), read_manifest(calib_dir), WeightPaths(calib_dir)
    ranks = join(calib_dir)
    schedule, _ = run_schedule(manifest)
    settings = Settings(lr_alpha=lr_alpha, **options)
    folder = StageFolder(paths, paths.plan, WEIGHTS_PLAN, WEIGHTS_PLAN.read, OPTIONS, resume, force, ranks)
    with folder.held(dry_run):
        opened = run_transformer(manifest, location)
        mmdit = opened()
        unit, blocks = choose_unit(mmdit, cache["block_names"], blocks, unit, settings.group_size)
        before = folder.before()
        settings = replace(settings, end_to_end=choose_end_to_end(end_to_end, unit, blocks, mmdit, settings.iters))
        rounding = RoundingRun(opened, mmdit, paths, cache, schedule, settings, unit, blocks, ranks)
        rounding = choose_micro_batch(rounding, micro_batch, before)
        if sensitivity_only:
            with cli.interruptible(lambda: "the measurement begins anew"):
                note_sensitivity(rounding, [4, 8])
            click.echo(f"wrote {BlockCachePaths(calib_dir).sensitivity}")
            return
        folder.refuse_used()
        with cli.interruptible(lambda: "the measurement begins anew"):
            rounding = choose_bits(rounding, BitOptions(average_bits, bit_choices, bits, exclude), dry_run)
        plan, jobs = rounding.plan, rounding.jobs
        click.echo(f"{manifest['model_version']}: {rounding}")
        diverged = "diverged" in (before or {})  # a run that met NaN may go on with other learning rates
        older = before is not None and "micro_batch" not in before
        folder.check(plan, may_change=(*(LEARNING_RATES if diverged else ()), *(("micro_batch",) if older else ())))
        todo = folder.todo(jobs, rounding.is_finished)
        size = rounding.bytes_of(todo)
        if dry_run and not todo:
            click.echo(f"nothing to do: all {len(jobs)} units are finished in {paths.root}")
            return
        if dry_run:
            started = None if force else JobCheckpoint(paths, todo[0], plan).load(settings)
            left = estimate(rounding, todo, started and started[0])
            click.echo(
                f"to do: {len(todo)} of {len(jobs)} units, {left.iterations} iterations: about {cli.format_seconds(left.seconds)}, "
                f"{cli.format_bytes(left.peak_bytes)} of memory at the peak, at most {cli.format_bytes(size)} in {paths.root}"
            )
            say_shares(rounding, todo)
            return
        require_space(paths.root, size, "give --no-alpha or fewer --blocks", max_bytes)
        folder.begin(plan, anew=diverged)
        with cli.interruptible(lambda: kept_after_interrupt(paths)):
            with cli.progress_bar(len(cache["samples"]), "checking the cache", "sample", leave=False) as bar:
                for _ in verified(calib_dir, cache, [job.blocks for job in todo], ranks):
                    ranks.advance(bar)
                ranks.complete(bar)
            with cli.progress_bar(sum(map(rounding.iterations, jobs)), jobs[0].name, "it") as bar:
                run_jobs(rounding, todo, bar, checkpoint_seconds, alpha)
            if rounding.walk is not None:
                rounding.walk.finish()
            losses = folder.finish(lambda: write_weights_metadata(paths, plan))
    if losses is not None:
        print_losses(rounding.rows_of(losses))
    click.echo(f"wrote {paths.metadata} and a file per block")


if __name__ == "__main__":
    main()
