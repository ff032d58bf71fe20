"""Sample every variant: same prompts, same seeds, whatever is quantized."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import orjson

from calibration_store.errors import OptionError, StoreError
from calibration_store.evaluation import read_variant, write_variant
from calibration_store.files import remove_file
from calibration_store.layout import EvaluationPaths
from calibration_store.version import content_digest
from w4a8.backend.estimates import Estimate
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.backend.progress import ProgressBar, progress_bar
from w4a8.evaluation.metrics import describe_variant
from w4a8.evaluation.variants import Variant
from w4a8.model.catalog import ModelInfo, choose_dtype, model_fingerprint, package_versions, without_own
from w4a8.model.loading import load_pipeline
from w4a8.model.location import UNCHANGED_LOCATION, ModelLocation
from w4a8.model.packed import AUTO
from w4a8.model.parts import DECODER, TRANSFORMER, Pipeline, whole_model
from w4a8.model.prompt_encoder import PromptEncoder
from w4a8.model.prompts import draw_builtin_prompts
from w4a8.model.runs import check_fingerprint, describe_run_model
from w4a8.model.sampling import EulerStep, check_seeds, decode_latents, euler_steps, initial_noise
from w4a8.options import EvaluationOptions
from w4a8.quantized.activation_rules import ActivationRule, inputs_quantized


@dataclass(frozen=True)
class Run:
    """Prompts, seeds and sampling: the same for every variant."""

    weights_fingerprint: str | None
    dtype: str
    use_t5: bool
    latent_size: tuple[int, int]
    prompts: list[str]
    num_steps: int
    cfg_weight: float
    negative_prompt: str
    seed: int
    batch_size: int
    versions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        negative = f", negative prompt {self.negative_prompt}" if self.negative_prompt else ""
        return (
            f"{len(self.prompts)} images, {self.num_steps} steps, guidance {self.cfg_weight:g}{negative}, "
            f"seeds from {self.seed}"
        )

    @property
    def batches(self) -> list[list[str]]:
        """Prompts that are sampled together; ranks share them by their numbers."""
        return [self.prompts[begin : begin + self.batch_size] for begin in range(0, len(self.prompts), self.batch_size)]

    def images_of(self, rank: SingleProcess) -> int:
        """How many images of a variant are this rank's."""
        return sum(len(self.batches[number]) for number in rank.owned_indices(len(self.batches)))

    def identity(self, variant: Variant) -> str:
        """SHA-256 over everything that a variant's images follow from, the content of its files included."""
        group = None if variant.weights is None else variant.weights.group_size
        parts = [asdict(self), variant.name, group, variant.scale_is, getattr(variant.weights, "way", None)]
        parts += [content_digest(path) for path in variant.sources]
        return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def choose_prompts(
    manifest: Mapping[str, Any], captions: Path | None, given: list[str] | None, count: int, seed: int
) -> tuple[list[str], int]:
    """(prompts, how many of them the calibration used); by default ones that it did not use."""
    used = {image["prompt"] for image in manifest["images"]}
    if given is not None:
        prompts = given[:count]
    else:
        prompts = [prompt for prompt in draw_builtin_prompts(captions, seed) if prompt not in used][:count]
        if len(prompts) < count:
            raise OptionError(
                f"--num-images {count}: there are {len(prompts)} prompts; give --num-images {len(prompts)} or fewer"
            )
    return prompts, sum(prompt in used for prompt in prompts)


def load_evaluated(
    manifest: Mapping[str, Any], location: ModelLocation = UNCHANGED_LOCATION, native: str = AUTO
) -> tuple[Pipeline, ModelInfo, str | None]:
    """The model to evaluate (by default the calibration's), what is known of it, and its weights' fingerprint."""
    info, checkpoint = describe_run_model(manifest, location)
    checkpoint = checkpoint if info.folder is None else None
    model = location.model
    use_t5 = manifest["use_t5"] if model in (None, manifest["model_version"]) else info.use_t5 and manifest["use_t5"]
    if model is None and info.hub_id is None:
        check_fingerprint(manifest, info, checkpoint)
    pipeline = load_pipeline(
        info, whole_model(choose_dtype(info, manifest["activation_dtype"])), use_t5, checkpoint, lazy=True, native=native
    )
    if model is None and info.hub_id is not None:
        check_fingerprint(manifest, info, checkpoint)  # now that its files are in the cache
    return pipeline, info, model_fingerprint(info, use_t5, checkpoint)


