"""The variants that stage 4 compares: each name stands for quantized weights and a rule for the activations."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibration_store.choices import GGUF_GROUP
from calibration_store.configs import is_multitier
from calibration_store.errors import OptionError, StoreError
from calibration_store.layout import ActivationPaths, QuantizedModelPaths, WeightPaths
from calibration_store.manifest import same_run
from calibration_store.weights import WEIGHTS_METADATA, weight_paths
from w4a8.model.layers import Layer
from w4a8.model.packed import AUTO
from w4a8.model.parts import TRANSFORMER, Pipeline
from w4a8.options import ExportOptions
from w4a8.quantized.activation_rules import ActivationRule, StaticByStep
from w4a8.quantized.exported import ExportedWeights
from w4a8.quantized.model import Codes, NearestWeights, OtherLayers, StoredWeights, Weights
from w4a8.quantized.rule_names import RULES, rule_of

WEIGHT_PART = re.compile(
    r"w(?P<bits>[2-68])-(?P<method>adaround|rtn)(?:-g(?P<group>0|32|64|128))?(?:-(?P<rest>r8|all))?"
)
REST = {None: None, "r8": OtherLayers(8), "all": OtherLayers(4, all_linears=True)}
NATIVE_VARIANT = "native"
NO_LORA_VARIANT = "no-lora"  # the original weights, without the LoRAs that are fused into the transformer
DEFAULT_GROUP_SIZE = 64
VARIANT_WORDS = (
    f"fp, w4-adaround, w4-rtn, {NATIVE_VARIANT}, {NO_LORA_VARIANT}, {', '.join(rule.spelled.split()[0] for rule in RULES)}, and "
    "w4-adaround+a8; docs/stages.md explains them, and names for other bits and groups"
)


@dataclass(frozen=True)
class Variant:
    """A row of the result: how weights and activations are quantized; None leaves them as they are."""

    name: str
    weights: Weights | None = None
    rule: ActivationRule | None = None
    scale_is: str | None = None

    def in_place(self, pipeline: Pipeline) -> AbstractContextManager[None]:
        """Put the variant's weights into the pipeline's transformer, until the block ends."""
        if self.name == NO_LORA_VARIANT:
            return without_loras(pipeline)
        return nullcontext() if self.weights is None else self.weights.in_place(pipeline)

    @property
    def sources(self) -> list[Path]:
        """Return the files that the variant follows from, each once."""
        return list(dict.fromkeys(path for part in self._parts for path in part.sources))

    @property
    def _parts(self) -> list[Weights | ActivationRule]:
        return [part for part in (self.weights, self.rule) if part is not None]

    def check(self, manifest: Mapping[str, Any], fingerprint: str | None, layers: Mapping[str, Layer]) -> None:
        """Raise a UserError, one line, unless the variant's files fit this calibration run and this model.

        The files must be those of the run, must have been made for weights with this fingerprint, and must hold all of
        the model's layers at every step.
        """
        for part in self._parts:
            for path, noted in part.made_from:
                if noted.get("weights_fingerprint") not in (None, fingerprint):
                    raise StoreError(
                        f"{path}: made for {noted.get('model_version')}, and this model has other weights; "
                        f"leave {self.name} out of --variants"
                    )
                if not same_run(manifest, noted):
                    raise StoreError(f"{path}: made from another calibration run; {part.remedy}")
        for part in reversed(self._parts):
            part.check(self.name, layers)


@contextmanager
def without_loras(pipeline: Pipeline) -> Iterator[None]:
    """Give the pipeline the transformer without its LoRAs until the block ends; its text encoders keep their part."""
    info = pipeline.info
    pipeline.info = replace(info, loras=())
    pipeline.drop(TRANSFORMER)
    try:
        yield
    finally:
        pipeline.info = info
        pipeline.drop(TRANSFORMER)


def make_variant(
    name: str, calib_dir: Path, scale_is: str | None = None, native: str = AUTO, config: Path | None = None
) -> Variant:
    """Return the variant of a name: `fp`, a weight part, an activation part, or both with a plus.

    scale_is: the meaning of `scale` in another tool's config, "range" or "step"; native: the way to compute with packed
    weights; config: the config that a8, or multitier, reads in place of the folder's. Raises OptionError for a name outside the vocabulary, and a UserError when a file that the variant needs is
    missing or damaged.
    """
    if name in ("fp", NO_LORA_VARIANT):
        return Variant(name)
    weight_part = rule_part = None
    for part in name.split("+"):
        found_rule = rule_of(part)
        if weight_part is None and is_weight_part(part):
            weight_part = part
        elif found_rule and rule_part is None:
            rule_part = found_rule
        else:
            examples = ("fp", NATIVE_VARIANT, "w4-adaround", "w4-rtn", *(rule.spelled.split()[0] for rule in RULES))
            near = difflib.get_close_matches(part, examples, 1)
            meant = f" (did you mean {near[0]}?)" if near and near[0] != part else ""
            raise OptionError(f"--variants: {name!r} is not known{meant}; there are {VARIANT_WORDS}")
    weights = make_weights(name, weight_part, calib_dir, native) if weight_part else None
    rule = None
    if rule_part is not None:
        rule_class, bits = rule_part
        given = {"given": config} if config is not None and issubclass(rule_class, StaticByStep) else {}
        rule = rule_class.named(name, bits, calib_dir, weights is not None, scale_is, **given)
        rule = rule.after_migration(name, dict if weights is None else weights.multipliers)
    return Variant(name, weights, rule, scale_is)


def refuse_unread_config(variants: Sequence[Variant], config: Path | None) -> None:
    """Raise OptionError where no variant reads the config that was given."""
    if config is not None and not any(config in variant.sources for variant in variants):
        which = "multitier" if is_multitier(config) else "a8, or w4-adaround+a8"
        raise OptionError(f"--config {config}: no variant reads it; give --variants {which}")


def is_weight_part(part: str) -> bool:
    """Return whether a part of a variant's name stands for weights."""
    return part == NATIVE_VARIANT or WEIGHT_PART.fullmatch(part) is not None


