"""What export_quantized_model.py and draw_images.py print."""

from collections.abc import Mapping, Sequence

import click
import numpy as np

from calibration_store.sizes import format_bytes
from w4a8.drawing import Drawing
from w4a8.quantized.export import ExportSource, Size


def print_export(export: ExportSource, size: Size, layout: str) -> None:
    """What stage 5 writes, and how much smaller it is than float16."""
    weights = export.weights
    rest = (
        ""
        if weights.other_layers is None
        else ", all linear layers"
        if weights.other_layers.all_linears
        else ", adaLN and embedders at 8 bits"
    )
    groups = f"groups of {weights.group_size}" if weights.group_size else "a scale per output channel"
    click.echo(
        f"{export.info.version}: {export.weights_name}, {groups}{rest}; activations: {export.activations or 'not quantized'}; {layout}"
    )
    click.echo(
        f"quantized layers {format_bytes(size.quantized)}, {size.quantized / size.quantized_float16:.3f} x their float16; "
        f"transformer {format_bytes(size.transformer)}, {size.transformer / size.transformer_float16:.3f} x"
    )


def print_drawing(drawing: Drawing, size: int | None) -> None:
    """What a model took to draw; size: of its transformer's file."""
    disk = f"the transformer's file has {format_bytes(size)}" if size else "its files are not in the local cache"
    click.echo(
        f"{drawing.model}: {drawing.seconds:.2f} s an image, {format_bytes(drawing.peak_bytes)} at the peak, {disk}"
    )
    if drawing.simulated:
        click.echo(
            f"Activations are quantized in simulation ({drawing.simulated}): the seconds say nothing about such kernels."
        )


def print_comparison(prompts: Sequence[str], found: Mapping[str, np.ndarray]) -> None:
    """PSNR and SSIM of every pair."""
    for prompt, psnr, ssim in zip(prompts, found["psnr"], found["ssim"], strict=True):
        click.echo(f"{psnr:6.1f} dB  SSIM {ssim:.4f}  {prompt}")
    if len(prompts) > 1:
        click.echo(f"{np.mean(found['psnr']):6.1f} dB  SSIM {np.mean(found['ssim']):.4f}  mean")
