"""A run of stage 3W, and the choices of its unit and of its last phase."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from calibration_store.block_cache import holds_ends
from calibration_store.choices import PRODUCT_PRECISIONS, REST_KINDS, ProductPrecision
from calibration_store.errors import OptionError, StoreError
from calibration_store.layout import WeightPaths
from calibration_store.rest_weights import read_migration
from calibration_store.stage_folder import shown
from calibration_store.weights import LEARNING_RATES, WEIGHTS_FORMAT, WEIGHTS_METADATA, WEIGHTS_PLAN, training_run
from w4a8 import __version__
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.effort import SMALL_MODEL, rounding_effort
from w4a8.model.layers import Layer, half_dtype, model_blocks, model_layers, num_weights
from w4a8.model.migration import migrate
from w4a8.options import RoundingOptions
from w4a8.rounding.block_boundaries import BlockBoundaries
from w4a8.rounding.held_boundaries import IN_FILES, HeldBoundaries
from w4a8.rounding.rest import EVERYTHING, NO_REST, VECTORS, choose_rest
from w4a8.rounding.settings import BFLOAT16, FLOAT32, Settings
from w4a8.rounding.units import MODEL, UNITS, Unit

REST_WORDS = {
    NO_REST: "",
    EVERYTHING: " with adaLN and the final layer",
    VECTORS: " with adaLN's biases and the final layer",
}


@dataclass(frozen=True)
class RoundingRun:
    """A run of stage 3W: the model, the layers and units that are trained, the samples' cache, and the settings."""

    original: Callable[[], nn.Module]  # gives the transformer, float32, whose weights are read when they are used
    mmdit: nn.Module  # a transformer of which only shapes and the configuration are read
    paths: WeightPaths
    cache: Mapping[str, Any]  # the block cache's metadata
    schedule: Sequence[float]  # noise levels of the calibration run, num_steps + 1
    settings: Settings
    unit: str  # a name of units.UNITS
    blocks: list[str]
    ranks: SingleProcess = SINGLE_PROCESS
    place: str = IN_FILES  # of the boundaries, where they are made
    on_device: int = 0  # samples of them that the device's memory holds, beside those of the host's
    one_graph: bool = False  # the last phase makes gradients from one graph of all blocks, though blocks are the units

    @classmethod
    def plan_run(
        cls, options: RoundingOptions, opened: Callable[[], nn.Module], paths: WeightPaths, cache: Mapping[str, Any],
        schedule: Sequence[float], ranks: SingleProcess, before: Mapping[str, Any] | None,
    ) -> "RoundingRun":  # fmt: skip
        """Return the run that the options ask for.

        opened: gives the transformer; schedule: noise levels of the calibration run, num_steps + 1; before: the plan
        that --resume goes on with. Raises OptionError for options that do not fit this cache and model.
        """
        mmdit = opened()
        size = num_weights(model_layers(mmdit).values())
        effort = rounding_effort(options, size, before)
        settings = Settings.of(options, effort, before)
        precision = ranks.from_rank_0(PRODUCT_PRECISIONS.index(choose_precision(options.precision, size, before)))
        settings = replace(settings, precision=PRODUCT_PRECISIONS[precision])
        unit, blocks = choose_unit(mmdit, cache["block_names"], options.blocks, options.unit, settings.group_size)
        whole = list(model_blocks(mmdit)) == list(blocks)
        rest = choose_rest(mmdit, options.tune_rest and whole and effort.end_to_end != 0, before)
        rest = REST_KINDS[ranks.from_rank_0(REST_KINDS.index(rest))]
        given = options.end_to_end
        if before is not None and given is None and options.iters is None and not options.is_given("effort"):
            given = effort.end_to_end  # the run's
        end_to_end = choose_end_to_end(given, unit, whole, mmdit, effort.end_to_end, rest)
        if options.unrolled is None and not end_to_end:
            settings = replace(settings, unrolled=0)
        if settings.unrolled and not end_to_end:
            raise OptionError(
                f"--unrolled {settings.unrolled} follows the last phase, which --end-to-end gives iterations"
            )
        if settings.migrate and not whole:
            raise OptionError("--migrate needs every block: leave --blocks out")
        settings = replace(settings, end_to_end=end_to_end, rest=rest if end_to_end else NO_REST)
        return cls(opened, mmdit, paths, cache, schedule, settings, unit, blocks, ranks)

    def open(self) -> nn.Module:
        """Return the transformer that is quantized, with migrated inputs once this run has chosen multipliers.

        Raises StoreError for a damaged file of them.
        """
        mmdit = self.original()
        if self.settings.migrate and os.path.lexists(self.paths.migration) and self._has_begun:
            migrate(mmdit, read_migration(self.paths, self.plan_on_disk))
        return mmdit

    @property
    def _has_begun(self) -> bool:
        """True where the plan on the disk is this run's, and not one that --force will remove."""
        try:
            return WEIGHTS_PLAN.read(self.paths.plan).get("training_run") == self.plan["training_run"]
        except StoreError:
            return False

    @property
    def unit_class(self) -> type[Unit]:
        """The class of the run's units."""
        return UNITS[self.unit]

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The layers that are trained, by name."""
        left_out = set(self.settings.excluded)
        every = model_layers(self.mmdit)
        return {name: one for name, one in every.items() if one.block in self.blocks and name not in left_out}

    @property
    def boundary_dtype(self) -> str:
        """The dtype of tokens stored between blocks: float32 for FLUX, whose tokens may exceed float16's 65,504."""
        return "float32" if self.mmdit.config.depth_unified else "float16"

    @cached_property
    def alone(self) -> "RoundingRun":
        """The same run without other processes."""
        return replace(self, ranks=SINGLE_PROCESS)

    @cached_property
    def boundaries(self) -> BlockBoundaries | HeldBoundaries | None:
        """The boundaries between blocks, where they are needed and not cached; None elsewhere.

        With 16-bit products they are in memory where it has room (`place`).
        """
        if self.unit == MODEL or not holds_ends(self.cache):
            return None
        cache, paths, chunk, dtype = self.cache, self.paths, self.settings.chunk, self.boundary_dtype
        if self.settings.precision == FLOAT32:
            return BlockBoundaries(cache, paths, self.plan, chunk, self.ranks, dtype)
        half = half_dtype(self.mmdit)
        if self.place == IN_FILES:
            return BlockBoundaries(cache, paths, self.plan, chunk, self.ranks, dtype, half)
        return HeldBoundaries(cache, paths, chunk, dtype, half, self.on_device, self.open, self.ranks)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The content of plan.json, which identifies the run, and most of metadata.json's."""
        cache = self.cache
        settings = asdict(self.settings)
        if self.settings.rest == NO_REST:  # as plans were before the rest was trained
            del settings["rest"], settings["rest_bits"]
        if not self.settings.unrolled:
            del settings["unrolled"]
        if not self.settings.migrate:
            del settings["migrate"]
        if self.settings.precision == FLOAT32:
            del settings["precision"]
        plan = {
            "format": WEIGHTS_FORMAT,
            "model_version": cache.get("model_version"),
            "calibration_run": cache.get("calibration_run"),
            "weights_fingerprint": cache.get("weights_fingerprint"),
            "unit": self.unit,
            "block_names": [block for block in self.blocks if any(one.block == block for one in self.layers.values())],
            **settings,
            "num_samples": len(cache["samples"]),
            "range_sigmas": [self.schedule[step] for step in cache["key_timesteps"]],
            "schedule": self.schedule[:-1],
            "selected_image_ids": cache["selected_image_ids"],
            "key_timesteps": cache["key_timesteps"],
        }
        return plan | {"training_run": training_run(plan), "w4a8_version": __version__}

    @cached_property
    def plan_on_disk(self) -> dict[str, Any]:
        """The plan, with the digests of the blocks' files where metadata.json is this run's."""
        try:
            noted = WEIGHTS_METADATA.read(self.paths.metadata)
        except StoreError:
            return self.plan
        same = noted.get("training_run") == self.plan["training_run"]
        digests = {key: noted[key] for key in ("block_digests", "rest_digest", "migration_digest") if key in noted}
        return self.plan | (digests if same else {})

    def __str__(self) -> str:
        settings, samples = self.settings, len(self.cache["samples"])
        counts = Counter(map(settings.bits, self.layers))
        widths = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(counts.items()))
        return (
            f"{len(self.layers)} layers of {len(self.blocks)} blocks{f' ({widths})' if len(counts) > 1 else ''}, "
            f"W{settings.weight_bits}{f'A{settings.activation_bits}' if settings.activation_bits else ''}, "
            f"{f'groups of {settings.group_size}' if settings.group_size else 'per output channel'}, "
            f"{'wide inputs migrated, ' if settings.migrate else ''}{'' if settings.precision == FLOAT32 else f'products in {settings.precision}, '}unit {self.unit}, "
            f"{settings.iters} iterations of {min(settings.batch_size, samples)} ({settings.micro_batch} at once)"
            f"{f', then {settings.end_to_end} end to end' if settings.end_to_end else ''}{REST_WORDS[settings.rest]}"
            f"{f', {settings.unrolled} against finished latents' if settings.unrolled else ''}, {samples} cached samples"
        )


