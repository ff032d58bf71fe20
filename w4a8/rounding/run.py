"""A run of stage 3W: the model, what is trained in which pieces, and from what."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import mlx.nn as nn

from calibration_store.block_cache import holds_ends
from calibration_store.errors import OptionError, StoreError
from calibration_store.layout import WeightPaths
from calibration_store.rounding_checkpoint import Layers
from calibration_store.stage_folder import shown
from calibration_store.weights import WEIGHTS_FORMAT, WEIGHTS_METADATA, read_losses, read_quantized_block, training_run
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.model.layers import Layer, model_blocks, model_layers
from w4a8.model.parts import check_finite
from w4a8.rounding.block_boundaries import BlockBoundaries
from w4a8.rounding.final_phase import EndToEnd, WholeModel, before_phase
from w4a8.rounding.kinds import MODEL, UNITS
from w4a8.rounding.settings import Settings
from w4a8.rounding.training import Training
from w4a8.rounding.training_samples import Samples
from w4a8.rounding.units import Job, Unit, UnitSpec

MODEL_UNIT_LIMIT = 100_000_000  # weights up to which the default unit is the whole model
BYTES_PER_WEIGHT = 3 + 2 * 16  # codes and alpha, and a checkpoint being replaced by the next
END_TO_END = "end to end"


@dataclass(frozen=True)
class RoundingRun:
    """A run of stage 3W: the model, what is trained in which pieces, and from what."""

    open: Callable[[], nn.Module]  # the transformer, float32, whose weights are read when they are used
    mmdit: nn.Module  # one such that is only looked at
    paths: WeightPaths
    cache: Mapping[str, Any]  # the block cache's metadata
    schedule: Sequence[float]  # noise levels of the calibration run, num_steps + 1
    settings: Settings
    unit: str  # a name of units.UNITS
    blocks: list[str]
    ranks: SingleProcess = SINGLE_PROCESS

    @property
    def unit_class(self) -> type[Unit]:
        return UNITS[self.unit]

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Those that are trained."""
        left_out = set(self.settings.excluded)
        every = model_layers(self.mmdit)
        return {name: one for name, one in every.items() if one.block in self.blocks and name not in left_out}

    @cached_property
    def jobs(self) -> list[Job]:
        """In order; the last phase is one of its own. What holds no layer (all are excluded) is left out."""
        jobs = self.unit_class.jobs(self.layers, self.blocks)
        jobs = [replace(job, parts=[part for part in job.parts if part.layers]) for job in jobs]
        if self.settings.end_to_end:
            jobs.append(Job(END_TO_END, self.blocks, [UnitSpec(END_TO_END, list(self.layers))]))
        return [job for job in jobs if job.parts]

    def trained(self, job: Job) -> list[str]:
        """The job's blocks that have a layer to train."""
        return [block for block in job.blocks if any(layer.block == block for layer in self.layers.values())]

    @property
    def boundary_dtype(self) -> str:
        """Of the tokens that a walk keeps between blocks: FLUX's may exceed float16, which is why it is run in bfloat16."""
        return "float32" if self.mmdit.config.depth_unified else "float16"

    @cached_property
    def walk(self) -> BlockBoundaries | None:
        """How the boundaries between blocks are made, where they are needed and not cached."""
        if self.unit == MODEL or not holds_ends(self.cache):
            return None
        return BlockBoundaries(self.cache, self.paths, self.plan, self.settings.chunk, self.ranks, self.boundary_dtype)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What the run is (plan.json), and most of metadata.json."""
        cache = self.cache
        plan = {
            "format": WEIGHTS_FORMAT,
            "model_version": cache.get("model_version"),
            "calibration_run": cache.get("calibration_run"),
            "weights_fingerprint": cache.get("weights_fingerprint"),
            "unit": self.unit,
            "block_names": [block for block in self.blocks if any(one.block == block for one in self.layers.values())],
            **asdict(self.settings),
            "num_samples": len(cache["samples"]),
            "range_sigmas": [self.schedule[step] for step in cache["key_timesteps"]],
            "schedule": self.schedule[:-1],
            "selected_image_ids": cache["selected_image_ids"],
            "key_timesteps": cache["key_timesteps"],
        }
        return plan | {"training_run": training_run(plan)}

    @cached_property
    def plan_on_disk(self) -> dict[str, Any]:
        """Return the plan, with the digests of the blocks' files where metadata.json is of this run."""
        try:
            noted = WEIGHTS_METADATA.read(self.paths.metadata)
        except StoreError:
            return self.plan
        same = noted.get("training_run") == self.plan["training_run"]
        return self.plan | ({"block_digests": noted.get("block_digests", {})} if same else {})

    def is_finished(self, job: Job) -> bool:
        """Whether every block of the job is on disk, valid, of this run, and of this model's layers."""
        last = job.name == END_TO_END
        try:
            found: Layers = {}
            for block in self.trained(job):
                found |= read_quantized_block(self.paths, block, self.plan_on_disk)
            for path in [self.paths.end_to_end_losses] if last else map(self.paths.losses, self.trained(job)):
                losses = read_losses(path, self.plan)
                if losses["unit"] != job.name or len(losses["stages"]) != len(job.parts):
                    return False
        except StoreError:
            return False
        if last and not all("scale_before" in fields for fields in found.values()):
            return False
        shapes = {name: layer.shape for name, layer in self.layers.items() if layer.block in job.blocks}
        return {name: fields["q"].shape for name, fields in found.items()} == shapes

    def bytes_of(self, jobs: Sequence[Job]) -> int:
        """What these jobs take on the disk at most."""
        shapes = [self.layers[name].shape for job in jobs if job.name != END_TO_END for name in job_layers(job)]
        walked = self.walk.num_bytes() if self.walk is not None and shapes else 0
        return BYTES_PER_WEIGHT * sum(out * width for out, width in shapes) + walked

    def rows_of(self, losses: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
        """(part, its losses) of every job, from what metadata.json says by block, and of the last phase by its name."""
        found = [(job, losses.get(job.name) or losses[self.trained(job)[0]]) for job in self.jobs]
        return [(part.name, row) for job, each in found for part, row in zip(job.parts, each["stages"], strict=True)]

    def iterations(self, job: Job) -> int:
        """Of all its parts."""
        return self.settings.end_to_end if job.name == END_TO_END else self.settings.iters * len(job.parts)

    def __str__(self) -> str:
        settings, samples = self.settings, len(self.cache["samples"])
        counts = Counter(map(settings.bits, self.layers))
        widths = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(counts.items()))
        return (
            f"{len(self.layers)} layers of {len(self.blocks)} blocks{f' ({widths})' if len(counts) > 1 else ''}, W{settings.weight_bits}"
            f"{f'A{settings.activation_bits}' if settings.activation_bits else ''}, "
            f"{f'groups of {settings.group_size}' if settings.group_size else 'per output channel'}, unit {self.unit}, "
            f"{settings.iters} iterations of {min(settings.batch_size, samples)} ({settings.micro_batch} at once)"
            f"{f', then {settings.end_to_end} end to end' if settings.end_to_end else ''}, {samples} cached samples"
        )

    def opened(self, job: Job) -> nn.Module:
        """The transformer with the job's blocks in memory; what else it needs is read when it is used."""
        mmdit = self.open()
        for name in job.blocks if job.name != END_TO_END else ():
            check_finite(model_blocks(mmdit)[name].module, f"{self.plan['model_version']}, {name}")
        return mmdit

    def training(self, mmdit: nn.Module, job: Job, index: int, samples: Samples) -> Training:
        if job.name == END_TO_END:
            return EndToEnd(
                WholeModel(
                    mmdit, job.blocks, samples, self.settings, self.finished_layers(self.trained(job)), self.ranks
                )
            )
        return Training(self.unit_class(mmdit, job, job.parts[index], samples, self.settings, self.ranks))

    def is_one_ranks(self, job: Job) -> bool:
        """Whether a rank does the whole job: where all boundaries are cached, blocks need nothing of each other."""
        return self.ranks.size > 1 and not holds_ends(self.cache) and self.unit != MODEL and job.name != END_TO_END

    @cached_property
    def alone(self) -> "RoundingRun":
        """The run without other ranks."""
        return replace(self, ranks=SINGLE_PROCESS)

    def finished_layers(self, blocks: Sequence[str]) -> Layers:
        """What the files of these blocks say, as it was before the last phase."""
        found: Layers = {}
        for block in blocks:
            found |= read_quantized_block(self.paths, block, self.plan)
        return {name: before_phase(fields) for name, fields in found.items()}

    def samples(self, mmdit: nn.Module, job: Job) -> Samples:
        """What a job is trained on."""
        if self.walk is not None and job.name != END_TO_END:
            return self.walk.samples(mmdit, job.blocks[0])
        return self.whole_samples() if holds_ends(self.cache) else self._stretch(job.blocks)

    def whole_samples(self) -> Samples:
        """What enters the first block, and what the whole model gives."""
        if holds_ends(self.cache):
            return Samples.of_ends(self.paths.calib_dir, self.cache, self.mmdit)
        return self._stretch(self.blocks)

    def _stretch(self, blocks: Sequence[str]) -> Samples:
        return Samples.of_stretch(self.paths.calib_dir, self.cache, blocks)


