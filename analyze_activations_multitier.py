"""Stage 3A' (experimental): 4, 6 or 8 bits for every layer and step, from the same statistics as stage 3A.

Reads   activations/layer_statistics.json and activations/timestep_stats/ (stage 2A, or another tool's)
Writes  activations/quant_config_multitier.json, activations/layer_temporal_analysis_multitier.json, with --plot a map

python analyze_activations_multitier.py                                    # by the width of the range
python analyze_activations_multitier.py --policy sqnr --min-sqnr 25        # by expected noise
python analyze_activations_multitier.py --policy sqnr --average-bits 6
python analyze_activations_multitier.py --policy sensitivity --average-bits 6   # by what the model's output minds

The threshold policy gives narrow ranges few bits. The sqnr policy computes, from each histogram, the noise that
4, 6 and 8 bits would add. The sensitivity policy weighs that noise with what stage 3W measured of the model's output
(adaround_cache/sensitivity.json). What is quantized is x − shift, clipped at `clipping_range` (as in stage 3A, but for the
entry's bits). The model is not needed: NumPy only. No outlier is migrated here.
"""

from w4a8 import cli  # isort: skip  (first: it says what to do where packages are missing)

import click

from calibration_store.choices import TIER_POLICIES
from calibration_store.limits import MOST_THRESHOLD
from w4a8.options import TierOptions


@cli.stage(TierOptions)
@cli.calib_dir_option
@cli.analysis_options("quant_config_multitier.json")
@click.option(
    "--policy",
    type=click.Choice(TIER_POLICIES),
    help="What decides the bits.",
)
@click.option("--a4-threshold", type=click.FloatRange(0, MOST_THRESHOLD), help="A4 for a scale below this.")
@click.option("--a6-threshold", type=click.FloatRange(0, MOST_THRESHOLD), help="A6 for a scale below this.")
@click.option("--shifted-a4-threshold", type=click.FloatRange(0, MOST_THRESHOLD), help="A4, post-GELU layers.")
@click.option("--shifted-a6-threshold", type=click.FloatRange(0, MOST_THRESHOLD), help="A6, post-GELU layers.")
@click.option("--min-sqnr", type=cli.DECIBELS, help="sqnr: the fewest bits that reach this many dB.")
@click.option(
    "--average-bits",
    type=click.FloatRange(min=4, max=8),
    help="sqnr, sensitivity: the least noise, or the least harm, at this many bits on average.",
)
def main(options: TierOptions) -> None:
    """Stage 3A' (experimental): A4, A6 or A8 for every layer and step."""
    run(options)


def run(options: TierOptions) -> None:
    """Read the statistics, measure what every bit-width costs, decide, write config and analysis."""
    from calibration_store.configs import (
        MULTITIER_FORMAT,
        refuse_other_format,
        write_quant_config,
        write_temporal_analysis,
    )
    from calibration_store.files import locked_folder
    from calibration_store.layout import ActivationPaths, beside_config, clear_analysis_temporaries
    from calibration_store.sensitivity import read_sensitivity
    from calibration_store.statistics import ActivationStatistics, read_statistics
    from w4a8 import __version__
    from w4a8.analysis.tiers import (
        check_policy,
        decide,
        measure_steps,
        summarize_tiers,
        tier_config_steps,
        tier_temporal_analysis,
    )
    from w4a8.analysis.trial import estimate_analysis
    from w4a8.report.tables import print_tier_summary

    chosen = check_policy(options)
    paths = ActivationPaths(options.calib_dir)
    stats = options.stats or paths.statistics
    output = options.output or stats.parent / paths.multitier_config.name
    refuse_other_format(output, MULTITIER_FORMAT, "--output")
    statistics = read_statistics(stats)
    sensitivity = read_sensitivity(options.calib_dir) if options.policy == "sensitivity" else None

    def decided(statistics: ActivationStatistics) -> dict:
        steps = measure_steps(statistics, options.policy != "threshold")
        decide(steps, chosen, statistics.sigma_map, sensitivity)
        return steps

    if options.dry_run:
        click.echo(estimate_analysis(statistics, output, decided, tier_config_steps))
        return
    steps = decided(statistics)
    temporal = tier_temporal_analysis(steps)
    summary = summarize_tiers(steps, temporal)
    written = [output, beside_config(output, paths.multitier_temporal_analysis.name)]
    written += [beside_config(output, "bit_map.png")] if options.with_plot else []
    head = {
        "format": MULTITIER_FORMAT,
        "summary": summary,
        "metadata": statistics.metadata
        | {"statistics": stats.name, "scale_meaning": "range", "w4a8_version": __version__}
        | {"written_with": [path.name for path in written[1:]]},
        "thresholds": chosen,
        "sigma_map": statistics.sigma_map,
        "outlier_config": {},
    }
    with locked_folder(output.parent):
        clear_analysis_temporaries(output)
        write_temporal_analysis(written[1], statistics.sigma_map, temporal)
        write_quant_config(output, head, tier_config_steps(steps))
    print_tier_summary(summary)
    if options.average_bits is not None:
        gap = chosen["optimality_gap"]
        click.echo("assignment: " + ("exact optimum" if gap == 0 else f"at most {gap:.2%} above the optimum's noise"))
    if options.with_plot:
        from w4a8.report.tier_figures import plot_bits

        plot_bits(written[2], steps, statistics.sigma_map)
    click.echo("wrote " + ", ".join(map(str, written)))


if __name__ == "__main__":
    main()
