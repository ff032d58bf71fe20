"""Draw images from prompts with any model: the bundled one, a hub model, a folder, a quantized export.

Reads   a model (--model), and with --activations its activations.json
Writes  {index:04d}.png below --output; with --compare both models side by side, and compare.png

    python draw_images.py "red heart" --model calibration_data/demo/quantized_model --compare sd3-emoji

An exported folder computes from its packed weights. Image i is drawn with --seed + i, whatever else is drawn beside it.
"""

import secrets

from w4a8 import cli  # isort: skip  (first: it says what to do where packages are missing)

import click

from calibration_store.choices import PRECISIONS, TEXT_BITS
from calibration_store.limits import MOST_SEED
from w4a8.options import DrawingOptions


@cli.stage(DrawingOptions)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@cli.prompts_option("; after those of the command line.")
@click.option(
    "--model",
    help="sd3-emoji, a folder (an exported one, too), a hub id that DiffusionKit knows, or a checkpoint.",
)
@click.option("--compare", help="Another model to draw the same prompts and seeds with; PSNR and SSIM under each pair.")
@cli.lora_option
@click.option(
    "--seed",
    type=click.IntRange(-1, MOST_SEED),
    help="Image i is drawn with seed + i; -1 draws one and prints it.  [default: 0]",
)
@click.option("--seeds", type=cli.Seeds(), help="Draw every prompt with each of these, such as 1,2,3.")
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
    "--latent-size", type=cli.SIDE, nargs=2, metavar="H W", help="Latent height and width.  [default: the model's]"
)
@click.option("--width", type=cli.COUNT, help="Width of the images in pixels, in place of --latent-size.")
@click.option("--height", type=cli.COUNT, help="Height of the images in pixels, in place of --latent-size.")
@click.option("--batch-size", type=cli.COUNT, help="Images in one forward pass.  [default: 1]")
@click.option(
    "--t5/--no-t5", "use_t5", help="Use the T5 text encoder.  [default: the model's, of an export its calibration's]"
)
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
@click.option("--activations", is_flag=True, help="Simulate the quantized activations that the export has ranges for.")
@cli.native_option
@click.option("--output", type=cli.OUTPUT, help="Folder of the PNG files, or the name of one picture: heart.png.")
def main(options: DrawingOptions) -> None:
    """Draw prompts to PNG files, from any model."""
    run(options)


def run(options: DrawingOptions) -> None:
    """Load, check the prompts, draw with one model, then with the other, write, compare."""
    from calibration_store.files import locked_folder
    from calibration_store.layout import DrawingPaths
    from w4a8.drawing import (
        Drawing,
        compare_drawings,
        describe_compared,
        draw,
        load_model,
        plan_drawing,
        transformer_bytes,
    )
    from w4a8.model.catalog import describe_model, with_guidance, with_shift, with_text_bits
    from w4a8.model.hub_parts import describe_checkpoint
    from w4a8.model.prompt_encoder import say_what_is_not_read
    from w4a8.model.prompt_files import read_prompt_file
    from w4a8.report.drawing_sheet import draw_pairs
    from w4a8.report.tables import print_comparison, print_drawing

    wanted = [
        *options.prompts,
        *(read_prompt_file(options.prompt_file, note=click.echo) if options.prompt_file else []),
    ]
    if not wanted:
        raise click.UsageError("no prompt: give some, or --prompts FILE")
    seed = secrets.randbelow(2**32) if options.seed == -1 else options.seed or 0
    if options.seed == -1:
        click.echo(f"seed {seed}")
    infos = [
        with_text_bits(
            with_guidance(describe_model(options.model, options.loras), options.guidance), options.text_bits
        ),
        *([describe_compared(options.compare)] if options.compare is not None else []),
    ]
    infos = [with_shift(info, options.shift) for info in infos]
    plan = plan_drawing(options, infos, wanted, seed)
    paths = DrawingPaths(options.output, options.compare)
    paths.refuse_foreign_files(len(plan.prompts), options.compare is not None)
    drawings: list[Drawing] = []
    with locked_folder(paths.root), cli.interruptible(lambda: f"finished images are kept in {paths.root}", None):
        paths.clear_temporaries()
        for info in infos:
            for lora in info.loras:
                click.echo(f"with {lora.file} x {lora.scale:g}")
            for sentence in describe_checkpoint(info, info.use_t5 if plan.use_t5 is None else plan.use_t5):
                click.echo(sentence)
            pipeline, rule = load_model(info, plan, options.activations and info is infos[0])
            for sentence in say_what_is_not_read(pipeline, wanted, plan.negative_prompt):
                click.echo(sentence)
            with cli.progress_bar(len(plan.prompts), info.title, "image") as bar:
                drawings.append(draw(pipeline, info, plan, rule, paths, len(drawings) == 1, bar))
            del pipeline
            print_drawing(drawings[-1], transformer_bytes(info))
        if options.compare is not None:
            found = compare_drawings(*drawings)
            draw_pairs(paths.comparison, plan.prompts, drawings, found)
            print_comparison(plan.prompts, found)
    count = len(plan.prompts)
    wrote = str(paths.only) if paths.only else f"{count} image{'s' if count > 1 else ''} to {paths.root}"
    click.echo(f"wrote {wrote}" + (f", and {paths.comparison}" if options.compare else ""))


if __name__ == "__main__":
    main()
