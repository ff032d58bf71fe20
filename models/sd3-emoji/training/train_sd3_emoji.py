"""Make models/sd3-emoji: train a small text-to-image model with SD3's architecture from scratch on emoji.

pip install -r requirements.txt                            PyTorch and tokenizers, beside the toolkit's own packages
python train_sd3_emoji.py prepare package data             package: npm's emoji-datasource-google 16.0.0, unpacked
python train_sd3_emoji.py train data run                   about 8 minutes on one H200
python train_sd3_emoji.py bundle data run/weights.safetensors my-emoji

The modules have the names of DiffusionKit's MLX classes, so that their weights load there. Shapes: B images at once,
channels first; images (B, 3, 64, 64) within -1 … 1, latents (B, 16, 16, 16), token ids (B, 16).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from w4a8.cli import StageCommand


class CommandGroup(StageCommand, click.Group):
    """A group of subcommands whose errors are one line, like the stages'."""


def folder_argument(name: str) -> Callable:
    """Declare an argument that is a folder."""
    return click.argument(name, type=click.Path(path_type=Path, file_okay=False))


@click.group(
    cls=CommandGroup,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
def main() -> None:
    """Make a model like models/sd3-emoji: prepare the data, train, bundle the folder."""


@main.command()
@folder_argument("package")
@folder_argument("output")
def prepare(package: Path, output: Path) -> None:
    """Write OUTPUT/emoji.npz and OUTPUT/tokenizer.json from emoji and their names.

    PACKAGE is the unpacked npm package emoji-datasource-google 16.0.0.
    """
    run("prepare", package=package, output=output)


@main.command()
@folder_argument("data")
@folder_argument("output")
@click.option("--vae-seconds", type=click.FloatRange(0, min_open=True), default=100, help="Time to train the VAE.")
@click.option(
    "--transformer-seconds", type=click.FloatRange(0, min_open=True), default=360, help="Time to train the rest."
)
@click.option("--vae-steps", type=click.IntRange(1), help="Number of steps of the VAE, instead of seconds.")
@click.option("--transformer-steps", type=click.IntRange(1), help="Number of steps of the rest, instead of seconds.")
@click.option("--batch-size", type=click.IntRange(1), default=1024, help="Images in a step of the transformer.")
@click.option("--vae-batch-size", type=click.IntRange(1), default=256, help="Images in a step of the VAE.")
@click.option("--compile/--no-compile", "use_compile", default=True, help="Compile the models first.")
@click.option("--seed", type=int, default=0, help="Weights, batches and noise; with steps, a CPU gives the same bytes.")
def train(data: Path, output: Path, **options: Any) -> None:
    """Train on DATA, the output of `prepare`, and write OUTPUT/weights.safetensors.

    It uses the GPU if PyTorch sees one. The defaults are those of models/sd3-emoji.
    """
    run("train", data=data, output=output, **options)


@main.command()
@folder_argument("data")
@click.argument("weights", type=click.Path(path_type=Path, dir_okay=False))
@folder_argument("output")
def bundle(data: Path, weights: Path, output: Path) -> None:
    """Make the model folder OUTPUT of WEIGHTS, the file of `train`, and DATA, the output of `prepare`."""
    run("bundle", data=data, weights=weights, output=output)


def run(step: str, **options: Any) -> None:
    """Take a step. PyTorch is loaded here, after `--help`."""
    from steps import bundle, prepare, train

    {"prepare": prepare, "train": train, "bundle": bundle}[step](**options)


if __name__ == "__main__":
    main()
