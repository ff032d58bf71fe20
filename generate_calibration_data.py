"""Stage 1: sample images from prompts and keep the latents of the denoising steps.

Reads   a model (--model) and prompts (a built-in list, or --prompts FILE).
Writes  manifest.json, samples/{image:04d}_{step:03d}.npz and images/{image:04d}.png below --calib-dir.

    python generate_calibration_data.py --model sd3-emoji --num-images 8
"""

from pathlib import Path

from w4a8 import cli  # isort: skip  (first: it says what to do where packages are missing)

import click

from calibration_store.choices import PRECISIONS, TEXT_BITS
from w4a8.options import GenerationOptions


@cli.stage(GenerationOptions)
@click.option(
    "--model",
    help="sd3-emoji, a folder in its layout, a hub id that DiffusionKit knows, or a checkpoint: a file, or a folder with one.  "
    "[default: argmaxinc/mlx-stable-diffusion-3-medium; under --resume the run's]",
)
@click.option(
    "--local-checkpoint",
    type=click.Path(path_type=Path, exists=True),
    help="Checkpoint of the hub model's transformer, in the original keys or those of diffusers; also as --model FILE.",
)
@cli.lora_option
@cli.prompts_option(".  [default: built-in list, drawn by --seed]")
@cli.effort_option("images")
@click.option(
    "--num-images", type=cli.IMAGES, help="Images to sample.  [default: by --effort; under --resume the run's]"
)
@click.option("--num-steps", type=cli.STEPS, help="Euler steps per image.  [default: the model's]")
@click.option("--cfg-weight", type=cli.GUIDANCE, help="Guidance; 0 or 1 turns it off.  [default: the model's]")
@click.option(
    "--guidance", type=cli.GUIDANCE, help="Guidance that FLUX.1-dev embeds; other models have none.  [default: 3.5]"
)
@click.option(
    "--shift",
    type=cli.SHIFT,
    help="Of the sampler's schedule, for fine-tunes that want another.  [default: the model's]",
)
@click.option("--negative-prompt", help="What guidance steers away from.")
@click.option(
    "--seed",
    type=cli.SEED,
    help="Image i is drawn with seed + i; also orders the built-in prompts.",
)
@click.option(
    "--latent-size", type=cli.SIDE, nargs=2, metavar="H W", help="Latent height and width.  [default: the model's]"
)
@click.option("--stride", type=cli.STEPS, help="Save every Nth step; the finished latent always.")
@click.option(
    "--batch-size",
    type=cli.COUNT,
    help="Images in one forward pass.  [default: 1; 16 where --effort chooses the images of a small model]",
)
@click.option("--t5/--no-t5", "use_t5", help="Use the T5 text encoder.  [default: the model's]")
@click.option(
    "--text-bits",
    type=click.Choice([str(bits) for bits in TEXT_BITS]),
    help="Bits of T5's linear layers, in groups of 64: T5-XXL takes 9.5 GB at 16, 5.2 GB at 8, 2.9 GB at 4.",
)
@click.option(
    "--dtype",
    type=click.Choice(PRECISIONS),
    help="Weights and activations.  [default: the model's 16 bits on Metal and CUDA (FLUX: bfloat16), float32 on a CPU]",
)
@cli.text_group_option
@click.option("--images/--no-images", "save_images", help="Decode the finished latents to PNG.")
@cli.calib_dir_option
@cli.max_bytes_option
@cli.resume_options
def main(options: GenerationOptions) -> None:
    """Stage 1: sample images and keep the latents of their denoising steps as calibration data."""
    run(options)


