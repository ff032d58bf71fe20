"""Stage 3W: learn how to round the weights of every linear layer, and the clipping ranges of its inputs.

Reads   adaround_cache/ (stage 2W) and the model
Writes  adaround_weights/: {block}.npz with codes, scales, zero points and ranges, metadata.json

python optimize_adaround.py --calib-dir calibration_data/demo --iters 80 --resume

A unit (the whole model or a block) is quantized and trained against what it gave unquantized on the cached samples
(AdaRound, BRECQ, TaQ-DiT): rounding variables α (up where α >= 0), scales, zero points and biases, at the end with the
codes decided; from the middle on with quantized inputs and their ranges (LSQ). Every loss is relative: 1 is the error of
round-to-nearest on a min-max grid, in the table on the samples of the column, in the files on the training samples.
"""

from w4a8 import cli  # isort: skip  (first: it says what to do where packages are missing)

import click

from calibration_store.choices import GROUP_SIZES, INPUT_RULES, ROUNDING_METHODS, UNIT_NAMES, WEIGHT_BITS
from calibration_store.limits import MOST_ITERATIONS, MOST_SECONDS
from w4a8.options import RoundingOptions

NAMED_LIKE_THEIR_OPTION = (  # entries of the plan
    "unit", "iters", "batch_size", "weight_bits", "activation_bits", "group_size", "rounding", "qdrop", "lr_alpha", "lr_activation_scale",
    "end_to_end", "unrolled", "rest_bits", "precision", "migrate", "activation_rule", "average_bits", "seed", "micro_batch",
)  # fmt: skip
WITHOUT_AN_OPTION = {
    "selected_image_ids": "cached images", "key_timesteps": "cached steps", "bit_choices": "widths of --average-bits",
    "excluded": "--bits of 16 for", "rest": "a trained 16-bit rest of", "regularizer_weight": "a regularizer weight of", "block_inputs": "block inputs that are",
}  # fmt: skip


@cli.stage(RoundingOptions)
@cli.calib_dir_option
@cli.model_location_options
@cli.effort_option("iterations, phase by phase")
@click.option("--blocks", help="Blocks to train, such as mm0,mm5.  [default: all that are cached]")
@click.option(
    "--iters",
    type=click.IntRange(10, MOST_ITERATIONS),
    help="Iterations per unit; the last 30 % tune scales and ranges alone.  [default: by --effort]",
)
@click.option(
    "--batch-size",
    type=cli.COUNT,
    help="Cached samples per iteration.  [default: 16; small models at --effort best without --iters 64]",
)
@click.option(
    "--micro-batch",
    type=cli.COUNT,
    help="Samples of an iteration in memory at once; changes nothing but float noise.  [default: by memory]",
)
@click.option(
    "--weight-bits",
    type=click.Choice(WEIGHT_BITS),
    help="Bits of a weight's code; those that MLX runs natively.",
)
@click.option(
    "--activation-bits",
    type=click.IntRange(0, 8),
    help="Bits of a layer's input (simulated); 0: unquantized.",
)
@click.option(
    "--activation-rule",
    type=click.Choice(INPUT_RULES),
    help="How inputs are quantized while weights are trained: token: a range of its own for each token (a8-token); "
    "block: for each 32 inputs of a token, as ggml multiplies (a8-block); "
    "static: learned ranges for each cached noise level (a8-learned).",
)
@click.option(
    "--average-bits",
    metavar="AVERAGE[:WIDTHS]",
    help="Bits of a weight on average, such as 4.5 or 4.5:3,4,6: more where the model's output minds most (measured, "
    "sensitivity.json). Widths: 4,8.",
)
@click.option(
    "--bits",
    multiple=True,
    metavar="PATTERN=BITS",
    help="Bits of some layers, such as '*.mlp.fc2=8'; 16 leaves them as they are. Repeatable; the last one counts.",
)
@click.option(
    "--sensitivity-only",
    is_flag=True,
    help="Measure what the output minds (adaround_cache/sensitivity.json), and stop.",
)
@click.option(
    "--group-size",
    type=click.Choice(GROUP_SIZES),
    help="Inputs that share a scale; 0: one scale per output channel; those that MLX runs natively.",
)
@click.option(
    "--unit",
    type=click.Choice(UNIT_NAMES),
    help="What is trained for its own output.  [default: model up to 100 M weights, else block]",
)
@cli.training_options
@click.option(
    "--rounding",
    type=click.Choice(ROUNDING_METHODS),
    help="ste: hard codes, straight-through gradient; sigmoid: AdaRound's, hardened on the way.",
)
@click.option(
    "--qdrop",
    type=click.FloatRange(0, 1),
    help="Share of input elements left unquantized while ranges are trained.",
)
@click.option(
    "--lr-alpha",
    type=cli.RATE,
    help="Learning rate of the rounding variables.  [default: ste 4e-3 at 1,000 iterations, up to 8e-3 at few; sigmoid 1e-2]",
)
@click.option(
    "--lr-activation-scale",
    type=cli.RATE,
    help="Learning rate of the (log) clipping ranges.",
)
@click.option("--seed", type=cli.SEED, help="Decides the batches.")
@click.option(
    "--checkpoint-seconds",
    type=click.FloatRange(0, MOST_SECONDS),
    help="How much of a unit's work a kill may cost.  [default: 30, longer where a checkpoint takes more than 3 s to write]",
)
@click.option(
    "--alpha/--no-alpha",
    help="Keep the rounding variables in the files: 2 of 3 bytes a weight, which no later stage reads.",
)
@cli.max_bytes_option
@cli.resume_options
def main(options: RoundingOptions) -> None:
    """Stage 3W: learned rounding (AdaRound, TaQ-DiT)."""
    if options.activation_bits == 1:
        raise click.UsageError("--activation-bits 1: a symmetric grid needs 2 bits or more; 0 leaves activations alone")
    run(options)


