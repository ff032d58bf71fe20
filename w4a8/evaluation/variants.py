"""What stage 4 compares: a variant's name becomes quantized weights and a rule for the activations."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration_store.errors import OptionError, StoreError
from calibration_store.layout import ActivationPaths, WeightPaths
from calibration_store.manifest import same_run
from calibration_store.weights import WEIGHTS_METADATA
from w4a8.model.layers import Layer
from w4a8.quantized.activation_rules import RULES, ActivationRule, rule_of
from w4a8.quantized.model import NearestWeights, StoredWeights, Weights

WEIGHT_PART = re.compile(r"w(?P<bits>[2-68])-(?:(?P<method>adaround)|(?P<nearest>rtn)(?:-g(?P<group>0|32|64|128))?)")
DEFAULT_GROUP_SIZE = 64
VOCABULARY = (
    "fp, w4-rtn, w4-rtn-g0 (2, 3, 4, 5, 6 or 8 bits, groups of 32, 64, 128 or 0: what MLX runs natively), w4-adaround, "
    f"{', '.join(rule.spelled for rule in RULES)}, and products such as w4-adaround+a8"
)


@dataclass(frozen=True)
class Variant:
    """A row of the result: how weights and activations are quantized; None leaves them as they are."""

    name: str
    weights: Weights | None = None
    rule: ActivationRule | None = None
    scale_is: str | None = None

    @property
    def sources(self) -> list[Path]:
        """The files that the variant follows from, each once."""
        parts = [part for part in (self.weights, self.rule) if part is not None]
        return list(dict.fromkeys(path for part in parts for path in part.sources))

    def check(self, manifest: Mapping[str, Any], fingerprint: str | None, layers: Mapping[str, Layer]) -> None:
        """Whether its files are of this calibration run and this model, all of its layers at every step.

        Raises a UserError in one line.
        """
        for part in (self.weights, self.rule):
            for path, noted in part.made_from if part is not None else ():
                if noted.get("weights_fingerprint") not in (None, fingerprint):
                    raise StoreError(
                        f"{path}: made for {noted.get('model_version')}, and this model has other weights; "
                        f"leave {self.name} out of --variants"
                    )
                if not same_run(manifest, noted):
                    raise StoreError(f"{path}: made from another calibration run; {part.remedy}")
        for part in (self.rule, self.weights):
            if part is not None:
                part.check(self.name, layers)


def make_variant(name: str, calib_dir: Path, scale_is: str | None = None) -> Variant:
    """The variant of a name: `fp`, a weight part, an activation part, or both with a plus.

    scale_is: what `scale` means in another tool's config. Raises OptionError for a name outside the vocabulary, and a
    UserError when a file that it needs is missing or cannot be.
    """
    if name == "fp":
        return Variant(name)
    weight_part = rule_part = None
    for part in name.split("+"):
        found_weights, found_rule = WEIGHT_PART.fullmatch(part), rule_of(part)
        if found_weights and weight_part is None:
            weight_part = found_weights
        elif found_rule and rule_part is None:
            rule_part = found_rule
        else:
            raise OptionError(f"--variants: {name!r} is not known; there are {VOCABULARY}")
    weights = make_weights(name, weight_part.groupdict(), calib_dir) if weight_part else None
    rule = None
    if rule_part is not None:
        rule_class, bits = rule_part
        rule = rule_class.named(name, bits, calib_dir, weights is not None, scale_is)
    return Variant(name, weights, rule, scale_is)


def make_weights(variant: str, part: Mapping[str, str | None], calib_dir: Path) -> Weights:
    """The weights of a variant's weight part. Without a group of its own nearest rounding has the learned weights'."""
    bits = int(part["bits"])
    if part["method"]:
        stored = StoredWeights(calib_dir)
        if bits != stored.bits:
            raise OptionError(f"{variant}: {stored.paths.root} holds {stored.bits} bits")
        return stored
    if part["group"] is not None:
        return NearestWeights(bits, int(part["group"]))
    learned = WeightPaths(calib_dir).metadata
    known = WEIGHTS_METADATA.read(learned)["group_size"] if learned.exists() else DEFAULT_GROUP_SIZE
    return NearestWeights(bits, known)


def default_variants(calib_dir: Path) -> list[str]:
    """Every variant that the folder has files for, at the bits that they have."""
    learned, configs = WeightPaths(calib_dir).metadata, ActivationPaths(calib_dir)
    bits = WEIGHTS_METADATA.read(learned)["weight_bits"] if learned.exists() else 4
    weights = [f"w{bits}-rtn", *([f"w{bits}-adaround"] if learned.exists() else [])]
    activations = ["a8", *(f"{name}+a8" for name in weights[1:])] if configs.quant_config.exists() else []
    return weights + activations + (["multitier"] if configs.multitier_config.exists() else [])
