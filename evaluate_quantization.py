"""Stage 4: is the image still the same? The model with original and with quantized weights and activations.

Reads   the model, and what the variants name: adaround_weights/ (3W), activations/quant_config*.json (3A, 3A')
Writes  evaluation/metrics.json, grid.png, error_over_steps.png; runs/ holds images and latents of each variant

python evaluate_quantization.py --calib-dir calibration_data/demo --num-steps 20

Same prompts, same seeds; prompts that the calibration did not use. A variant is a weight part, an activation part, or
both with a plus: w4-adaround+a8. Quantized activations are simulated (quantized and dequantized in floating point):
the figures are about quality, never about speed.
"""

import contextlib
import functools

from w4a8 import cli  # isort: skip  (first: it says what to do where packages are missing)

import click

from calibration_store.choices import GRID_MAPS
from calibration_store.limits import MOST_IMAGES, MOST_THRESHOLD
from w4a8.options import EvaluationOptions


@cli.stage(EvaluationOptions)
@cli.calib_dir_option
@functools.partial(cli.model_location_options, another=True)
@cli.scale_is_option
@click.option(
    "--config",
    type=cli.FILE,
    help="Config of an analyzer, or of another tool, that the variants a8 and multitier read.  [default: that of the folder]",
)
@cli.prompts_option(".  [default: ones that the calibration did not use]")
@click.option("--num-images", type=cli.IMAGES, help="Images per variant.")
@click.option("--num-steps", type=cli.STEPS, help="Euler steps.  [default: the calibration's]")
@click.option("--cfg-weight", type=cli.GUIDANCE, help="Guidance.  [default: the calibration's]")
@click.option(
    "--seed",
    type=cli.SEED,
    help="Image i is drawn with seed + i; also orders the prompts.",
)
@click.option("--batch-size", type=cli.COUNT, help="Images in one forward pass.")
@click.option(
    "--variants",
    help="Comma-separated, of w4-rtn, w4-adaround, native, a8, multitier, products such as w4-adaround+a8 (docs/stages.md).  [default: all that have files]",
)
@click.option("--min-psnr", type=cli.DECIBELS, help="Exit with 1 when a variant's mean PSNR is below this (dB).")
@click.option(
    "--min-gain",
    type=cli.DECIBELS,
    help="Exit with 1 when a variant's mean gain over round-to-nearest, image by image, is below this (dB).",
)
@click.option(
    "--step-effects",
    type=click.IntRange(0, MOST_IMAGES),
    help="Measure with N images what an error at each step does to the finished latent; 0: do not.",
)
@click.option(
    "--max-step-error",
    type=click.FloatRange(0, MOST_THRESHOLD),
    help="Exit with 1 when a variant's mean latent error exceeds this at any step.",
)
@click.option(
    "--reference",
    type=cli.FOLDER,
    help="Folder of pictures 0000.png, 0001.png … that the variants are compared with, too; the first is of the first prompt.",
)
@click.option(
    "--output",
    type=cli.FOLDER,
    help="Folder to write to.  [default: evaluation/ below --calib-dir; with --config evaluation_NAME/]",
)
@click.option(
    "--grid-map",
    type=click.Choice(GRID_MAPS),
    help="What the grid shows beside each image: the difference times 4, or FLIP, what a viewer sees.",
)
@cli.native_option
@cli.text_group_option
@click.option("--dry-run", is_flag=True, help="Say how long it takes, how many bytes; write nothing.")
@click.option(
    "--resume",
    is_flag=True,
    help="Take over variants that an earlier call finished with the same parameters and files.",
)
@click.option("--force", is_flag=True, help="Replace an evaluation of other prompts, or of more variants.")
def main(options: EvaluationOptions) -> None:
    """Stage 4: same prompts, same seeds, original against quantized."""
    run(options)