def run(options: RoundingOptions) -> None:
    """Load the transformer, plan, check the cache, train what is left job by job, write the metadata."""
    from calibration_store.block_cache import read_cache_metadata
    from calibration_store.files import require_space
    from calibration_store.layout import BlockCachePaths
    from calibration_store.manifest import read_manifest
    from calibration_store.stage_folder import StageFolder
    from calibration_store.weights import WEIGHTS_PLAN, weight_paths
    from w4a8.backend.launched import join
    from w4a8.backend.memory import limited_memory
    from w4a8.backend.parallel import run_cpu_streams_side_by_side
    from w4a8.model.runs import run_schedule, run_transformer
    from w4a8.report.tables import print_losses
    from w4a8.rounding.bit_widths import choose_bits
    from w4a8.rounding.micro_batches import choose_micro_batch
    from w4a8.rounding.migration import finish_weights, note_migration
    from w4a8.rounding.phases import (
        bytes_written,
        estimate_rounding,
        jobs_of,
        kept_after_interrupt,
        losses_by_job,
        print_shares,
        run_jobs,
    )
    from w4a8.rounding.run import RoundingRun, what_may_change
    from w4a8.rounding.sensitivity import note_sensitivity
    from w4a8.rounding.training_samples import verified

    run_cpu_streams_side_by_side()  # before the schedule is evaluated
    calib_dir, paths = options.calib_dir, weight_paths(options.calib_dir, options.group_size, options.resume)
    cache, manifest, ranks = read_cache_metadata(calib_dir), read_manifest(calib_dir), join(calib_dir)
    schedule, _ = run_schedule(manifest)
    flags = cli.flags(
        main,
        block_names="blocks",
        **dict(zip(NAMED_LIKE_THEIR_OPTION, NAMED_LIKE_THEIR_OPTION, strict=True)),
        layer_bits="bits",  # after average_bits, from which it follows: a difference is told of what the user gave
    )
    folder = StageFolder(
        paths,
        paths.plan,
        WEIGHTS_PLAN,
        WEIGHTS_PLAN.read,
        flags | WITHOUT_AN_OPTION,
        options.resume,
        options.force,
        ranks,
    )
    with limited_memory(options.max_memory), folder.held(options.dry_run):
        opened, before = run_transformer(manifest, options.location), folder.before()
        rounding = RoundingRun.plan_run(options, opened, paths, cache, schedule, ranks, before)
        rounding = choose_micro_batch(rounding, options.micro_batch, before)
        if options.sensitivity_only:
            with cli.interruptible(lambda: "the measurement begins anew"):
                note_sensitivity(rounding, [4, 8])
            click.echo(f"wrote {BlockCachePaths(calib_dir).sensitivity}")
            return
        folder.refuse_used()
        with cli.interruptible(lambda: "the measurement begins anew"):
            rounding = choose_bits(rounding, options)
        plan, jobs = rounding.plan, jobs_of(rounding)
        click.echo(f"{manifest['model_version']}: {rounding}")
        folder.check(plan, what_may_change(before))
        todo = folder.todo(jobs, lambda job: job.is_finished())
        if options.dry_run and not todo:
            click.echo(f"nothing to do: all {len(jobs)} units are finished in {paths.root}")
            return
        if options.dry_run:
            click.echo(estimate_rounding(jobs, todo, resumed=not options.force))
            print_shares(rounding, jobs, todo)
            return
        require_space(paths.root, bytes_written(todo), "give fewer --blocks, and no --alpha", options.max_bytes)
        with cli.interruptible(lambda: kept_after_interrupt(paths)):
            with cli.progress_bar(len(cache["samples"]), "checking the cache", "sample", leave=False) as bar:
                for _ in verified(calib_dir, cache, [job.spec.blocks for job in todo], ranks):
                    ranks.advance(bar)
                ranks.complete(bar)
            folder.begin(plan, anew="diverged" in (before or {}))  # now, since --force removes an earlier run's files
            note_migration(rounding)
            with cli.progress_bar(sum(job.iterations for job in jobs), jobs[0].name, "it") as bar:
                run_jobs(jobs, todo, bar, options.checkpoint_seconds, options.alpha)
            losses = folder.finish(lambda: finish_weights(rounding))
    if losses is not None:
        print_losses(losses_by_job(jobs, losses))
    click.echo(f"wrote {paths.metadata} and a file per block")


if __name__ == "__main__":
    main()