def choose_unit(
    mmdit: nn.Module, cached: Sequence[str], blocks: str | None, unit: str | None, group_size: int
) -> tuple[str, list[str]]:
    """Return (unit, blocks) of a run.

    cached: names of the cached blocks; blocks: `--blocks`, None for all that are cached; unit: `--unit`, None for the
    model up to SMALL_MODEL weights, else the block. Raises OptionError for blocks that are not cached, for groups
    that do not divide a layer's inputs, and for the unit "model" without every block.
    """
    every = list(model_blocks(mmdit))
    chosen = [name.strip() for name in blocks.split(",")] if blocks is not None else list(cached)
    unknown = [name for name in chosen if name not in cached]
    if unknown:
        raise OptionError(f"--blocks: {', '.join(map(shown, unknown))} not in the cache, which has {', '.join(cached)}")
    chosen = [name for name in cached if name in chosen]
    layers = [layer for layer in model_layers(mmdit).values() if layer.block in chosen]
    shapes = [layer.shape for layer in layers]
    if group_size and any(width % group_size for _, width in shapes):
        widths = sorted({width for _, width in shapes})
        raise OptionError(f"--group-size {group_size} does not divide the layers' inputs ({widths})")
    if unit == "model" and chosen != every:
        raise OptionError(
            "--unit model needs every block: run cache_adaround_data.py without --blocks, and leave --blocks out here"
        )
    if unit is None:
        unit = MODEL if chosen == every and num_weights(layers) <= SMALL_MODEL else "block"
    return unit, chosen


