"""Tables and lines that the stages print when they know their results.

Stages 3A and 3A' print their summaries without MLX, so types that come with MLX are imported for annotations alone.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from calibration_store.choices import TIER_BITS
from calibration_store.sizes import format_bytes
from w4a8.analysis.w4a8_config import DEAD_SCALE
from w4a8.evaluation.gate import KEPT_EFFECT, ONLY_IMAGES_ARE_EQUAL, only_images_are_equal
from w4a8.evaluation.paired import gain_words

if TYPE_CHECKING:
    from w4a8.drawing import Drawing
    from w4a8.quantized.export import ExportSource, Size


def print_w4a8_summary(summary: dict[str, Any], temporal: dict[str, dict], outlier_config: dict[str, dict]) -> None:
    """Print the summary of stage 3A: a line for each finding, and the layers whose range moves most.

    summary, temporal and outlier_config: the results of `summarize_config`, `temporal_analysis` and `migrate_outliers`.
    """
    scale, widest = summary["scale"], summary["widest_layer"]
    click.echo(
        f"{summary['num_layers']} layers × {summary['num_steps']} steps, 8 bits (simulated: MLX has no A8 kernel)"
    )
    click.echo(
        f"range     median {scale['median']:.3g}, from {scale['min']:.3g} to {scale['max']:.3g} "
        f"({widest} at sigma {temporal[widest]['widest_sigmas'][0]:.2f}); before shift and migration"
    )
    if summary["num_shifted_layers"]:
        click.echo(
            f"shift     {summary['num_shifted_layers']} post-GELU layers; it makes their range "
            f"{summary['median_shifted_over_plain_scale']:.2f} × as wide (median)"
        )
    click.echo(
        f"outliers  {summary['num_outlier_channels']} channels in {summary['num_outlier_layers']} layers"
        + (
            "".join(
                f", {name} divided by {max(outlier_config[name]['multiplier_vector'])}"
                for name in list(outlier_config)[:3]
            )
        )
    )
    if summary["num_dead_layers"]:
        click.echo(f"dead      {summary['num_dead_layers']} layers saw only zeros; their range is set to {DEAD_SCALE}")
    click.echo("range that moves most along the schedule:")
    moving = sorted(temporal, key=lambda name: temporal[name]["scale"]["min"] / temporal[name]["scale"]["max"])[:5]
    for name in moving:
        layer = temporal[name]
        click.echo(
            f"  {name:24} {layer['scale']['min']:8.3g} – {layer['scale']['max']:<8.3g} "
            f"widest at sigma {layer['widest_sigmas'][0]:.2f}"
        )


def print_tier_summary(summary: dict[str, Any]) -> None:
    """Print the table of stage 3A': the shares of 4, 6 and 8 bits by kind of layer and by third of the schedule."""
    click.echo(
        f"{summary['num_layers']} layers × {summary['num_steps']} steps, {summary['average_bits']:.2f} bits on average "
        "(experimental; simulated: MLX has no such kernel)"
    )
    click.echo(f"{'':20} {'A4':>6} {'A6':>6} {'A8':>6}   bits")
    kinds = sorted(row for row in summary["shares"] if "." in row)
    for row in ("all", "first third", "middle third", "last third", *kinds):
        if row in summary["shares"]:
            share = summary["shares"][row]
            cells = " ".join(f"{share[f'A{tier}']:6.0%}" for tier in TIER_BITS)
            click.echo(f"{row:20} {cells} {share['average_bits']:6.2f}")
    for title, names in (("switch", summary["switching_layers"]), ("always 8 bits", summary["always_8_bits"])):
        shown = ": " + ", ".join(names[:6]) + (" …" if len(names) > 6 else "") if names else ""
        click.echo(f"{title}: {len(names)} of {summary['num_layers']} layers{shown}")


def print_step_effects(effects: Mapping[str, Any]) -> None:
    """Print what an error at each step does, a column a step."""
    images = f"{effects['images']} image{'s' * (effects['images'] > 1)}"
    click.echo(
        f"{effects['variant']} at one step alone ({images}): sigma, error of the velocity, finished latent moves by"
    )
    for row in effects["steps"]:
        click.echo(
            f"  step {row['step']:3}  {row['sigma']:5.3f}  {row['velocity_error']:6.3f}  {row['moves']:7.4f}  "
            f"({row['left']:.2f} of what was put in)"
        )


