"""Rules by which the input of every layer is quantized, a class each. They simulate: x̂ is dequantized to float32.

A new rule is a subclass of ActivationRule: it says its name in `--variants` (grammar, spelled), the files that it follows
from, and x̂; `rule_names` lists them. Here are those with stored ranges.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.configs import is_multitier, read_config
from calibration_store.errors import OptionError, StoreError
from calibration_store.layout import ActivationPaths
from w4a8.analysis.clipping_ranges import levels
from w4a8.model.hooks import hooked_layers
from w4a8.model.layers import Layer
from w4a8.quantized.differentiable import fake_quantize
from w4a8.quantized.model import StoredWeights, check_coverage

# The values of `rule` in activations.json.
STATIC_BY_STEP, STATIC = "static by step", "static"
Multipliers = Callable[[], Mapping[str, np.ndarray]]  # gives (inputs,) by layer
Quantize = Callable[[str, mx.array], mx.array]  # (layer, x (R, tokens, 1, channels) float32) -> x̂


class ActivationRule(ABC):
    """A rule by which the inputs of all layers are quantized.

    It follows from the files `sources`; `made_from` pairs such files with their notes of the run they were made from.
    """

    grammar: ClassVar[str]  # regular expression of the rule's name; a group `bits` where they can be chosen
    spelled: ClassVar[str]  # an example, for people

    sources: Sequence[Path]
    made_from: Sequence[tuple[Path, Mapping[str, Any]]]
    remedy: str = ""  # the commands that make the files anew

    @classmethod
    @abstractmethod
    def named(
        cls, variant: str, bits: int | None, calib_dir: Path, rounded: bool, scale_is: str | None
    ) -> "ActivationRule":
        """Make the rule that a variant's name stands for.

        rounded: the variant's weights are quantized, too. scale_is: the value of `--scale-is`. Raises a UserError
        when a file that the rule needs is missing or invalid.
        """

    @abstractmethod
    def at(self, sigma: float, rows_per_image: int) -> Quantize:
        """Return the function that gives x̂ at a noise level. Rows r·images + i of x belong to image i."""

    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:  # noqa: B027  (most have no file)
        """Raise StoreError that names the variant unless the files are of this model: all layers at every step."""

    def after_migration(self, variant: str, multipliers: Multipliers) -> "ActivationRule":
        """Return the rule for a model whose inputs were divided by these; here the rule itself, which follows the inputs.

        variant: names the model in errors. Raises a UserError where the rule has no ranges for such inputs.
        """
        return self

    def exported(self) -> dict[str, Any] | None:
        """Return the content of activations.json (`rule_of_export` reads it); None for a rule that is not exported."""
        return None


@contextmanager
def inputs_quantized(mmdit: nn.Module, rule: ActivationRule, rows_per_image: int) -> Iterator[Callable[[float], None]]:
    """Quantize the inputs of all linear layers by the rule, in the layers' dtype, until the block ends.

    Yields `step(sigma)`, which must be called before each pass.
    """
    quantize: Quantize
    latest: tuple[mx.array, mx.array] | None = None  # the last input, and x̂

    def record(name: str, x: mx.array) -> mx.array:
        nonlocal latest
        if latest is None or latest[0] is not x:  # q, k and v of a stream are given the same array
            latest = x, quantize(name, x.astype(mx.float32)).astype(x.dtype)
        return latest[1]

    def step(sigma: float) -> None:
        nonlocal quantize
        quantize = rule.at(sigma, rows_per_image)

    with hooked_layers(mmdit, record):
        yield step


# --- static -------------------------------------------------------------------------------------------------


class StaticByStep(ActivationRule):
    """The ranges of quant_config.json (3A), one for every layer and step, with shifts and multipliers if it has any."""

    grammar, spelled = r"a(?P<bits>[2-8])", "a8 (any bits)"
    script: ClassVar[str] = "analyze_activations.py"
    multitier: ClassVar[bool] = False

    def __init__(self, entries: Mapping[float, Mapping[str, dict[str, Any]]], path: Path, metadata: Mapping[str, Any]):
        """entries: {sigma: {layer: entry}}, as `activation_entry` makes them; metadata: the file's notes of its run."""
        self.entries, self.path = entries, path
        self.sources, self.made_from = [path], [(path, metadata)]
        self.remedy = f"run collect_layer_activations.py --force, then {self.script}"

    @classmethod
    def named(
        cls,
        variant: str,
        bits: int | None,
        calib_dir: Path,
        rounded: bool,
        scale_is: str | None,
        given: Path | None = None,
    ) -> "StaticByStep":
        """Read the config: the folder's, or a given one where it has this rule's format.

        Raises StoreError where it is missing, invalid, or leaves open what its scales mean.
        """
        paths = ActivationPaths(calib_dir)
        path = paths.multitier_config if cls.multitier else paths.quant_config
        path = given if given is not None and is_multitier(given) == cls.multitier else path
        if not os.path.lexists(path):
            raise StoreError(f"{path}: not found; {variant} needs it: run {cls.script}")
        config = read_config(path, cls.multitier)
        metadata = config.get("metadata") or {}
        scale_is = metadata.get("scale_meaning") or scale_is
        entries = [entry for layers in config["per_timestep"].values() for entry in layers.values()]
        if scale_is is None and not all("clipping_range" in entry for entry in entries):
            raise StoreError(
                f"{path}: another tool's: its 'scale' may be the range or the step; "
                "say --scale-is range or --scale-is step"
            )
        # W·m has other codes than W: beside weights that were rounded without m, nothing is migrated.
        migration = {} if rounded else config.get("outlier_config") or {}
        by_sigma = {
            config["sigma_map"][key]: {
                layer: activation_entry(entry, migration.get(layer), bits, scale_is) for layer, entry in layers.items()
            }
            for key, layers in config["per_timestep"].items()
        }
        return cls(by_sigma, path, metadata)

    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        """Raise StoreError unless every step has every layer, with a value per channel where it has several."""
        for sigma, entries in self.entries.items():
            check_coverage(variant, f"sigma {sigma:g}", set(entries), layers)
            for name, entry in entries.items():
                for key in ("shift", "multipliers"):  # a single value would broadcast over the channels
                    if key in entry and entry[key].shape != layers[name].shape[1:]:
                        raise StoreError(
                            f"{self.path}: {name} at sigma {sigma:g}: {entry[key].size} values of {key} for "
                            f"{layers[name].shape[1]} channels; {self.remedy}"
                        )

    def after_migration(self, variant: str, multipliers: Multipliers) -> "StaticByStep":
        """Return the rule on the same grids: an input x / m is quantized as x would be, and divided by m again."""
        divided_by = multipliers()

        def migrated(layer: str, entry: dict[str, Any]) -> dict[str, Any]:
            m = divided_by.get(layer)
            if m is None:
                return entry
            shift = {"shift": entry["shift"] / m} if "shift" in entry else {}
            return {**entry, **shift, "multipliers": entry.get("multipliers", np.float32(1)) / m}

        if not divided_by:
            return self
        entries = {sigma: {n: migrated(n, e) for n, e in layers.items()} for sigma, layers in self.entries.items()}
        rule = type(self)(entries, self.path, {})
        rule.made_from, rule.remedy = self.made_from, self.remedy
        return rule

    def at(self, sigma: float, rows_per_image: int) -> Quantize:
        """Return the function that quantizes by the ranges of the nearest noise level that has any."""
        entries = self.entries[min(self.entries, key=lambda known: abs(known - sigma))]

        def quantize(name: str, x: mx.array) -> mx.array:
            entry = entries[name]
            shift = mx.array(entry["shift"]) if "shift" in entry else 0.0
            multipliers = mx.array(entry["multipliers"]) if "multipliers" in entry else 1.0
            centred = (x - shift) / multipliers
            return fake_quantize(centred, entry["clipping_range"], entry["bits"]) * multipliers + shift

        return quantize

    def exported(self) -> dict[str, Any] | None:
        """Return the content of activations.json; None with several bit widths, or migrated outliers."""
        widths = {entry["bits"] for layers in self.entries.values() for entry in layers.values()}
        migrated = any("multipliers" in entry for layers in self.entries.values() for entry in layers.values())
        if len(widths) > 1 or migrated:
            return None
        steps = {str(index): sigma for index, sigma in enumerate(sorted(self.entries, reverse=True))}
        per_timestep = {
            key: {name: exported_range(e["clipping_range"], e.get("shift")) for name, e in self.entries[sigma].items()}
            for key, sigma in steps.items()
        }
        return {"rule": STATIC_BY_STEP, "bits": widths.pop(), "sigma_map": steps, "per_timestep": per_timestep}


