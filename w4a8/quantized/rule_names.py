"""Every rule of activations, by its name in `--variants`."""

import re

from w4a8.quantized.activation_rules import ActivationRule, Learned, Multitier, StaticByStep
from w4a8.quantized.dynamic_rules import DynamicPerBlock, DynamicPerTensor, DynamicPerToken

RULES: tuple[type[ActivationRule], ...] = (
    StaticByStep, Learned, DynamicPerTensor, DynamicPerToken, DynamicPerBlock, Multitier,
)  # fmt: skip


def rule_of(part: str) -> tuple[type[ActivationRule], int | None] | None:
    """Return the rule that a part of a variant's name stands for, and its bits; None for another name."""
    for rule in RULES:
        match = re.fullmatch(rule.grammar, part)
        if match:
            bits = match.groupdict().get("bits")
            return rule, int(bits) if bits else None
    return None