def make_weights(variant: str, part: str, calib_dir: Path, native: str = AUTO) -> Weights:
    """Return the weights that a weight part stands for.

    Nearest rounding without a group in its name takes the learned weights' group size, or DEFAULT_GROUP_SIZE where none
    are learned. variant: the whole name, for errors. Raises OptionError for learned weights of other bits.
    """
    if part == NATIVE_VARIANT:
        return ExportedWeights(calib_dir, native)
    match = WEIGHT_PART.fullmatch(part)
    assert match is not None  # `is_weight_part` holds for the part
    found = match.groupdict()
    bits, rest = int(found["bits"]), REST[found["rest"]]
    group = None if found["group"] is None else int(found["group"])
    if found["method"] == "adaround":
        stored = StoredWeights(calib_dir, rest, group)
        if group not in (None, stored.group_size):
            raise OptionError(f"{variant}: {stored.paths.root} holds groups of {stored.group_size}")
        if bits != stored.bits:
            raise OptionError(f"{variant}: {stored.paths.root} holds {stored.bits} bits")
        return stored
    if group is not None:
        return NearestWeights(bits, group, rest)
    learned = WeightPaths(calib_dir).metadata
    known = WEIGHTS_METADATA.read(learned)["group_size"] if learned.exists() else DEFAULT_GROUP_SIZE
    return NearestWeights(bits, known, rest)


def export_variant(options: ExportOptions) -> tuple[Variant, Codes, str | None]:
    """Return the variant that stage 5 exports, its weights, and the name of its activation part or None.

    Options that are not given follow the files in the calibration folder. Raises OptionError for options that cannot be
    exported, and StoreError where learned weights are asked for and missing.
    """
    calib_dir, weights, activations = options.calib_dir, options.weights, options.activations
    rest_bits, all_linears = options.rest_bits, options.all_linears
    if weights is None:
        learned = WeightPaths(calib_dir).metadata
        if not learned.exists():
            raise StoreError(f"{learned}: not found; run optimize_adaround.py first, or give --weights w4-rtn")
        weights = f"w{WEIGHTS_METADATA.read(learned)['weight_bits']}-adaround"
        for_gguf = weight_paths(calib_dir, GGUF_GROUP).metadata
        if options.layout == "gguf" and for_gguf != learned and for_gguf.exists():
            weights = f"w{WEIGHTS_METADATA.read(for_gguf)['weight_bits']}-adaround-g{GGUF_GROUP}"
    if rest_bits != 16 and all_linears:
        raise OptionError("--all-linears and --rest-bits exclude each other: the former has 4 bits everywhere")
    match = WEIGHT_PART.fullmatch(weights)
    if match is None or match["rest"]:
        raise OptionError(
            f"--weights {weights}: not known; there are w4-adaround, w4-rtn, w4-rtn-g32 and other bits and groups"
        )
    name = weights + ("-all" if all_linears else f"-r{rest_bits}" if rest_bits != 16 else "")
    if activations is None and options.layout == "mlx" and ActivationPaths(calib_dir).quant_config.exists():
        activations = trained_rule(make_weights(name, name, calib_dir)) or "a8"
    if activations in (None, "none"):
        variant, activations = make_variant(name, calib_dir), None
        return variant, _codes_of(variant), activations
    found = rule_of(activations)
    if found is None or "exported" not in vars(found[0]):
        raise OptionError(
            f"--activations {activations}: not known; there are a8, a8-learned, a8-token (other bits, too), a8-block and none"
        )
    both = make_variant(f"{name}+{activations}", calib_dir, options.scale_is)
    if both.rule is not None and both.rule.exported() is None:
        raise OptionError(
            f"--activations {activations}: its ranges are of inputs that these weights have divided (--migrate); "
            "give a8-token, a8-block or a8-learned"
        )
    return replace(both, name=name), _codes_of(both), activations


def trained_rule(weights: Weights) -> str | None:
    """Return the name of the rule for inputs that migrated weights were trained with; None for other weights.

    The ranges of quant_config.json are of the model before the migration.
    """
    if not isinstance(weights, StoredWeights) or not weights.multipliers():
        return None
    rule, bits = weights.metadata.get("activation_rule"), weights.activation_bits
    return f"a{bits}-{rule if rule != 'static' else 'learned'}" if bits else "a8-token"


def _codes_of(variant: Variant) -> Codes:
    """Return the weights of a variant that stage 5 exports; a native variant, which holds none, was refused before."""
    assert isinstance(variant.weights, Codes)
    return variant.weights


def default_variants(calib_dir: Path) -> list[str]:
    """Return the names of the variants that the folder has files for, at the bits of these files."""
    learned, configs = WeightPaths(calib_dir).metadata, ActivationPaths(calib_dir)
    bits = WEIGHTS_METADATA.read(learned)["weight_bits"] if learned.exists() else 4
    weights = [f"w{bits}-rtn", *([f"w{bits}-adaround"] if learned.exists() else [])]
    if QuantizedModelPaths.below(calib_dir).config.exists():
        weights.append(NATIVE_VARIANT)
    activations = (
        ["a8", *(f"{name}+a8" for name in weights[1:2] if learned.exists())] if configs.quant_config.exists() else []
    )
    return weights + activations + (["multitier"] if configs.multitier_config.exists() else [])
