"""Give a model folder the activations of real SD3-Medium without changing what it computes.

python tools/plant_outliers.py --model sd3-emoji --output models/planted

A small model trained for minutes has tame activations; SD3-Medium's have channels 3 to 90 times as wide as the
median one. Three rewritings of the weights plant such channels, with the ratios of tools/sd3_medium_extremes.json:
- inputs of q, k, v and of fc1: adaLN widens a channel, the weights that read it narrow it;
- inputs of o_proj: v_proj widens a channel (attention mixes tokens, never channels), o_proj narrows it;
- inputs of fc2: the three hidden channels of an MLP that matter least give way to three that cancel one another.
All factors are powers of two, so float16 holds what they make exactly. Lost are what the other channels cannot take
over of those three, and last bits of adaLN's and fc2's biases and of tiny weights, as many as float16 rounds off anyway.
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibration_store.errors import StoreError
from w4a8.cli import stage_command

CALIBRATION_STEPS = 8


@stage_command
@click.option("--model", default="sd3-emoji", help="sd3-emoji, or a folder in its layout.")
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write; new, or empty."
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Prompts, noise, and which channels.")
@click.option(
    "--strength", type=click.FloatRange(min=0), default=1.0, help="Aim at SD3-Medium's ratios to this power; 0 is none."
)
@click.option("--calibration-images", type=click.IntRange(min=1), default=32, help="To see what the channels are for.")
@click.option("--num-images", type=click.IntRange(min=1), default=8, help="To compare, of other prompts.")
@click.option("--num-steps", type=click.IntRange(min=2), default=20, help="Steps of the images to compare.")
def main(
    model: str, output: Path, seed: int, strength: float, calibration_images: int, num_images: int, num_steps: int
) -> None:
    """Write a variant of a model folder that computes the same with SD3-Medium's outlier channels.

    Prints activations before and after, and how close the images of both are, on prompts not used to calibrate.
    """
    import numpy as np
    from mlx.utils import tree_flatten

    from tools.planting import observe, plant, real_ratios, report, write_variant
    from w4a8.model.catalog import describe_model
    from w4a8.model.loading import load_pipeline, whole_model
    from w4a8.model.prompt_encoder import check_prompts
    from w4a8.model.prompts import draw_builtin_prompts

    if output.exists() and any(output.iterdir()):
        raise StoreError(f"{output} is not empty: give a new folder")
    info = describe_model(model)
    if info.folder is None:
        raise click.UsageError(f"--model {model}: give sd3-emoji or a folder in its layout")
    pipeline = load_pipeline(info, whole_model("float32"))
    prompts = draw_builtin_prompts(info.captions, seed)[: num_images + calibration_images]
    if len(prompts) < num_images + calibration_images:
        raise click.UsageError(f"{num_images} + {calibration_images} images, and only {len(prompts)} prompts")
    check_prompts(pipeline, prompts)
    calibration = (prompts[num_images:], seed, CALIBRATION_STEPS, info.cfg_weight)
    inputs, _ = observe(pipeline, *calibration, lambda x: x.astype(np.float16))
    ratios = real_ratios(list(inputs), len(pipeline.mmdit.multimodal_transformer_blocks), strength)
    weights = {name: np.array(array) for name, array in tree_flatten(pipeline.mmdit.parameters())}
    planted = plant(weights, inputs, ratios, seed)
    write_variant(info.folder, output, planted, {"of": info.folder.name, "seed": seed, "strength": strength})
    click.echo(f"wrote {output}")

    comparison = (prompts[:num_images], seed, num_steps, info.cfg_weight)
    (before, images), (after, same) = (
        observe(each, *comparison, lambda x: np.abs(x).max((0, 1))[None])
        for each in (pipeline, load_pipeline(describe_model(str(output)), whole_model("float32")))
    )
    report(before, after, ratios)
    with np.errstate(divide="ignore"):  # equal images
        psnr = 10 * np.log10(255**2 / ((images - same.astype(float)) ** 2).mean((1, 2, 3)))
    click.echo(
        f"same-seed PSNR of {num_images} images, {num_steps} steps, guidance {info.cfg_weight:g}, float32: "
        f"mean {psnr.mean():.1f} dB, lowest {psnr.min():.1f} dB"
    )


if __name__ == "__main__":
    main()