def choose_unit(
    mmdit: nn.Module, cached: Sequence[str], blocks: str | None, unit: str | None, group_size: int
) -> tuple[str, list[str]]:
    """(unit, blocks) of a run. Raises OptionError for blocks that are not cached and groups that do not fit."""
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
        unit = MODEL if chosen == every and num_weights(layers) <= MODEL_UNIT_LIMIT else "block"
    return unit, chosen


def job_layers(job: Job) -> list[str]:
    return [name for part in job.parts for name in part.layers]


def choose_end_to_end(given: int | None, unit: str, blocks: Sequence[str], mmdit: nn.Module, iters: int) -> int:
    """Iterations of the last phase. Raises OptionError where not every block is trained, or all are together anyway."""
    whole = list(model_blocks(mmdit)) == list(blocks)
    large = num_weights(model_layers(mmdit).values()) > MODEL_UNIT_LIMIT
    if given and not whole:
        raise OptionError("--end-to-end needs every block: leave --blocks out")
    if given and unit == MODEL:
        raise OptionError(
            "--end-to-end follows units that are smaller than the model, which --unit model trains at once"
        )
    return iters // 2 if given is None and whole and large and unit != MODEL else given or 0


def num_weights(layers: Iterable[Layer]) -> int:
    return sum(out * width for out, width in (layer.shape for layer in layers))
