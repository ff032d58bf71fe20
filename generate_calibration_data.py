"""Stage 1: sample images from prompts and keep the latents of the denoising steps.

Reads   a model (--model) and prompts (a built-in list, or --prompts FILE).
Writes  manifest.json, samples/{image:04d}_{step:03d}.npz and images/{image:04d}.png below --calib-dir.

    python generate_calibration_data.py --model sd3-emoji --num-images 8
"""

from pathlib import Path

from w4a8 import cli  # isort: skip  (first: it says what to do where packages are missing)

import click

DEFAULT_MODEL = "argmaxinc/mlx-stable-diffusion-3-medium"


@cli.stage_command
@click.option(
    "--model",
    help=f"sd3-emoji, a folder in its layout, or a hub id that DiffusionKit knows.  [default: {DEFAULT_MODEL}; under --resume the run's]",
)
@click.option(
    "--local-checkpoint",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Safetensors file with a hub model's transformer, in the original keys (SD3: and its VAE).",
)
@cli.lora_option
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text file, one prompt a line, or CSV or TSV with a column 'prompt' or 'caption'.  [default: built-in list, drawn by --seed]",
)
@click.option("--num-images", type=cli.IMAGES, default=10, help="Images to sample.")
@click.option("--num-steps", type=cli.STEPS, help="Euler steps per image.  [default: 50; FLUX.1-schnell 4]")
@click.option("--cfg-weight", type=cli.GUIDANCE, help="Guidance; 0 turns it off.  [default: the model's]")
@click.option("--negative-prompt", default="", help="What guidance steers away from.")
@click.option(
    "--seed",
    type=cli.SEED,
    default=42,
    help="Image i is drawn with seed + i; also orders the built-in prompts.",
)
@click.option(
    "--latent-size", type=cli.SIDE, nargs=2, metavar="H W", help="Latent height and width.  [default: the model's]"
)
@click.option(
    "--stride", type=cli.STEPS, default=1, help="Save every Nth step; the finished latent always."
)
@click.option("--batch-size", type=cli.COUNT, default=1, help="Images in one forward pass.")
@click.option("--t5/--no-t5", "use_t5", default=None, help="Use the T5 text encoder.  [default: the model's]")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Weights and activations.  [default: the model's 16 bits on Metal and CUDA (FLUX: bfloat16), float32 on a CPU]",
)
@cli.text_group_option
@click.option("--images/--no-images", "save_images", default=True, help="Decode the finished latents to PNG.")
@cli.calib_dir_option
@cli.max_bytes_option
@cli.resume_options
def main(**options) -> None:
    """Stage 1: sample images and keep the latents of their denoising steps as calibration data."""
    run(**options)