def run(options: EvaluationOptions) -> None:
    """Read what the variants name, load, check, sample every variant, measure, draw, judge."""
    from calibration_store.evaluation import refuse_to_replace, write_metrics
    from calibration_store.files import locked_folder
    from calibration_store.layout import EvaluationPaths
    from calibration_store.manifest import read_manifest
    from w4a8.backend.launched import join
    from w4a8.evaluation.drawn_images import (
        choose_prompts,
        estimate_evaluation,
        evaluate,
        load_evaluated,
        plan_evaluation,
    )
    from w4a8.evaluation.gate import check_gate, refuse_gain_without_nearest
    from w4a8.evaluation.metrics import LOW_PSNR, add_gains, compare_with_reference, read_reference
    from w4a8.evaluation.step_effects import measured_effects, refuse_effects_without_weights
    from w4a8.evaluation.variants import default_variants, make_variant, refuse_unread_config
    from w4a8.model.layers import model_layers
    from w4a8.model.memory_needs import needs_of, refuse_too_large
    from w4a8.model.prompt_encoder import PromptEncoder, say_what_is_not_read
    from w4a8.model.prompt_files import read_prompt_file
    from w4a8.report.evaluation_figures import draw_grid, plot_errors, write_sheets
    from w4a8.report.model_card import show_measured
    from w4a8.report.tables import print_variants

    manifest = read_manifest(options.calib_dir)
    ranks = join(options.calib_dir)
    names = [name.strip() for name in (options.variants or "").split(",")]
    names = names if options.variants is not None else default_variants(options.calib_dir)
    refuse_gain_without_nearest(names, options.min_gain)
    chosen = [
        make_variant(name, options.calib_dir, options.scale_is, options.native, options.config)
        for name in dict.fromkeys(["fp", *names])
    ]
    refuse_unread_config(chosen, options.config)
    refuse_effects_without_weights(chosen, options.step_effects)
    given_prompts = read_prompt_file(options.prompt_file, note=click.echo) if options.prompt_file else None
    pipeline, info, fingerprint = load_evaluated(manifest, options.location, options.native)
    prompts, overlap = choose_prompts(manifest, info.captions, given_prompts, options.num_images, options.seed)
    if given_prompts is not None and len(given_prompts) < options.num_images:
        click.echo(f"{len(prompts)} prompts in the file: {len(prompts)} images instead of {options.num_images}.")
    elif given_prompts is not None and len(given_prompts) > options.num_images:
        click.echo(f"{options.num_images} of {len(given_prompts)} prompts used: raise --num-images for more.")
    sampling = plan_evaluation(options, manifest, info, fingerprint, pipeline.use_t5, prompts)
    own = "evaluation" if options.config is None else f"evaluation_{options.config.stem}"
    paths = EvaluationPaths(options.output or options.calib_dir / own)
    click.echo(f"{info.version}: {sampling}; {overlap} of the prompts were used in calibration")
    for sentence in say_what_is_not_read(pipeline, prompts, sampling.negative_prompt):
        click.echo(sentence)
    sides = (sampling.latent_size[0] * info.vae_downscale, sampling.latent_size[1] * info.vae_downscale)
    reference = read_reference(options.reference, len(prompts), sides) if options.reference is not None else None
    for variant in chosen:
        variant.check(manifest, fingerprint, model_layers(pipeline.mmdit))
    needs = needs_of(
        pipeline, sampling.latent_size, options.batch_size, sampling.cfg_weight > 0, sampling.num_steps + 1
    )
    refuse_too_large(pipeline, needs, options.batch_size, ("--batch-size",))
    texts = PromptEncoder(pipeline, prompts, sampling.cfg_weight, sampling.negative_prompt, options.text_group)
    if options.dry_run:
        click.echo(estimate_evaluation(pipeline, sampling, chosen, paths.root, ranks))
        ranks.print_shares([sampling.images_of(one) for one in ranks.every_rank()], "images of each variant")
        return
    if not options.force:
        refuse_to_replace(paths, prompts, sampling.num_steps, sampling.seed, names)
    paths.refuse_foreign_images([variant.name for variant in chosen], len(prompts))
    with contextlib.nullcontext() if ranks.rank else locked_folder(paths.root):
        if ranks.rank == 0:
            paths.clear_temporaries()
        with cli.interruptible(lambda: f"finished variants are kept in {paths.root}"):
            found = evaluate(pipeline, texts, sampling, paths, chosen, options.resume, ranks)
        if found is None:
            return  # rank 0 goes on
        original, images, results = found
        if reference is not None:
            compare_with_reference(reference, images, results)
        if "fp" not in names:
            del images["fp"], results["fp"]
        add_gains(results)
        effects = measured_effects(pipeline, texts, sampling, paths, chosen, options.step_effects)
        draw_grid(paths.grid, prompts, original, images, results, options.grid_map == "flip")
        plot_errors(paths.error_plot, results)
        write_sheets(paths, prompts, options.seed, original, images)
        write_metrics(paths, sampling.parameters(manifest, info, overlap, options.config), LOW_PSNR, results, effects)
    show_measured(options.calib_dir, paths)
    click.echo(f"wrote {paths.metrics}, {paths.grid}, {paths.error_plot}, {paths.images}/")
    print_variants(results, simulated=any(variant.rule is not None for variant in chosen), effects=effects)
    check_gate(results, options.min_psnr, options.max_step_error, options.min_gain)


if __name__ == "__main__":
    main()
