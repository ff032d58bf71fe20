"""Stage 3A: from activation statistics to a W4A8 configuration (TaQ-DiT).

Reads   activations/layer_statistics.json and activations/timestep_stats/ (stage 2A, or another tool's)
Writes  activations/quant_config.json, activations/layer_temporal_analysis.json, with --plot three PNG figures

python analyze_activations.py --plot

Every layer gets 8 bits at every step. `scale` is its average range, for post-GELU layers `shifted_scale` that of
x − shift. Where a few channels are far wider than the others, TaQ-DiT's migration divides them by small integers m
(`outlier_config`). What is quantized is (x − shift) / m, clipped at `clipping_range`: the widest that any image had, or
less where clipping costs less than coarser steps; the integer step is a 127th of it. Migration multiplies W by m: beside
weights that were rounded without it x − shift is quantized, clipped at `unmigrated_clipping_range`. The model is not
needed: NumPy only.
"""

from w4a8 import cli  # isort: skip  (first: it says what to do where packages are missing)

import click

from calibration_store.limits import MOST_THRESHOLD
from w4a8.options import W4A8Options


@cli.stage(W4A8Options)
@cli.calib_dir_option
@cli.analysis_options("quant_config.json")
@click.option(
    "--use-hist-p999", is_flag=True, help="Clip at the 99.9th percentile instead of the average maximum; no migration."
)
@click.option(
    "--outlier-threshold",
    type=click.FloatRange(1, MOST_THRESHOLD),
    help="A channel this many times wider than the median one is an outlier.",
)
def main(options: W4A8Options) -> None:
    """Stage 3A: a W4A8 configuration from activation statistics."""
    run(options)


def run(options: W4A8Options) -> None:
    """Read the statistics, describe every layer at every step, migrate outliers, write config and analysis."""
    from calibration_store.configs import (
        W4A8_FORMAT,
        read_config,
        refuse_other_format,
        write_quant_config,
        write_temporal_analysis,
    )
    from calibration_store.files import locked_folder
    from calibration_store.layout import ActivationPaths, beside_config, clear_analysis_temporaries
    from calibration_store.statistics import read_statistics
    from w4a8 import __version__
    from w4a8.analysis.trial import estimate_analysis
    from w4a8.analysis.w4a8_config import (
        config_steps,
        describe_steps,
        figure_names,
        migrate_outliers,
        summarize_config,
        temporal_analysis,
    )
    from w4a8.report.tables import print_w4a8_summary

    paths = ActivationPaths(options.calib_dir)
    stats = options.stats or paths.statistics
    output = options.output or stats.parent / paths.quant_config.name
    refuse_other_format(output, W4A8_FORMAT, "--output")
    statistics = read_statistics(stats)
    if options.dry_run:
        left = estimate_analysis(
            statistics, output, lambda some: describe_steps(some, options.use_hist_p999)[0],
            lambda steps: config_steps(steps, {}, options.use_hist_p999),
        )  # fmt: skip
        click.echo(left)
        return
    steps, widest = describe_steps(statistics, options.use_hist_p999)
    outlier_config = {} if options.use_hist_p999 else migrate_outliers(widest, options.outlier_threshold)
    temporal = temporal_analysis(steps, statistics.sigma_map)
    summary = summarize_config(steps, temporal, outlier_config)
    figures = [beside_config(output, name) for name in figure_names(steps)] if options.with_plot else []
    temporal_file = beside_config(output, paths.temporal_analysis.name)
    metadata = statistics.metadata | {
        "statistics": stats.name,
        "scale_from": "hist_p999" if options.use_hist_p999 else "tensor_absmax",
        "scale_meaning": "range",
        "outlier_threshold": options.outlier_threshold,
        "w4a8_version": __version__,
        "written_with": [temporal_file.name, *(figure.name for figure in figures)],
    }
    head = {"format": W4A8_FORMAT, "summary": summary, "metadata": metadata, "sigma_map": statistics.sigma_map}
    with locked_folder(output.parent):
        clear_analysis_temporaries(output)
        write_temporal_analysis(temporal_file, statistics.sigma_map, temporal)
        write_quant_config(
            output,
            head | {"outlier_config": outlier_config},
            config_steps(steps, outlier_config, options.use_hist_p999),
        )
    print_w4a8_summary(summary, temporal, outlier_config)
    if options.with_plot:
        from w4a8.report.w4a8_figures import plot

        plot(figures, steps, statistics.sigma_map, read_config(output, multitier=False))
    click.echo("wrote " + ", ".join(map(str, [output, temporal_file, *figures])))


if __name__ == "__main__":
    main()