def print_variants(results: dict[str, dict], simulated: bool, effects: Mapping[str, Any] | None = None) -> None:
    """Print the table of stage 4, a row for each variant, and the worst image of each.

    results: {variant: its entry in metrics.json}; simulated: whether any variant quantizes activations; effects: what an
    error at each step does, where it was measured.
    """
    if effects is not None:
        print_step_effects(effects)
    labels = {name: f"{name} (experimental)" if "multitier" in name.split("+") else name for name in results}
    width = max(map(len, labels.values()))
    click.echo(f"{'':{width}}  PSNR mean (95 %)       median   worst  >=40 dB  <30 dB    SSIM    FLIP  latent error")
    for name, row in results.items():
        psnr, (low, high) = row["psnr"], row["psnr"]["interval"]
        interval = f"({low:.1f} – {high:.1f})" if low is not None else ""
        cells = [
            f"{value:.1f}" if value is not None else "inf" for value in (psnr["mean"], psnr["median"], psnr["worst"])
        ]
        flip = "–" if row["flip"]["mean"] is None else f"{row['flip']['mean']:.4f}"
        click.echo(
            f"{labels[name]:{width}}  {cells[0]:>6} dB {interval:15} {cells[1]:>6} {cells[2]:>7} "
            f"{row['share_above_40_db']:8.0%} {row['share_below_30_db']:7.0%} {row['ssim']['mean']:7.4f} {flip:>7} "
            f"{row['step_error']['mean'][-1]:13.4f}"
        )
    for name, row in results.items():
        if "gain" in row:
            click.echo(f"{name}: {gain_words(row['gain'])}")
    for name, row in results.items():
        if "lpips" in row:
            click.echo(f"{name}: LPIPS {row['lpips']['mean']:.4f} (worst {row['lpips']['worst']:.4f})")
    if simulated:
        click.echo("Quantized activations are simulated: these rows say nothing about speed.")
    for name, row in results.items():
        if "reference" in row:
            psnr, ssim = (row["reference"][key] for key in ("psnr", "ssim"))
            mean = "equal" if psnr["mean"] is None else f"{psnr['mean']:.1f} dB (worst {psnr['worst']:.1f})"
            click.echo(f"{name} against --reference: {mean}, SSIM {ssim['mean']:.4f}")
        kept = row.get("lora_effect")
        if kept is not None:
            click.echo(f"{name}: the LoRA's effect before and after has cosine {kept:.2f}")
            if kept < KEPT_EFFECT:
                click.echo(
                    f"{name}: below {KEPT_EFFECT:g}, rounding drowns the LoRA's effect; learn the rounding, take more bits, "
                    "or a larger scale (--lora FILE:1.5)"
                )
    for name, row in results.items():
        worst = row["worst_prompts"][0]
        if only_images_are_equal(row):
            click.echo(f"{name}: {ONLY_IMAGES_ARE_EQUAL}")
        elif worst["psnr"] is not None:
            click.echo(
                f"worst image of {name}: {worst['psnr']:.1f} dB, image {row['worst_image']}, {worst['prompt']!r}"
            )


LOSSES_SHOWN = ("start", "hardened", "end", "end_activations")


def held_out_losses(row: Mapping[str, Any]) -> dict[str, float | None]:
    """Return a unit's errors on held-out samples, relative to the error of round-to-nearest on the same samples.

    row: a unit's losses in metadata.json, which are relative to round-to-nearest on the training samples. An error that
    is not there is None.
    """
    nearest = row["nearest"]
    return {key: row[key] / nearest if row[key] is not None and nearest else None for key in LOSSES_SHOWN}


def print_losses(rows: list[tuple[str, dict]]) -> None:
    """Print the table of stage 3W: the errors of every unit on held-out samples, and its last one on training samples.

    rows: (name, losses in metadata.json) of each unit.
    """
    click.echo(
        f"{'error, round-to-nearest = 1':27} {'start':>9} {'hardened':>9} {'end':>9} {'with A8':>9} {'(training)':>11}"
    )
    for name, row in rows:
        figures = " ".join(f"{'–':>9}" if value is None else f"{value:9.3f}" for value in held_out_losses(row).values())
        kept = "  kept round-to-nearest (Issue 22)" if row["kept_nearest"] else ""
        kept = "  not kept: held-out samples do not gain (Issue 33)" if row.get("kept_start") else kept
        click.echo(f"{name:27} {figures} {row['end_training']:11.3f}{kept}")


def print_export(export: "ExportSource", size: "Size", layout: str, own: Collection[str]) -> None:
    """Print what stage 5 writes, and its size relative to float16. own: the parts that are not the hub's, by name."""
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
        f"{export.info.version}: {export.weights_name}, {groups}{rest}; "
        f"activations: {export.activations or 'not quantized'}; {layout}"
    )
    click.echo(
        f"quantized layers {format_bytes(size.quantized)}, "
        f"{size.quantized / size.quantized_float16:.3f} x their float16; "
        f"transformer {format_bytes(size.transformer)}, {size.transformer / size.transformer_float16:.3f} x"
    )
    left_out = sorted(own) if layout != "mlx" else [name for name in own if name == "t5"]
    if left_out:
        click.echo(
            f"not in the export: {', '.join(left_out)}, which the checkpoint or a LoRA changes; "
            "other programs need them beside it"
        )


def print_drawing(drawing: "Drawing", size: int | None) -> None:
    """Print the time and memory that a model took to draw. size: bytes of the transformer's file; None: not here."""
    disk = f"the transformer's file has {format_bytes(size)}" if size else "its files are not in the local cache"
    click.echo(
        f"{drawing.model}: {drawing.seconds:.2f} s an image, {format_bytes(drawing.peak_bytes)} at the peak, {disk}"
    )
    if drawing.simulated:
        click.echo(
            f"Activations are quantized in simulation ({drawing.simulated}): "
            "the seconds say nothing about such kernels."
        )


def print_comparison(prompts: Sequence[str], found: Mapping[str, np.ndarray]) -> None:
    """Print PSNR and SSIM of every pair of images, and their means. found: the result of `compare_drawings`."""
    for prompt, psnr, ssim in zip(prompts, found["psnr"], found["ssim"], strict=True):
        click.echo(f"{psnr:6.1f} dB  SSIM {ssim:.4f}  {prompt}")
    if len(prompts) > 1:
        click.echo(f"{np.mean(found['psnr']):6.1f} dB  SSIM {np.mean(found['ssim']):.4f}  mean")
