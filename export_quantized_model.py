"""Stage 5: the quantized model as a folder that MLX runs, small on the disk and in memory; or as a GGUF file.

Reads   the model, adaround_weights/ (3W), activations/quant_config.json (3A)
Writes  quantized_model/: config.json, mmdit.safetensors (packed), activations.json, …; or {name}-q4_1.gguf or -q5_1.gguf

    python export_quantized_model.py --calib-dir calibration_data/demo

Weights are exactly those that stage 4 measured (its variant `native` runs the folder itself). 8-bit activations are
written as ranges for runtimes that have such kernels; here they are simulated.
"""

from w4a8 import cli  # isort: skip  (first: it says what to do where packages are missing)

import click

from calibration_store.choices import EXPORT_FORMATS, REST_BITS, TEXT_BITS
from w4a8.options import ExportOptions


@cli.stage(ExportOptions)
@cli.calib_dir_option
@cli.model_location_options
@click.option("--weights", help="As in stage 4: w4-adaround, w4-rtn, w3-rtn-g32, …  [default: what stage 3W left]")
@click.option(
    "--activations",
    help="Ranges to write along, as in stage 4: a8, a8-learned, a8-token, a8-block, or none.  [default: a8 where 3A left a config, else none]",
)
@cli.scale_is_option
@click.option(
    "--format",
    "layout",
    type=click.Choice(EXPORT_FORMATS),
    help="A model folder, one file of Q4_1 or Q5_1, or FLUX's transformer/ for mflux.",
)
@click.option(
    "--rest-bits",
    type=click.Choice(REST_BITS),
    help="Of adaLN and embedders: 16 leaves them alone, 8 rounds them to nearest in groups of 64.",
)
@click.option(
    "--all-linears", is_flag=True, help="Every linear layer at 4 bits, as in DiffusionKit's 4-bit SD3.5-large."
)
@click.option(
    "--complete",
    is_flag=True,
    help="Copy a hub model's text encoders (T5 where the run used it) and VAE, too, instead of naming it in config.json.",
)
@click.option(
    "--text-bits",
    type=click.Choice([str(bits) for bits in TEXT_BITS]),
    help="Bits of the T5 that --complete copies.  [default: the run's]",
)
@click.option(
    "--output",
    type=cli.FOLDER,
    help="Folder to write to.  [default: quantized_model/ below --calib-dir]",
)
@click.option("--force", is_flag=True, help="Make an export anew: delete what this stage wrote to the folder.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, how large, how long it takes; write nothing.")
def main(options: ExportOptions) -> None:
    """Stage 5: write the quantized model to the disk."""
    run(options)


def run(options: ExportOptions) -> None:
    """Find what is exported, check it, pack the transformer a layer at a time, write the folder."""
    from calibration_store.files import locked_folder, require_space
    from calibration_store.layout import HUB_4BIT_FILES, QuantizedModelPaths
    from calibration_store.manifest import read_manifest
    from w4a8.evaluation.variants import export_variant
    from w4a8.model.catalog import with_text_bits
    from w4a8.model.hub_export import own_parts
    from w4a8.model.layers import model_layers
    from w4a8.model.runs import check_fingerprint, describe_run_model
    from w4a8.model.transformer import open_transformer
    from w4a8.quantized.export import (
        ExportSource,
        bytes_needed,
        check_output,
        estimate_export,
        pack_transformer,
        packed_size,
        refuse_options,
        rest_of_model,
        write_folder,
    )
    from w4a8.quantized.gguf_file import misread_elsewhere, write_gguf
    from w4a8.quantized.mflux_layout import write_mflux
    from w4a8.report.model_card import write_model_card
    from w4a8.report.tables import print_export

    if (
        options.output is not None
        and options.output.suffix in (".gguf", ".safetensors")
        and not options.output.is_dir()
    ):
        raise click.UsageError(
            f"--output {options.output}: a folder is needed; the file in it is named after the model"
        )
    manifest = read_manifest(options.calib_dir)
    variant, weights, activations = export_variant(options)
    info = describe_run_model(manifest, options.location)
    check_fingerprint(manifest, info)
    if options.text_bits is not None:
        info = with_text_bits(info, options.text_bits)
    export = ExportSource(info, manifest, variant.name, weights, activations, variant.rule)
    refuse_options(export, options.layout, options.complete, options.text_bits)
    paths = QuantizedModelPaths(options.output) if options.output else QuantizedModelPaths.below(options.calib_dir)
    check_output(paths, info, options.layout, options.force or options.dry_run)
    mmdit = open_transformer(info)
    variant.check(manifest, manifest["weights_fingerprint"], model_layers(mmdit))
    size = packed_size(mmdit, weights)
    print_export(export, size, options.layout, own_parts(info))
    misread = misread_elsewhere(mmdit, info.family) if options.layout == "gguf" else None
    if misread:
        click.echo(misread)
    if options.dry_run:
        click.echo(estimate_export(mmdit, weights, size, paths.root))
        return
    rest = rest_of_model(export, options.complete) if options.layout == "mlx" else ({}, [], {})
    remedy = "give another --output"
    if paths.config.exists():
        remedy += " (the old export stays until the new one is complete)"
    with (
        locked_folder(paths.root),
        cli.interruptible(
            lambda: f"the export in {paths.root} is " + ("whole" if paths.config.exists() else "not finished"),
            "--force",
        ),
        cli.progress_bar(size.modules, "packing", "layer") as bar,
    ):
        paths.clear_temporaries()
        hub_file = options.layout == "mlx" and options.all_linears and info.version in HUB_4BIT_FILES
        require_space(paths.root, bytes_needed(export, size, rest, hub_file), remedy)
        if options.layout == "gguf":
            written = write_gguf(paths, export, mmdit, bar)
        elif options.layout == "mflux":
            written = write_mflux(paths, export, mmdit, bar)
        else:
            quantization = pack_transformer(mmdit, weights, bar)
            with cli.finishing("writing"):
                written = write_folder(paths, export, mmdit, quantization, rest, hub_file)
        card = write_model_card(paths, export, size, options.calib_dir, options.layout, written)
    click.echo(f"wrote {written}" + ("" if card is None else f", {card.name}"))
    if options.layout == "mlx":
        click.echo(f"draw with it: {cli.interpreter()} draw_images.py --model {paths.root} PROMPT")


if __name__ == "__main__":
    main()
