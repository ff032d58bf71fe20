"""Stage 3A' (experimental): 4, 6 or 8 bits for every layer and step, from the same statistics as stage 3A.

Reads   activations/layer_statistics.json and activations/timestep_stats/ (stage 2A, or another tool's)
Writes  activations/quant_config_multitier.json, activations/layer_temporal_analysis_multitier.json, with --plot a map

python analyze_activations_multitier.py                                    # by the width of the range
python analyze_activations_multitier.py --policy sqnr --min-sqnr 25        # by expected noise
python analyze_activations_multitier.py --policy sqnr --average-bits 6

The threshold policy gives narrow ranges few bits. The sqnr policy computes, from each histogram, the noise that
4, 6 and 8 bits would add. What is quantized is x − shift, clipped at `clipping_range` (as in stage 3A, but for the
entry's bits). The model is not needed: NumPy only. No outlier is migrated here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli_options import analysis_options, calib_dir_option, heat_map, layer_kind, stage_command

if TYPE_CHECKING:
    import numpy as np

    from calibration_store import ActivationStatistics, LayerStatistics

TIERS = (4, 6, 8)
DEAD_SCALE = 1.0  # of a layer that saw nothing but zeros: any positive range is exact


@dataclass
class Decision:
    """The bits of one layer at one step, and why."""

    scale: float
    shift: "np.ndarray | None"  # (channels,) float32
    shifted_scale: float | None
    ranges: list[float]  # clipping range at 4, 6 and 8 bits
    sqnr: tuple[float, ...] | None  # expected dB at 4, 6 and 8 bits
    bits: int = 8
    reason: str = ""


def measure(layer: "LayerStatistics", with_sqnr: bool) -> Decision:
    """A layer's ranges at one step, and its expected SQNR at every tier. Raises ValueError without a histogram."""
    import numpy as np

    from quantizers import expected_sqnrs, unmigrated_clipping_ranges

    shift = None if layer.shift is None else np.array(layer.shift, np.float32)
    shifted_scale = None if shift is None else float(layer.reach().max()) or DEAD_SCALE
    ranges = unmigrated_clipping_ranges(layer.histogram, shift, layer.full_reach(), layer.centred_power(), TIERS)
    ranges = [float(found) or DEAD_SCALE for found in ranges]
    sqnr = None
    if with_sqnr:
        if layer.counts is None:
            raise ValueError("--policy sqnr needs hist_counts and hist_edges, which the statistics lack")
        sqnr = expected_sqnrs(layer.counts, layer.edges, ranges, TIERS, shift)
    return Decision(layer.tensor_absmax() or DEAD_SCALE, shift, shifted_scale, ranges, sqnr)


def measure_steps(statistics: "ActivationStatistics", with_sqnr: bool) -> dict[str, dict[str, Decision]]:
    """{step key: {layer: Decision}}, bits still open. Raises StoreError that names file and layer."""
    from calibration_store import StoreError

    steps = {}
    for key in statistics.step_keys:
        steps[key], seen = {}, {}
        for name, layer in statistics.read_step(key).items():
            same_input = (layer.avg_min.tobytes(), layer.avg_max.tobytes())  # q, k and v of a stream share theirs
            try:
                seen[same_input] = seen.get(same_input) or measure(layer, with_sqnr)
                steps[key][name] = replace(seen[same_input])
            except ValueError as error:
                raise StoreError(f"{statistics.timestep_dir}/step_{key}.npz: {name}: {error}") from None
    return steps


# --- policies -----------------------------------------------------------------------------------------------


def decide_by_threshold(decisions: list[Decision], plain: tuple[float, float], shifted: tuple[float, float]) -> None:
    """A4 below the first threshold, A6 below the second, A8 from there; `shifted` for post-GELU layers."""
    for decision in decisions:
        a4, a6 = plain if decision.shifted_scale is None else shifted
        what = "scale" if decision.shifted_scale is None else "shifted scale"
        value = decision.scale if decision.shifted_scale is None else decision.shifted_scale
        if value < a4:
            decision.bits, decision.reason = 4, f"{what} {value:.3g} < {a4:g}"
        elif value < a6:
            decision.bits, decision.reason = 6, f"{what} {value:.3g} < {a6:g}"
        else:
            decision.bits, decision.reason = 8, f"{what} {value:.3g} >= {a6:g}"


def decide_by_sqnr(decisions: list[Decision], min_sqnr: float) -> None:
    """The fewest bits whose expected SQNR reaches min_sqnr (dB); 8 where none does."""
    for decision in decisions:
        reaching = [bits for bits, sqnr in zip(TIERS, decision.sqnr, strict=True) if sqnr >= min_sqnr]
        decision.bits = reaching[0] if reaching else TIERS[-1]
        reached = decision.sqnr[TIERS.index(decision.bits)]
        decision.reason = f"expected SQNR {reached:.1f} dB {'>=' if reaching else '<'} {min_sqnr:g}"