def run(options: GenerationOptions) -> None:
    """Plan, see what is complete, load, sample the rest; the manifest grows with every batch."""
    from calibration_store.files import require_space
    from calibration_store.layout import CalibrationPaths
    from calibration_store.manifest import MANIFEST, read_manifest, write_manifest
    from calibration_store.stage_folder import StageFolder
    from w4a8.backend.launched import join
    from w4a8.generation import estimate_generation, generate, prepare
    from w4a8.generation_plan import (
        batches_to_do,
        begun,
        bytes_to_do,
        check_same_model,
        chosen_model,
        complete_images,
        continue_run,
        finished,
        plan_run,
        refuse_foreign_pictures,
        refuse_hub_options,
        with_amount,
        with_those_of_the_run,
    )
    from w4a8.model.catalog import model_fingerprint
    from w4a8.model.hub_parts import describe_checkpoint
    from w4a8.model.loading import load_pipeline, whole_model
    from w4a8.model.prompt_encoder import say_what_is_not_read
    from w4a8.model.prompt_files import read_prompt_file
    from w4a8.model.prompts import draw_builtin_prompts
    from w4a8.report.plans import print_plan, say_how_many_prompts, warn_of_old_results

    options, ranks = with_those_of_the_run(options), join(options.calib_dir)
    given_prompts = read_prompt_file(options.prompt_file, note=click.echo) if options.prompt_file else None
    info = chosen_model(options)
    options = with_amount(options, info)
    prompts = given_prompts or draw_builtin_prompts(info.captions, options.seed)
    plan = plan_run(options, info, prompts)
    refuse_hub_options(info, plan)
    plan["weights_fingerprint"] = model_fingerprint(info, plan["use_t5"])
    say_how_many_prompts(prompts, plan["num_images"], options.prompt_file)
    paths, complete = CalibrationPaths(options.calib_dir), {}
    flags = cli.flags(
        main, activation_dtype="dtype", use_t5="use_t5", num_steps="num_steps", cfg_scale="cfg_weight", negative_prompt="negative_prompt",
        latent_size="latent_size", guidance="guidance", text_bits="text_bits", sampler_shift="shift", seed_base="seed", stride="stride", save_images="save_images",
    )  # fmt: skip
    folder = StageFolder(
        paths, paths.manifest, MANIFEST, lambda path: read_manifest(path.parent), flags, options.resume, options.force, ranks, "samples"
    )  # fmt: skip
    with folder.held(options.dry_run):
        manifest = folder.check(finished(plan))
        if manifest is not None:
            click.echo(continue_run(plan, manifest), err=True, nl=False)
            complete = complete_images(paths, plan, info)
        print_plan(plan, info, paths, complete)
        require_space(paths.root, bytes_to_do(plan, info, plan["num_images"] - len(complete)), budget=options.max_bytes)
        if manifest is not None and len(complete) == plan["num_images"]:
            click.echo(f"nothing to do: all {plan['num_images']} images are complete in {paths.root}")
            if not options.dry_run:
                folder.begin(begun(plan))
                folder.finish(
                    lambda: write_manifest(
                        paths, plan | {"weights_fingerprint": manifest["weights_fingerprint"]}, complete
                    )
                )
            return
        refuse_foreign_pictures(paths, plan, complete)
        for sentence in describe_checkpoint(info, plan["use_t5"]):
            click.echo(f"  {sentence}")
        pipeline = load_pipeline(info, whole_model(plan["activation_dtype"]), plan["use_t5"], lazy=True)
        plan["weights_fingerprint"] = model_fingerprint(info, plan["use_t5"])
        if manifest is not None:
            check_same_model(plan, manifest)
        drawn = [image["prompt"] for image in plan["images"]]
        for sentence in say_what_is_not_read(pipeline, drawn, plan["negative_prompt"]):
            click.echo(sentence)
        some = batches_to_do(plan, complete, ranks) or batches_to_do(plan, complete)[:1]
        texts, together = prepare(pipeline, plan, some[: 1 if options.dry_run else None], options.text_group)
        if options.dry_run:
            click.echo(estimate_generation(pipeline, texts, paths, plan, complete, together, ranks))
            ranks.print_shares(
                [sum(map(len, batches_to_do(plan, complete, one))) for one in ranks.every_rank()], "images"
            )
            return
        folder.begin(begun(plan))  # the manifest is the record, and grows
        if options.force:
            warn_of_old_results(paths)
        with (
            cli.interruptible(lambda: f"{len(complete)} of {plan['num_images']} images are complete in {paths.root}"),
            cli.progress_bar(plan["num_images"], "images", "image", initial=len(complete)) as bar,
        ):
            generate(pipeline, texts, paths, plan, complete, together, bar, ranks)
    click.echo(f"wrote {paths.manifest}, {paths.samples}/" + (f" and {paths.images}/" if options.save_images else ""))


if __name__ == "__main__":
    main()
