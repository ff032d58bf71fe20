"""The gain of a variant over round-to-nearest, image by image: both draw the same prompts from the same noise."""

import re
from collections.abc import Collection, Mapping
from typing import Any

NEAREST = re.compile(r"w(\d)-rtn([^+]*)")
WEIGHTS = re.compile(r"w(\d)-[a-z]+([^+]*)(\+.*)?")


def nearest_of(variant: str, names: Collection[str]) -> str | None:
    """Return the variant with weights rounded to nearest that a variant is compared with, or None where there is none.

    It is the one with the same bits and groups, else with the same bits, else for the model on the disk any. Variants
    without quantized weights are compared with none.
    """
    found = [name for name in names if NEAREST.fullmatch(name)]
    if variant in found:
        return None
    if variant.partition("+")[0] == "native":
        return found[0] if found else None
    own = WEIGHTS.fullmatch(variant)
    if own is None:
        return None
    same = [name for name in found if name[1] == own[1]]
    exact = [name for name in same if name == f"w{own[1]}-rtn{own[2]}"]
    return next(iter([*exact, *same]), None)


def gain_words(gain: Mapping[str, Any]) -> str:
    """Return a gain in words: +1.3 dB over w4-rtn, image by image (95 %: 0.4 to 2.3); 14 of 16 images gained."""
    low, high = gain["interval"]
    return (
        f"{gain['mean']:+.1f} dB over {gain['over']}, image by image (95 %: {low:.1f} to {high:.1f}); "
        f"{gain['gained']} of {gain['images']} images gained"
    )