class Multitier(StaticByStep):
    """The ranges of quant_config_multitier.json (3A'), with 4, 6 or 8 bits for every layer and step."""

    grammar, spelled = "multitier", "multitier"
    script, multitier = "analyze_activations_multitier.py", True


def activation_entry(
    entry: dict[str, Any], migration: dict[str, Any] | None, bits: int | None, scale_is: str | None
) -> dict[str, Any]:
    """Return one layer's entry at one step as `StaticByStep` takes it; `bits` overrides the entry's.

    migration: the layer's outlier_config where its weights take part in it. A config without our `clipping_range` is
    clipped at its scale, which is a range or (scale_is "step") a step of the entry's own bits; its outliers are not
    migrated, because the range of the migrated tensor is not given. A range of 0 (a layer that saw only zeros)
    becomes 1.
    """
    found: dict[str, Any] = {"bits": bits or entry["bits"]}
    if "clipping_range" not in entry:
        scale = entry["scale"] if entry.get("shifted_scale") is None else entry["shifted_scale"]
        found["clipping_range"] = (scale * levels(entry["bits"]) if scale_is == "step" else scale) or 1.0
    elif migration:
        found["clipping_range"] = entry["clipping_range"]
        found["multipliers"] = np.array(migration["multiplier_vector"], np.float32)
    else:
        found["clipping_range"] = entry.get("unmigrated_clipping_range", entry["clipping_range"])
    if entry.get("shift") is not None:
        found["shift"] = np.array(entry["shift"], np.float32)
    return found