def plan_evaluation(
    options: EvaluationOptions, manifest: Mapping[str, Any], info: ModelInfo, fingerprint: str | None, use_t5: bool, prompts: list[str]
) -> Run:  # fmt: skip
    """Return the run that every variant shares; what is not given is the calibration's."""
    latent_size, default_cfg, negative = (manifest[key] for key in ("latent_size", "cfg_scale", "negative_prompt"))
    if fingerprint != manifest["weights_fingerprint"]:  # the manifest says nothing of another model
        latent_size, default_cfg, negative = info.latent_size, info.cfg_weight, ""
    cfg_weight = default_cfg if options.cfg_weight is None else options.cfg_weight
    check_seeds(options.seed, len(prompts))
    return Run(
        weights_fingerprint=fingerprint,
        dtype=manifest["activation_dtype"],
        use_t5=use_t5,
        latent_size=tuple(latent_size),
        prompts=prompts,
        num_steps=options.num_steps or manifest["num_steps"],
        cfg_weight=cfg_weight,
        negative_prompt=negative if cfg_weight > 1 else "",  # DiffusionKit ignores it otherwise
        seed=options.seed,
        batch_size=options.batch_size,
        versions=without_own(package_versions()) | {"device": str(mx.default_device())},
    )


def evaluate(
    pipeline: Pipeline, texts: PromptEncoder, run: Run, paths: EvaluationPaths, variants: Sequence[Variant], resume: bool,
    ranks: SingleProcess = SINGLE_PROCESS,
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, dict]] | None:  # fmt: skip
    """Run every variant, the original first: (original images, images and metrics of each variant); None on ranks that only help.

    The original, and with `resume` the others, are taken from an earlier run's file where there is one. Latents are
    in memory for two variants at a time.
    """
    images, results, original = {}, {}, None
    total = len(variants) * run.num_steps * len(run.batches)
    with progress_bar(total, "sampling", "step") as bar:
        for variant in variants:
            bar.set_description(variant.name)
            found = stored_or_sampled(pipeline, texts, run, paths, variant, resume or variant.name == "fp", bar, ranks)
            if found is None:
                continue
            original = found if original is None else original
            images[variant.name] = found["images"]
            results[variant.name] = describe_variant(run.prompts, run.seed, original, found)
            bar.n = total * len(results) // len(variants)
    return None if original is None else (original["images"], images, results)


def stored_or_sampled(
    pipeline: Pipeline, texts: PromptEncoder, run: Run, paths: EvaluationPaths, variant: Variant, stored: bool, bar: ProgressBar,
    ranks: SingleProcess,
) -> dict[str, np.ndarray] | None:  # fmt: skip
    """A variant's images and latents, from its file if that may be used, else sampled and written; None on ranks that only help."""
    identity, arrays = run.identity(variant), None
    path = paths.run(variant.name, identity)
    if ranks.rank == 0:
        for old in paths.runs_of(variant.name):
            if old != path:
                remove_file(old)  # of other parameters or files, or half-written
        if stored and os.path.lexists(path):
            arrays = read_variant(path, identity, len(run.prompts), run.num_steps + 1, run.latent_size)
    if ranks.from_rank_0(arrays is not None):
        return arrays
    arrays = sample(pipeline, texts, run, variant, bar, ranks)
    if ranks.rank:
        return None
    write_variant(path, identity, arrays)
    return arrays


