"""The bits of each layer: set by hand, chosen by the sensitivity of the model's output, or none at all."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from calibration_store.choices import WEIGHT_BITS
from calibration_store.errors import OptionError
from w4a8.analysis.bit_allocation import allocate
from w4a8.model.layers import model_blocks
from w4a8.options import RoundingOptions
from w4a8.rounding.run import RoundingRun
from w4a8.rounding.sensitivity import known_sensitivity, note_sensitivity

DEFAULT_WIDTHS = "4,8"
UNQUANTIZED = 16  # `--bits PATTERN=16`: layers that stay as they are


def layers_matching(layers: Iterable[str], pattern: str) -> list[str]:
    """Return the layers that a pattern of `--bits` names, with `*` and `?` as in a shell.

    Raises OptionError for a pattern that names none.
    """
    found = [name for name in layers if fnmatchcase(name, pattern)]
    if not found:
        raise OptionError(
            f"--bits {pattern}: no layer has such a name; they are called mm0.img.attn.q_proj, mm0.txt.mlp.fc2, …"
        )
    return found


def bits_by_hand(layers: Sequence[str], given: Sequence[str]) -> dict[str, int]:
    """Return the bits of the layers that `--bits PATTERN=BITS` names; the last option that names a layer counts.

    Raises OptionError for an option that is malformed, or names no layer.
    """
    chosen: dict[str, int] = {}
    for option in given:
        pattern, _, bits = option.rpartition("=")
        if not pattern or bits not in map(str, (*WEIGHT_BITS, UNQUANTIZED)):
            raise OptionError(f"--bits {option}: PATTERN=BITS with 2, 3, 4, 5, 6, 8 or 16 bits, such as '*.mlp.fc2=8'")
        chosen |= dict.fromkeys(layers_matching(layers, pattern), int(bits))
    return chosen


def average_bits_of(text: str) -> tuple[float, list[int]]:
    """Read `--average-bits AVERAGE[:WIDTHS]`, such as 4.5 or 4.5:3,4,6, as (average, widths that a layer may have).

    Raises OptionError for widths that do not exist, or that cannot have this average.
    """
    number, _, widths = text.partition(":")
    try:
        average = float(number)
    except ValueError:
        average = math.nan
    if not WEIGHT_BITS[0] <= average <= WEIGHT_BITS[-1]:
        raise OptionError(f"--average-bits {text}: an average from 2 to 8, such as 4.5, or with widths 4.5:3,4,6")
    parts = [part.strip() for part in (widths or DEFAULT_WIDTHS).split(",")]
    if not all(part in map(str, WEIGHT_BITS) for part in parts):
        raise OptionError(f"--average-bits {text}: widths are of 2, 3, 4, 5, 6 and 8, such as 4.5:4,8")
    choices = sorted(set(map(int, parts)))
    if not choices[0] <= average <= choices[-1]:
        raise OptionError(f"--average-bits {average:g} is not between the widths {choices[0]} and {choices[-1]}")
    return average, choices


def allocate_bits(
    sensitivity: Mapping[str, Any],
    layers: Sequence[str],
    by_hand: Mapping[str, int],
    choices: Sequence[int],
    average_bits: float,
) -> dict[str, int]:
    """Return the bits of every layer, `average_bits` on average over their weights.

    sensitivity: as `known_sensitivity` gives it; layers in by_hand keep their bits, which count in the average.
    """
    measured = sensitivity["layers"]
    costs = [
        {by_hand[name]: 0.0} if name in by_hand else {bits: measured[name]["weights"][str(bits)] for bits in choices}
        for name in layers
    ]
    chosen, _ = allocate(costs, [measured[name]["size"] for name in layers], average_bits)
    return dict(zip(layers, chosen, strict=True))


def choose_bits(run: RoundingRun, options: RoundingOptions) -> RoundingRun:
    """Return the run with bits for every layer; measure the sensitivity where it is not known, but not in a dry run.

    Raises OptionError for options that leave no layer, or that need every block.
    """
    chosen = bits_by_hand(list(run.layers), options.bits)
    excluded = [name for name, bits in chosen.items() if bits == UNQUANTIZED]
    chosen = {name: bits for name, bits in chosen.items() if bits != UNQUANTIZED}
    layers = [name for name in run.layers if name not in excluded]
    if not layers:
        raise OptionError("--bits leaves no layer to train")
    settings = replace(run.settings, excluded=excluded)
    if options.average_bits is not None:
        average, choices = average_bits_of(options.average_bits)
        if len(run.blocks) != len(model_blocks(run.mmdit)):
            raise OptionError("--average-bits is of the whole model: leave --blocks out")
        settings = replace(settings, average_bits=average, bit_choices=choices)
        sensitivity = known_sensitivity(run, choices)
        if not run.ranks.from_rank_0(sensitivity is not None) and not options.dry_run:
            note_sensitivity(run, choices)
            sensitivity = known_sensitivity(run, choices)
        if sensitivity is not None:
            chosen = allocate_bits(sensitivity, layers, chosen, choices, average)
    other = {name: bits for name, bits in chosen.items() if bits != settings.weight_bits}
    return replace(run, settings=replace(settings, layer_bits=other))