def run(
    model: str, local_checkpoint: Path | None, loras: tuple, prompt_file: Path | None, num_images: int, num_steps: int | None,
    cfg_weight: float | None, negative_prompt: str, seed: int, latent_size: tuple[int, int] | None, stride: int,
    batch_size: int, use_t5: bool | None, dtype: str | None, save_images: bool, calib_dir: Path,
    text_group: int | None, max_bytes: int | None, resume: bool, force: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Plan, see what is complete, load, sample the rest; the manifest grows with every batch."""
    import mlx.core as mx

    from calibration_store.files import require_space
    from calibration_store.layout import CalibrationPaths
    from calibration_store.manifest import MANIFEST, read_manifest, write_manifest
    from calibration_store.stage_folder import StageFolder
    from w4a8.backend.launched import join
    from w4a8.generation import (
        RUN_OPTIONS,
        batches_to_do,
        begun,
        check_same_model,
        complete_images,
        continue_run,
        finished,
        generate,
        model_of_run,
        plan_run,
        prepare,
        probe_seconds,
        refuse_foreign_pictures,
        refuse_hub_options,
    )
    from w4a8.model.catalog import describe_model, model_fingerprint
    from w4a8.model.loading import load_pipeline, whole_model
    from w4a8.model.prompt_encoder import check_prompts
    from w4a8.model.prompts import draw_builtin_prompts, read_prompt_file
    from w4a8.report.plans import print_plan, say_how_many_prompts, warn_of_old_results

    ranks = join(calib_dir)
    given_prompts = read_prompt_file(prompt_file) if prompt_file else None
    if model is None:
        model = (model_of_run(calib_dir) if resume else None) or DEFAULT_MODEL
    info = describe_model(model, loras)
    prompts = given_prompts or draw_builtin_prompts(info.captions, seed)
    plan = plan_run(
        info, prompts, num_images, num_steps, cfg_weight, negative_prompt, seed, latent_size, stride, batch_size,
        use_t5, dtype, local_checkpoint, save_images,
    )  # fmt: skip
    refuse_hub_options(info, plan)
    plan["weights_fingerprint"] = model_fingerprint(info, plan["use_t5"], local_checkpoint)
    say_how_many_prompts(prompts, num_images, prompt_file)
    paths, complete = CalibrationPaths(calib_dir), {}
    folder = StageFolder(
        paths, paths.manifest, MANIFEST, lambda path: read_manifest(path.parent), RUN_OPTIONS, resume, force, ranks, "samples"
    )
    with folder.held(dry_run):
        manifest = folder.check(finished(plan))
        if manifest is not None:
            warning = continue_run(plan, manifest)
            if warning:
                click.echo(warning, err=True)
            complete = complete_images(paths, plan, info)
        require_space(paths.root, print_plan(plan, info, paths, complete), budget=max_bytes)
        if len(complete) == num_images:
            click.echo(f"nothing to do: all {num_images} images are complete in {paths.root}")
            if not dry_run:
                folder.begin(begun(plan))
            if not dry_run and ranks.rank == 0:
                write_manifest(paths, plan | {"weights_fingerprint": manifest["weights_fingerprint"]}, complete)
            return
        refuse_foreign_pictures(paths, plan, complete)
        parts = whole_model(plan["activation_dtype"])
        pipeline = load_pipeline(info, parts, plan["use_t5"], local_checkpoint, lazy=True)
        plan["weights_fingerprint"] = model_fingerprint(info, plan["use_t5"], local_checkpoint)
        if manifest is not None:
            check_same_model(plan, manifest)
        cut = check_prompts(pipeline, [image["prompt"] for image in plan["images"]])
        if cut:
            click.echo(f"{cut} prompts are longer than the text encoder's positions: their ends are ignored.")
        if check_prompts(pipeline, [negative_prompt], "--negative-prompt"):
            click.echo("The negative prompt is longer than the text encoder's positions: its end is ignored.")
        batches = batches_to_do(plan, complete, ranks)
        some = batches or batches_to_do(plan, complete)[:1]
        texts, together = prepare(pipeline, plan, some[: 1 if dry_run else None], text_group)
        if dry_run:
            seconds = probe_seconds(pipeline, texts, plan, batches, together)
            click.echo(
                f"time: about {cli.format_seconds(seconds)} on this machine, "
                f"{cli.format_bytes(mx.get_peak_memory())} of memory at the peak"
            )
            ranks.print_shares([sum(map(len, batches_to_do(plan, complete, one))) for one in ranks.every_rank()], "images")
            return
        folder.begin(begun(plan))  # the manifest is the record, and grows
        if force:
            warn_of_old_results(paths)
        with (
            cli.interruptible(lambda: f"{len(complete)} of {num_images} images are complete in {paths.root}"),
            cli.progress_bar(num_images, "images", "image", initial=len(complete)) as bar,
        ):
            generate(pipeline, texts, paths, plan, complete, together, bar, ranks)
    click.echo(f"wrote {paths.manifest}, {paths.samples}/" + (f" and {paths.images}/" if save_images else ""))


if __name__ == "__main__":
    main()