def sample(
    pipeline: Pipeline, texts: PromptEncoder, run: Run, variant: Variant, bar: ProgressBar, ranks: SingleProcess = SINGLE_PROCESS,
    marks: list[float] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Images (N, H, W, 3) uint8 and the latents of every step (N, steps + 1, h, w, 16) float32 of all prompts.

    Ranks share the batches: an image is of the same batch whoever draws it. Transformer and decoder are never in memory
    together. marks: gets the times when sampling begins, when decoding begins, when it ends.
    """
    marks = [] if marks is None else marks
    batches, size = run.batches, run.batch_size
    texts.of(batches[0])
    pipeline.drop(DECODER)
    finished, latents = {}, {}
    with variant.in_place(pipeline):
        marks.append(time.perf_counter())
        for number in ranks.owned_indices(len(batches)):
            begin, prompts = number * size, batches[number]
            text = texts.of(prompts)
            noise = mx.concatenate([initial_noise(run.seed + begin + i, run.latent_size) for i in range(len(prompts))])
            noise = noise.astype(pipeline.activation_dtype)
            trajectory = []
            with contextlib.closing(euler_steps(pipeline, text, noise, run.num_steps, run.cfg_weight)) as states:
                for state in quantized_steps(pipeline, states, variant.rule, 2 if run.cfg_weight > 0 else 1):
                    trajectory.append(np.array(state.x.astype(mx.float32)))
                    ranks.advance(bar, 0 if state.is_final else 1)
            latents[number] = np.stack(trajectory, axis=1)
            refuse_not_finite(variant.name, latents[number], range(begin, begin + len(prompts)))
            finished[number] = state.x
    marks.append(time.perf_counter())
    pipeline.drop(TRANSFORMER)
    images = {}
    for number, x in finished.items():
        drawn = decode_latents(pipeline, x, range(number * size, number * size + len(x)))
        images[number] = np.stack([np.asarray(image) for image in drawn])
    marks.append(time.perf_counter())
    lengths = list(map(len, batches))
    height, width = (ranks.from_rank_0(images[0].shape[axis] if 0 in images else 0) for axis in (1, 2))
    return {
        "images": gathered_rows(ranks, images, lengths, (height, width, 3)).astype(np.uint8),
        "latents": gathered_rows(ranks, latents, lengths, (run.num_steps + 1, *run.latent_size, 16)),
    }


def gathered_rows(ranks: SingleProcess, own: Mapping[int, np.ndarray], lengths: Sequence[int], row: tuple[int, ...]) -> np.ndarray:
    """The rows of all batches in their order, from the batches that each rank has. lengths: of the batches; row: a row's shape."""
    if ranks.size == 1:
        return np.concatenate(list(own.values()))
    like, found = mx.zeros((max(lengths), *row)), []
    for turn in range(0, len(lengths), ranks.size):
        mine = own.get(turn + ranks.rank)
        if mine is not None:
            padding = [(0, len(like) - len(mine))] + [(0, 0)] * len(row)
            mine = mx.array(np.pad(mine, padding))
        for length, rows in zip(lengths[turn:], ranks.gathered(mine, like), strict=False):
            found.append(np.array(rows[:length]))
    return np.concatenate(found)


def estimate_evaluation(pipeline: Pipeline, run: Run, variants: Sequence[Variant], folder: Path, ranks: SingleProcess) -> Estimate:
    """Estimate a whole run from two steps of the first batch with the last variant."""
    few = replace(run, prompts=run.prompts[: run.batch_size], num_steps=2)
    texts = PromptEncoder(pipeline, few.prompts, few.cfg_weight, few.negative_prompt, None)
    marks: list[float] = []
    with progress_bar(few.num_steps, "timing", "step", leave=False) as bar:
        arrays = sample(pipeline, texts, few, variants[-1], bar, marks=marks)
    begin, sampled, end = marks
    batches = len(run.batches)
    seconds = (sampled - begin) / few.num_steps * run.num_steps * batches + (end - sampled) * batches
    latents = arrays["latents"][0, 0].nbytes * (run.num_steps + 1)
    return Estimate(
        work=f"{len(variants)} variants",
        seconds=seconds * len(variants) / ranks.size,
        bytes_written=(arrays["images"][0].nbytes + latents) * len(run.prompts) * len(variants),
        folder=folder,
        peak_bytes=mx.get_peak_memory(),
    )


def quantized_steps(
    pipeline: Pipeline, states: Iterator[EulerStep], rule: ActivationRule | None, rows_per_image: int
) -> Iterator[EulerStep]:
    """The states of a sampling whose passes see inputs quantized by `rule`, at the noise level of each."""
    first = next(states)  # builds the modulation cache, which refuses live hooks
    if rule is None:
        yield from chain([first], states)
        return
    with inputs_quantized(pipeline.mmdit, rule, rows_per_image) as step:
        for state in chain([first], states):
            step(state.sigma.item())
            yield state
            if state.is_final:
                return


def refuse_not_finite(variant: str, latents: np.ndarray, ids: Sequence[int]) -> None:
    """Raise StoreError that names the first image and step (latents: (N, steps + 1, h, w, 16)) with NaN or infinity."""
    bad = np.argwhere(~np.isfinite(latents).all(axis=(2, 3, 4)))
    if len(bad):
        image, step = bad[0]
        raise StoreError(f"{variant}: the latent of image {ids[image]} holds NaN or infinity after step {step}")
