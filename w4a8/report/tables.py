"""What the stages print at their end."""

from collections.abc import Mapping
from typing import Any

import click

from calibration_store.choices import TIER_BITS
from w4a8.analysis.w4a8_config import DEAD_SCALE
from w4a8.evaluation.gate import ONLY_IMAGES_ARE_EQUAL, only_images_are_equal


def print_w4a8_summary(summary: dict[str, Any], temporal: dict[str, dict], outlier_config: dict[str, dict]) -> None:
    """The terminal's summary: a line per finding, and the layers whose range moves most."""
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
    """The terminal's table: shares by kind of layer and by third of the schedule."""
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


def print_variants(results: dict[str, dict], simulated: bool) -> None:
    """One row a variant; simulated: whether any of them quantizes activations."""
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
            f"{labels[name]:{width}}  {cells[0]:>6} dB {interval:15} {cells[1]:>6} {cells[2]:>7} {row['share_above_40_db']:8.0%} "
            f"{row['share_below_30_db']:7.0%} {row['ssim']['mean']:7.4f} {flip:>7} {row['step_error']['mean'][-1]:13.4f}"
        )
    if simulated:
        click.echo("Quantized activations are simulated: these rows say nothing about speed.")
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
    """Errors on held-out samples relative to round-to-nearest's on these; in the files to its on the training samples."""
    nearest = row["nearest"]
    return {key: row[key] / nearest if row[key] is not None and nearest else None for key in LOSSES_SHOWN}


def print_losses(rows: list[tuple[str, dict]]) -> None:
    """The table at the end: errors on held-out samples, and on those that were trained on."""
    click.echo(
        f"{'error, round-to-nearest = 1':27} {'start':>9} {'hardened':>9} {'end':>9} {'with A8':>9} {'(training)':>11}"
    )
    for name, row in rows:
        figures = " ".join(f"{'–':>9}" if value is None else f"{value:9.3f}" for value in held_out_losses(row).values())
        kept = "  kept round-to-nearest (Issue 22)" if row["kept_nearest"] else ""
        click.echo(f"{name:27} {figures} {row['end_training']:11.3f}{kept}")
