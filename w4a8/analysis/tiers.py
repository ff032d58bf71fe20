"""Stage 3A': 4, 6 or 8 bits for every layer and step. NumPy."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from calibration_store.errors import OptionError, StoreError
from calibration_store.names import layer_kind
from calibration_store.statistics import ActivationStatistics, LayerStatistics
from w4a8.analysis.w4a8_config import DEAD_SCALE
from w4a8.quantized.ranges import expected_sqnrs, unmigrated_clipping_ranges

TIERS = (4, 6, 8)


@dataclass
class Decision:
    """The bits of one layer at one step, and why."""

    scale: float
    shift: np.ndarray | None  # (channels,) float32
    shifted_scale: float | None
    ranges: list[float]  # clipping range at 4, 6 and 8 bits
    sqnr: tuple[float, ...] | None  # expected dB at 4, 6 and 8 bits
    bits: int = 8
    reason: str = ""


def measure(layer: LayerStatistics, with_sqnr: bool) -> Decision:
    """A layer's ranges at one step, and its expected SQNR at every tier. Raises ValueError without a histogram."""
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


def measure_steps(statistics: ActivationStatistics, with_sqnr: bool) -> dict[str, dict[str, Decision]]:
    """{step key: {layer: Decision}}, bits still open. Raises StoreError that names file and layer."""
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
    """The chosen policy as the config's `thresholds`. Raises OptionError for options that contradict each other."""
    if policy == "threshold":
        if min_sqnr is not None or average_bits is not None:
            raise OptionError("--min-sqnr and --average-bits belong to --policy sqnr")
        for prefix in ("", "shifted_"):
            if thresholds[f"{prefix}a4_threshold"] > thresholds[f"{prefix}a6_threshold"]:
                flag = "--" + prefix.replace("_", "-")
                raise OptionError(f"{flag}a4-threshold is above {flag}a6-threshold")
        return {"policy": policy, **thresholds}
    if (min_sqnr is None) == (average_bits is None):
        raise OptionError("--policy sqnr needs one of --min-sqnr and --average-bits")
    return {"policy": policy} | ({"min_sqnr": min_sqnr} if average_bits is None else {"average_bits": average_bits})