class Learned(ActivationRule):
    """The ranges that stage 3W trained, one for every input, with shifts of the post-GELU ones.

    A range that was trained to follow the noise level is given at some sigmas, and log-linear in between.
    """

    grammar, spelled = r"a(?P<bits>[2-8])-learned", "a8-learned"

    def __init__(
        self, ranges: Mapping[str, Any], shifts: Mapping[str, mx.array], bits: int, sigmas: Sequence[float] = ()
    ):
        """ranges: by layer, () or one for each of the sigmas, (sigmas,); shifts: by layer, (channels,)."""
        self.ranges, self.shifts, self.bits, self.sigmas = ranges, shifts, bits, sigmas
        self.schedule: Sequence[float] = ()  # the noise levels whose ranges an export lists
        self.sources, self.made_from = [], []
        self._stored: StoredWeights | None = None

    @classmethod
    def named(cls, variant: str, bits: int | None, calib_dir: Path, rounded: bool, scale_is: str | None) -> "Learned":
        """Read the ranges beside the learned weights. Raises OptionError where they were trained at other bits."""
        stored = StoredWeights(calib_dir)
        if bits != stored.activation_bits:
            raise OptionError(f"{variant}: {stored.paths.root} holds {stored.activation_bits} bits")
        ranges, shifts = {}, {}
        for name, fields in stored.fields():
            ranges[name] = fields["act_scales"] if "act_scales" in fields else fields["act_scale"]
            if "act_shift" in fields:
                shifts[name] = mx.array(fields["act_shift"])
        rule = cls(ranges, shifts, bits, stored.metadata.get("range_sigmas", ()))
        rule.schedule = stored.metadata.get("schedule", ())
        rule.sources, rule.made_from, rule.remedy = stored.sources, stored.made_from, stored.remedy
        rule._stored = stored
        return rule

    def check(self, variant: str, layers: Mapping[str, Layer]) -> None:
        """Raise StoreError unless every layer that is quantized has its range, and a shift per channel if any."""
        if self._stored is not None:
            self._stored.check(variant, layers)
        left_out = set() if self._stored is None else set(self._stored.excluded)
        check_coverage(variant, "its ranges", set(self.ranges) | left_out, layers)
        for name, shift in self.shifts.items():
            if shift.shape != layers[name].shape[1:]:  # a single value would broadcast over the channels
                width = layers[name].shape[1]
                raise StoreError(f"{variant}: {name}: {shift.size} values of shift for {width} channels; {self.remedy}")

    def after_migration(self, variant: str, multipliers: Multipliers) -> "Learned":
        """Return the rule itself: its ranges were trained on the migrated model. Raises OptionError for another model."""
        if self._stored is not None and self._stored.multipliers().keys() != multipliers().keys():
            raise OptionError(
                f"{variant}: the learned ranges are of inputs that --migrate divided; they go with the learned weights alone"
            )
        return self

    def range_at(self, name: str, sigma: float) -> float:
        """Return a layer's clipping range at a noise level: log-linear between known levels, the nearest outside."""
        found = np.asarray(self.ranges[name], np.float64)
        if not found.ndim:
            return float(found)
        order = np.argsort(self.sigmas)
        return float(np.exp(np.interp(sigma, np.asarray(self.sigmas)[order], np.log(found)[order])))

    def at(self, sigma: float = 0.0, rows_per_image: int = 1) -> Quantize:
        """Return the function that quantizes by the ranges at a noise level; inputs of excluded layers stay."""

        def quantize(name: str, x: mx.array) -> mx.array:
            if name not in self.ranges:
                return x
            return fake_quantize(x, self.range_at(name, sigma), self.bits, self.shifts.get(name))

        return quantize

    def of_rows(self, steps: mx.array) -> Quantize:
        """Return the function for inputs whose row r is at noise level sigmas[steps[r]]; gradients reach the ranges.

        steps (rows,).
        """

        def quantize(name: str, x: mx.array) -> mx.array:
            found = self.ranges[name]
            found = found[steps].reshape(-1, 1, 1, 1) if found.ndim else found
            return fake_quantize(x, found, self.bits, self.shifts.get(name))

        return quantize

    def exported(self) -> dict[str, Any]:
        """Return the content of activations.json: ranges by layer, and by noise level where they follow it."""
        shifts = {name: np.array(shift) for name, shift in self.shifts.items()}

        def layers(sigma: float) -> dict[str, Any]:
            return {name: exported_range(self.range_at(name, sigma), shifts.get(name)) for name in self.ranges}

        if not any(np.ndim(value) for value in self.ranges.values()):
            return {"rule": STATIC, "bits": self.bits, "layers": layers(0.0)}
        levels_of = {str(index): sigma for index, sigma in enumerate(self.schedule or self.sigmas)}
        per_timestep = {key: layers(sigma) for key, sigma in levels_of.items()}
        return {"rule": STATIC_BY_STEP, "bits": self.bits, "sigma_map": levels_of, "per_timestep": per_timestep}


def exported_range(clipping_range: float, shift: np.ndarray | None) -> dict[str, Any]:
    """Return a layer's entry in activations.json."""
    return {"clipping_range": clipping_range} | ({} if shift is None else {"shift": shift})
