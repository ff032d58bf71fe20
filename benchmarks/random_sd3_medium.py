"""Write a random-weight SD3 into a folder that huggingface_hub reads as its cache, under the real names.

No network and no licence needed: sizes, memory and speed are those of the real model, the images are noise.
The checkpoint has the original SD3 keys, so DiffusionKit's own conversion runs on it.

    python benchmarks/random_sd3_medium.py --hf-home /tmp/hf            # 4.5 GB, about a minute
    HF_HOME=/tmp/hf HF_HUB_OFFLINE=1 python generate_calibration_data.py --no-t5 --num-images 1 --dry-run
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from w4a8.cli import stage_command


@stage_command
@click.option(
    "--hf-home",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder to write; give it to HF_HOME afterwards.",
)
@click.option("--t5", is_flag=True, help="With a random T5-XXL, 9.5 GB more.")
@click.option("--outliers", is_flag=True, help="With channels as wide as the real model's.")
def main(hf_home: Path, t5: bool, outliers: bool) -> None:
    """Write a random-weight SD3-Medium into a hub cache."""
    from benchmarks.hub_cache import SD3_MEDIUM, write_hub_cache, write_t5
    from w4a8.model.diffusionkit import HUB_MMDIT_CONFIGS

    checkpoint = write_hub_cache(hf_home, HUB_MMDIT_CONFIGS[SD3_MEDIUM], outliers=outliers)
    if t5:
        write_t5(hf_home)
    click.echo(
        f"wrote {checkpoint} ({checkpoint.stat().st_size / 1e9:.2f} GB); use it with HF_HOME={hf_home} HF_HUB_OFFLINE=1"
    )


if __name__ == "__main__":
    main()