def decide_by_average(decisions: list[Decision], average_bits: float) -> float:
    """The assignment with the least summed noise-to-signal ratio under a budget of bits; returns its proven gap.

    Each entry starts at 4 bits and may take steps of 2 bits (or one of 4, where its noise is not convex in the
    bits); steps are taken in order of noise saved per bit while the budget lasts. That is the optimum of the linear
    relaxation cut off at the budget, so what the cut lost bounds the distance from the optimum: 0 means exact.
    """
    noise = [[10 ** (-sqnr / 10) for sqnr in decision.sqnr] for decision in decisions]
    upgrades = []  # (noise saved per unit of 2 bits, entry, tier to take, units)
    for entry, (four, six, eight) in enumerate(noise):
        if 2 * six <= four + eight:
            upgrades += [(four - six, entry, 1, 1), (six - eight, entry, 2, 1)]
        else:
            upgrades.append(((four - eight) / 2, entry, 2, 2))
    left = int((average_bits - TIERS[0]) * len(decisions) / 2 + 1e-9)
    tiers, lost = [0] * len(decisions), 0.0
    for saved, entry, tier, units in sorted(upgrades, key=lambda upgrade: (-upgrade[0], *upgrade[1:])):
        if saved <= 0 or left == 0:
            break
        if units > left:
            lost = max(lost, saved * left)
            continue
        if tier == 2 and units == 1 and tiers[entry] != 1:
            continue
        tiers[entry] = tier
        left -= units
    for decision, tier in zip(decisions, tiers, strict=True):
        decision.bits = TIERS[tier]
        decision.reason = f"expected SQNR {decision.sqnr[tier]:.1f} dB, {average_bits:g} bits on average"
    return lost / sum(entry[tier] for entry, tier in zip(noise, tiers, strict=True))


# --- files --------------------------------------------------------------------------------------------------


def config_steps(steps: dict[str, dict[str, Decision]]) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """`per_timestep` of the config, a step at a time."""
    for key, layers in steps.items():
        entries = {}
        for name, decision in layers.items():
            entries[name] = {"bits": decision.bits, "scale": decision.scale, "reason": decision.reason}
            if decision.shift is not None:
                entries[name] |= {"shift": decision.shift, "shifted_scale": decision.shifted_scale}
            entries[name]["clipping_range"] = decision.ranges[TIERS.index(decision.bits)]
            if decision.sqnr is not None:
                entries[name]["expected_sqnr"] = decision.sqnr[TIERS.index(decision.bits)]
        yield key, entries


def temporal_analysis(steps: dict[str, dict[str, Decision]]) -> dict[str, dict[str, Any]]:
    """Per layer: how many steps have which bits, and the steps at which they change."""
    layers: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for step in steps.values() for name in step):
        bits = {key: layer[name].bits for key, layer in steps.items() if name in layer}
        keys = list(bits)
        layers[name] = {
            "steps_by_bits": {str(tier): sum(value == tier for value in bits.values()) for tier in TIERS},
            "changes_at": [after for before, after in pairwise(keys) if bits[before] != bits[after]],
            "average_bits": sum(bits.values()) / len(bits),
        }
    return layers


