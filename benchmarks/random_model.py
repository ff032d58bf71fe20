"""Write a random-weight model into a folder that huggingface_hub reads as its cache, under the real names.

No network and no licence needed: sizes, memory and speed are those of the real model, the images are noise.
The checkpoint has the original keys, so DiffusionKit's own conversion runs on it.

    python benchmarks/random_model.py --hf-home /tmp/hf                  # SD3-Medium: 4.5 GB, about a minute
    HF_HOME=/tmp/hf HF_HUB_OFFLINE=1 python generate_calibration_data.py --no-t5 --num-images 1 --dry-run

    python benchmarks/random_model.py --hf-home /tmp/tiny --model flux-schnell --size tiny     # seconds
    HF_HOME=/tmp/tiny HF_HUB_OFFLINE=1 python benchmarks/run_stage.py --tiny generate_calibration_data.py \\
        --model argmaxinc/mlx-FLUX.1-schnell --num-images 1 --num-steps 2 --latent-size 8 8
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from w4a8.cli import format_bytes, stage_command

MODELS = {
    "sd3-medium": "argmaxinc/mlx-stable-diffusion-3-medium",
    "sd3.5-large": "argmaxinc/mlx-stable-diffusion-3.5-large",
    "flux-schnell": "argmaxinc/mlx-FLUX.1-schnell",
    "flux-dev": "argmaxinc/mlx-FLUX.1-dev",
}


@stage_command
@click.option(
    "--hf-home",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder to write; give it to HF_HOME afterwards.",
)
@click.option("--model", type=click.Choice(list(MODELS)), default="sd3-medium", help="Which model's names and sizes.")
@click.option("--size", type=click.Choice(["real", "tiny"]), default="real", help="tiny: two blocks of 128 channels.")
@click.option("--t5", is_flag=True, help="With a random T5-XXL, 9.5 GB more; FLUX always has it.")
@click.option("--outliers", is_flag=True, help="SD3: with channels as wide as the real model's.")
def main(hf_home: Path, model: str, size: str, t5: bool, outliers: bool) -> None:
    """Write a random-weight model into a hub cache."""
    from benchmarks.hub_cache import T5_TINY, T5_XXL, make_tiny, write_hub_cache, write_t5
    from w4a8.model.families import family_of

    family = family_of(MODELS[model])
    if outliers and family.name != "sd3":
        raise click.UsageError("--outliers: known of SD3 alone")
    if size == "tiny":
        make_tiny()
    checkpoint = write_hub_cache(hf_home, MODELS[model], outliers)
    if t5 or family.needs_t5:
        write_t5(hf_home, T5_TINY if size == "tiny" else T5_XXL)
    click.echo(
        f"wrote {checkpoint} ({format_bytes(checkpoint.stat().st_size)}); use it with HF_HOME={hf_home} HF_HUB_OFFLINE=1"
    )


if __name__ == "__main__":
    main()