def choose_end_to_end(
    given: int | None, unit: str, whole: bool, mmdit: nn.Module, default: int, rest: str = NO_REST
) -> int:
    """Return the number of iterations of the last phase.

    given: `--end-to-end`, None for the default where the rest is trained, or where the model is large and its blocks are
    the units, else for none. whole: every block is trained. Raises OptionError where not every block is.
    """
    large = num_weights(model_layers(mmdit).values()) > SMALL_MODEL
    if given and not whole:
        raise OptionError("--end-to-end needs every block: leave --blocks out")
    useful = rest != NO_REST or (large and unit != MODEL)
    return default if given is None and whole and useful else given or 0


def choose_precision(given: ProductPrecision | None, size: int, before: Mapping[str, Any] | None) -> ProductPrecision:
    """Return the precision of products: `--precision`, or an earlier run's, or by device and number of weights."""
    if given is None and before is not None:
        return before.get("precision", FLOAT32)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return given or (FLOAT32 if on_cpu or size <= SMALL_MODEL else BFLOAT16)


def what_may_change(before: Mapping[str, Any] | None) -> list[str]:
    """Return the keys of a plan that may differ from the plan before, which --resume goes on with.

    A run that met NaN may go on with other learning rates.
    """
    if before is None:
        return []
    return [*(LEARNING_RATES if "diverged" in before else ()), *(() if "micro_batch" in before else ("micro_batch",))]
