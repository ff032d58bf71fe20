"""Stage 3A': choose 4, 6 or 8 bits for every layer and step. NumPy."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from calibration_store.choices import TIER_BITS
from calibration_store.errors import OptionError, StoreError
from calibration_store.names import layer_kind
from calibration_store.sensitivity import input_gain
from calibration_store.statistics import ActivationStatistics, LayerStatistics
from w4a8.analysis.bit_allocation import allocate
from w4a8.analysis.clipping_ranges import expected_sqnrs, mean_square, unmigrated_clipping_ranges
from w4a8.analysis.steps import each_step
from w4a8.analysis.w4a8_config import DEAD_SCALE
from w4a8.options import TierOptions


@dataclass
class Decision:
    """The ranges and the bits of one layer at one step, and the reason for the bits."""

    scale: float  # range of x
    shift: np.ndarray | None  # (channels,) float32, post-GELU layers
    shifted_scale: float | None  # range of x − shift
    ranges: list[float]  # clipping range at 4, 6 and 8 bits
    sqnr: tuple[float, ...] | None  # expected dB at 4, 6 and 8 bits; None where the policy does not need them
    power: float = 0.0  # E[x²], where sqnr is known
    bits: int = 8
    reason: str = ""

    def expected_sqnr(self, bits: int) -> float:
        """Return the expected SQNR in dB at 4, 6 or 8 bits, of a layer that was measured with it."""
        assert self.sqnr is not None
        return self.sqnr[TIER_BITS.index(bits)]


def measure_layer(layer: LayerStatistics, with_sqnr: bool) -> Decision:
    """Return a layer's ranges at one step, its bits still open.

    with_sqnr: compute the expected SQNR at 4, 6 and 8 bits, too. Raises ValueError where that needs a histogram that
    the statistics lack.
    """
    shift = None if layer.shift is None else np.array(layer.shift, np.float32)
    shifted_scale = None if shift is None else float(layer.reach().max()) or DEAD_SCALE
    found = unmigrated_clipping_ranges(layer.histogram, shift, layer.full_reach(), layer.centred_power(), TIER_BITS)
    ranges = [float(clipping_range) or DEAD_SCALE for clipping_range in found]
    sqnr, power = None, 0.0
    if with_sqnr:
        if layer.histogram is None:
            raise ValueError("--policy sqnr needs hist_counts and hist_edges, which the statistics lack")
        sqnr = expected_sqnrs(*layer.histogram, ranges, TIER_BITS, shift)
        power = mean_square(*layer.histogram)
    return Decision(layer.tensor_absmax() or DEAD_SCALE, shift, shifted_scale, ranges, sqnr, power)


def measure_step(statistics: ActivationStatistics, with_sqnr: bool, key: str) -> dict[str, Decision]:
    """Return {layer: Decision} of one step, bits still open. Raises StoreError that names file and layer.

    with_sqnr: as for `measure_layer`.
    """
    measured: dict[int, Decision] = {}  # by the identity of a layer's statistics, which q, k and v share
    layers = statistics.read_step(key)
    for name, layer in layers.items():
        try:
            measured[id(layer)] = measured.get(id(layer)) or measure_layer(layer, with_sqnr)
        except ValueError as error:
            raise StoreError(f"{statistics.step_path(key)}: {name}: {error}") from None
    return {name: replace(measured[id(layer)]) for name, layer in layers.items()}


def measure_steps(statistics: ActivationStatistics, with_sqnr: bool) -> dict[str, dict[str, Decision]]:
    """Return {step key: `measure_step` of it}. Raises StoreError that names file and layer."""
    return dict(each_step(partial(measure_step, statistics, with_sqnr), statistics))


def decide_by_threshold(decisions: list[Decision], plain: tuple[float, float], shifted: tuple[float, float]) -> None:
    """Choose A4 below the first threshold, A6 below the second, and A8 from there.

    plain: the two thresholds for the scale; shifted: those for the shifted scale of post-GELU layers.
    """
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
    """Choose the fewest bits whose expected SQNR reaches min_sqnr (dB), and 8 where none does."""
    for decision in decisions:
        reaching = [bits for bits in TIER_BITS if decision.expected_sqnr(bits) >= min_sqnr]
        decision.bits = reaching[0] if reaching else TIER_BITS[-1]
        reached = decision.expected_sqnr(decision.bits)
        decision.reason = f"expected SQNR {reached:.1f} dB {'>=' if reaching else '<'} {min_sqnr:g}"


def decide_by_average(decisions: list[Decision], average_bits: float, gains: Sequence[float] | None = None) -> float:
    """Choose the bits with the least summed noise under a budget of average bits; return the proven gap of `allocate`.

    Noise is E[(x − x̂)²] / E[x²]. With gains, one for each decision, the noise is gain × E[(x − x̂)²], the loss of the
    model's output.
    """
    weights = [1.0] * len(decisions) if gains is None else [g * d.power for g, d in zip(gains, decisions, strict=True)]
    costs = [
        {bits: weight * 10 ** (-decision.expected_sqnr(bits) / 10) for bits in TIER_BITS}
        for decision, weight in zip(decisions, weights, strict=True)
    ]
    chosen, gap = allocate(costs, [1] * len(decisions), average_bits)
    for decision, bits in zip(decisions, chosen, strict=True):
        decision.bits = bits
        reached = decision.expected_sqnr(bits)
        what = "" if gains is None else ", by what the output loses"
        decision.reason = f"expected SQNR {reached:.1f} dB, {average_bits:g} bits on average{what}"
    return gap


def tier_config_steps(steps: dict[str, dict[str, Decision]]) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Yield the config's `per_timestep`, one (step key, {layer: entry}) at a time."""
    for key, layers in steps.items():
        entries: dict[str, dict[str, Any]] = {}
        for name, decision in layers.items():
            entries[name] = {"bits": decision.bits, "scale": decision.scale, "reason": decision.reason}
            if decision.shift is not None:
                entries[name] |= {"shift": decision.shift, "shifted_scale": decision.shifted_scale}
            entries[name]["clipping_range"] = decision.ranges[TIER_BITS.index(decision.bits)]
            if decision.sqnr is not None:
                entries[name]["expected_sqnr"] = decision.expected_sqnr(decision.bits)
        yield key, entries