def summarize(steps: dict[str, dict[str, Decision]], temporal: dict[str, dict]) -> dict[str, Any]:
    """The config's `summary`: average bits, shares by kind of layer and third of the schedule, what switches."""
    rows: dict[str, list[int]] = {}
    for position, layers in enumerate(steps.values()):
        third = ("first third", "middle third", "last third")[position * 3 // len(steps)]
        for name, decision in layers.items():
            for row in ("all", third, layer_kind(name)):
                rows.setdefault(row, []).append(decision.bits)
    shares = {
        row: {"average_bits": sum(bits) / len(bits)} | {f"A{tier}": bits.count(tier) / len(bits) for tier in TIERS}
        for row, bits in rows.items()
    }
    return {
        "num_steps": len(steps),
        "num_layers": len(temporal),
        "average_bits": shares["all"]["average_bits"],
        "shares": shares,
        "switching_layers": [name for name, layer in temporal.items() if layer["changes_at"]],
        "always_8_bits": [name for name, layer in temporal.items() if layer["average_bits"] == TIERS[-1]],
    }


def print_summary(summary: dict[str, Any]) -> None:
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
            cells = " ".join(f"{share[f'A{tier}']:6.0%}" for tier in TIERS)
            click.echo(f"{row:20} {cells} {share['average_bits']:6.2f}")
    for title, names in (("switch", summary["switching_layers"]), ("always 8 bits", summary["always_8_bits"])):
        shown = ": " + ", ".join(names[:6]) + (" …" if len(names) > 6 else "") if names else ""
        click.echo(f"{title}: {len(names)} of {summary['num_layers']} layers{shown}")


def plot_bits(path: Path, steps: dict[str, dict[str, Decision]], sigmas: dict[str, float]) -> None:
    """Draw bits as a map layer × step."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    layers = [name for name in next(iter(steps.values())) if all(name in step for step in steps.values())]
    bits = {name: [step[name].bits for step in steps.values()] for name in layers}
    colours = ListedColormap(["#fde725", "#21918c", "#440154"])
    norm = BoundaryNorm([3, 5, 7, 9], colours.N)
    heat_map(
        path, bits, [sigmas[key] for key in steps], "Activation bits", "bits", norm=norm, cmap=colours, ticks=TIERS
    )


# --- the stage ----------------------------------------------------------------------------------------------


def decide(steps: dict[str, dict[str, Decision]], policy: dict[str, Any]) -> None:
    """Set bits and reason of every decision as the policy says; the policy gains what it proves."""
    decisions = [decision for layers in steps.values() for decision in layers.values()]
    if policy["policy"] == "threshold":
        plain = (policy["a4_threshold"], policy["a6_threshold"])
        decide_by_threshold(decisions, plain, (policy["shifted_a4_threshold"], policy["shifted_a6_threshold"]))
    elif "average_bits" in policy:
        policy["optimality_gap"] = decide_by_average(decisions, policy["average_bits"])
    else:
        decide_by_sqnr(decisions, policy["min_sqnr"])


def check_policy(policy: str, min_sqnr: float | None, average_bits: float | None, thresholds: dict) -> dict[str, Any]:
    """The chosen policy as the config's `thresholds`. Raises UsageError for options that contradict each other."""
    if policy == "threshold":
        if min_sqnr is not None or average_bits is not None:
            raise click.UsageError("--min-sqnr and --average-bits belong to --policy sqnr")
        for prefix in ("", "shifted_"):
            if thresholds[f"{prefix}a4_threshold"] > thresholds[f"{prefix}a6_threshold"]:
                flag = "--" + prefix.replace("_", "-")
                raise click.UsageError(f"{flag}a4-threshold is above {flag}a6-threshold")
        return {"policy": policy, **thresholds}
    if (min_sqnr is None) == (average_bits is None):
        raise click.UsageError("--policy sqnr needs one of --min-sqnr and --average-bits")
    return {"policy": policy} | ({"min_sqnr": min_sqnr} if average_bits is None else {"average_bits": average_bits})


@stage_command
@calib_dir_option
@analysis_options("quant_config_multitier.json")
@click.option("--policy", type=click.Choice(["threshold", "sqnr"]), default="threshold", help="What decides the bits.")
@click.option("--a4-threshold", type=click.FloatRange(min=0), default=6.0, help="A4 for a scale below this.")
@click.option("--a6-threshold", type=click.FloatRange(min=0), default=10.0, help="A6 for a scale below this.")
@click.option("--shifted-a4-threshold", type=click.FloatRange(min=0), default=5.0, help="A4, post-GELU layers.")
@click.option("--shifted-a6-threshold", type=click.FloatRange(min=0), default=8.0, help="A6, post-GELU layers.")
@click.option("--min-sqnr", type=float, help="sqnr: the fewest bits that reach this many dB.")
@click.option(
    "--average-bits", type=click.FloatRange(min=4, max=8), help="sqnr: the least noise at this many bits on average."
)
def main(
    calib_dir: Path,
    stats: Path | None,
    output: Path | None,
    with_plot: bool,
    policy: str,
    min_sqnr: float | None,
    average_bits: float | None,
    **thresholds: float,
) -> None:
    """Stage 3A' (experimental): A4, A6 or A8 for every layer and step."""
    from calibration_store import (
        MULTITIER_FORMAT,
        TEMPORAL_FORMAT,
        ActivationPaths,
        read_statistics,
        refuse_other_format,
        write_json,
        write_quant_config,
    )

    chosen = check_policy(policy, min_sqnr, average_bits, thresholds)
    paths = ActivationPaths(calib_dir)
    stats = stats or paths.statistics
    output = output or stats.parent / paths.multitier_config.name
    refuse_other_format(output, MULTITIER_FORMAT, "--output")
    statistics = read_statistics(stats)
    steps = measure_steps(statistics, policy == "sqnr")
    decide(steps, chosen)
    temporal = temporal_analysis(steps)
    summary = summarize(steps, temporal)
    head = {
        "format": MULTITIER_FORMAT,
        "summary": summary,
        "metadata": statistics.metadata
        | {
            "statistics": stats.name,
            "scale_meaning": "range",
            "written_with": [paths.multitier_temporal_analysis.name, *(["bit_map.png"] if with_plot else [])],
        },
        "thresholds": chosen,
        "sigma_map": statistics.sigma_map,
        "outlier_config": {},
    }
    temporal_file = output.parent / paths.multitier_temporal_analysis.name
    write_json(temporal_file, {"format": TEMPORAL_FORMAT, "sigma_map": statistics.sigma_map, "layers": temporal})
    write_quant_config(output, head, config_steps(steps))
    print_summary(summary)
    if average_bits is not None:
        gap = chosen["optimality_gap"]
        click.echo("assignment: " + ("exact optimum" if gap == 0 else f"at most {gap:.2%} above the optimum's noise"))
    written = [output, temporal_file]
    if with_plot:
        written.append(output.parent / "bit_map.png")
        plot_bits(written[-1], steps, statistics.sigma_map)
    click.echo("wrote " + ", ".join(map(str, written)))


if __name__ == "__main__":
    main()