def tier_temporal_analysis(steps: dict[str, dict[str, Decision]]) -> dict[str, dict[str, Any]]:
    """Return each layer's number of steps at each tier, the steps at which its bits change, and its average bits."""
    layers: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for step in steps.values() for name in step):
        bits = {key: layer[name].bits for key, layer in steps.items() if name in layer}
        keys = list(bits)
        layers[name] = {
            "steps_by_bits": {str(tier): sum(value == tier for value in bits.values()) for tier in TIER_BITS},
            "changes_at": [after for before, after in pairwise(keys) if bits[before] != bits[after]],
            "average_bits": sum(bits.values()) / len(bits),
        }
    return layers


def summarize_tiers(steps: dict[str, dict[str, Decision]], temporal: dict[str, dict]) -> dict[str, Any]:
    """Return the config's `summary`: average bits, shares by kind of layer and by third of the schedule.

    temporal: the result of `tier_temporal_analysis`.
    """
    rows: dict[str, list[int]] = {}
    for position, layers in enumerate(steps.values()):
        third = ("first third", "middle third", "last third")[position * 3 // len(steps)]
        for name, decision in layers.items():
            for row in ("all", third, layer_kind(name)):
                rows.setdefault(row, []).append(decision.bits)
    shares = {
        row: {"average_bits": sum(bits) / len(bits)} | {f"A{tier}": bits.count(tier) / len(bits) for tier in TIER_BITS}
        for row, bits in rows.items()
    }
    return {
        "num_steps": len(steps),
        "num_layers": len(temporal),
        "average_bits": shares["all"]["average_bits"],
        "shares": shares,
        "switching_layers": [name for name, layer in temporal.items() if layer["changes_at"]],
        "always_8_bits": [name for name, layer in temporal.items() if layer["average_bits"] == TIER_BITS[-1]],
    }


def decide(
    steps: dict[str, dict[str, Decision]],
    policy: dict[str, Any],
    sigma_map: Mapping[str, float],
    sensitivity: Mapping | None,
) -> None:
    """Set bits and reason of every decision as the policy says.

    policy: the result of `check_policy`; under a budget of average bits the function adds its `optimality_gap`.
    sensitivity: that of the model's output (`calibration_store.sensitivity`), for the policy of this name, else None.
    """
    decisions = [decision for layers in steps.values() for decision in layers.values()]
    if sensitivity is not None:
        places = [(name, sigma_map[key]) for key, layers in steps.items() for name in layers]
        gains = [input_gain(sensitivity, name, sigma) for name, sigma in places]
        policy["optimality_gap"] = decide_by_average(decisions, policy["average_bits"], gains)
        return
    if policy["policy"] == "threshold":
        plain = (policy["a4_threshold"], policy["a6_threshold"])
        decide_by_threshold(decisions, plain, (policy["shifted_a4_threshold"], policy["shifted_a6_threshold"]))
    elif "average_bits" in policy:
        policy["optimality_gap"] = decide_by_average(decisions, policy["average_bits"])
    else:
        decide_by_sqnr(decisions, policy["min_sqnr"])


THRESHOLDS = ("a4_threshold", "a6_threshold", "shifted_a4_threshold", "shifted_a6_threshold")


def check_policy(options: TierOptions) -> dict[str, Any]:
    """Return the chosen policy, which the config notes as `thresholds`.

    Raises OptionError for options that contradict each other.
    """
    policy, min_sqnr, average_bits = options.policy, options.min_sqnr, options.average_bits
    thresholds = {name: getattr(options, name) for name in THRESHOLDS}
    if policy == "threshold":
        if min_sqnr is not None or average_bits is not None:
            raise OptionError("--min-sqnr and --average-bits belong to --policy sqnr, the latter also to sensitivity")
        for prefix in ("", "shifted_"):
            if thresholds[f"{prefix}a4_threshold"] > thresholds[f"{prefix}a6_threshold"]:
                flag = "--" + prefix.replace("_", "-")
                raise OptionError(f"{flag}a4-threshold is above {flag}a6-threshold")
        return {"policy": policy, **thresholds}
    if policy == "sensitivity":
        if average_bits is None or min_sqnr is not None:
            raise OptionError("--policy sensitivity needs --average-bits, and no --min-sqnr")
        return {"policy": policy, "average_bits": average_bits}
    if (min_sqnr is None) == (average_bits is None):
        raise OptionError("--policy sqnr needs one of --min-sqnr and --average-bits")
    return {"policy": policy} | ({"min_sqnr": min_sqnr} if average_bits is None else {"average_bits": average_bits})
