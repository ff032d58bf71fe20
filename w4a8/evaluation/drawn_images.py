"""Stage 4: draw the images of every variant, with the same prompts and the same seeds."""

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
from calibration_store.manifest import run_identity
from calibration_store.version import content_digest
from w4a8 import __version__
from w4a8.backend.estimates import Estimate
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.backend.progress import ProgressBar, progress_bar
from w4a8.evaluation.metrics import describe_variant, effect_cosine
from w4a8.evaluation.variants import NO_LORA_VARIANT, Variant
from w4a8.model.catalog import ModelInfo, choose_dtype, model_fingerprint, package_versions, without_own
from w4a8.model.loading import load_pipeline
from w4a8.model.location import UNCHANGED_LOCATION, ModelLocation
from w4a8.model.packed import AUTO
from w4a8.model.parts import DECODER, TRANSFORMER, Pipeline, whole_model
from w4a8.model.prompt_encoder import PromptEncoder
from w4a8.model.prompts import draw_builtin_prompts
from w4a8.model.runs import check_fingerprint, describe_run_model
from w4a8.model.sampling import EulerStep, check_seeds, choose_guidance, decode_latents, euler_steps, initial_noise
from w4a8.options import EvaluationOptions
from w4a8.quantized.activation_rules import ActivationRule, inputs_quantized


@dataclass(frozen=True)
class EvaluationPlan:
    """Prompts, seeds and sampling, which every variant of an evaluation shares."""

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
    other: dict[str, float] = field(default_factory=dict)  # --shift and --guidance of the run, where it has them

    def __str__(self) -> str:
        negative = f", negative prompt {self.negative_prompt}" if self.negative_prompt else ""
        return (
            f"{len(self.prompts)} images, {self.num_steps} steps, guidance {self.cfg_weight:g}{negative}, "
            f"seeds from {self.seed}"
        )

    @property
    def batches(self) -> list[list[str]]:
        """Return the prompts in batches, which are sampled together. Ranks share the batches by index."""
        return [self.prompts[begin : begin + self.batch_size] for begin in range(0, len(self.prompts), self.batch_size)]

    def images_of(self, rank: SingleProcess) -> int:
        """Return the number of images of a variant that a rank draws."""
        return sum(len(self.batches[number]) for number in rank.owned_indices(len(self.batches)))

    def parameters(
        self, manifest: Mapping[str, Any], info: ModelInfo, overlap: int, config: Path | None = None
    ) -> dict[str, Any]:
        """Return the entries of metrics.json that describe the evaluation.

        overlap: the number of prompts that the calibration used; config: a value of --config.
        """
        image_ids = [image["image_id"] for image in manifest["images"]]
        run = (
            {"calibration_run": run_identity(manifest, image_ids), "selected_image_ids": image_ids} if image_ids else {}
        )
        return {
            "w4a8_version": __version__,
            "prompts": self.prompts,
            "overlap_with_calibration": overlap,
            "num_steps": self.num_steps,
            "cfg_weight": self.cfg_weight,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "model_version": info.version,
            "weights_fingerprint": self.weights_fingerprint,
            **run,
            "dtype": self.dtype,
            **({} if config is None else {"config": config.name}),
        }

    def identity(self, variant: Variant) -> str:
        """Return the SHA-256 over everything that a variant's images follow from, the content of its files included."""
        group = None if variant.weights is None else variant.weights.group_size
        own = asdict(self)
        own |= own.pop("other")
        parts = [own, variant.name, group, variant.scale_is, getattr(variant.weights, "way", None)]
        parts += [content_digest(path) for path in variant.sources]
        return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def choose_prompts(
    manifest: Mapping[str, Any], captions: Path | None, given: list[str] | None, count: int, seed: int
) -> tuple[list[str], int]:
    """Return the prompts to draw, and the number of them that the calibration used.

    captions: the file of a model's own prompts, None for the built-in list; given: the user's prompts, of which the
    first `count` are taken. Without `given`, `seed` orders the list, and the first `count` prompts that the calibration
    did not use are taken. Raises OptionError where the list has fewer.
    """
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
    manifest: dict[str, Any], location: ModelLocation = UNCHANGED_LOCATION, native: str = AUTO
) -> tuple[Pipeline, ModelInfo, str | None]:
    """Load the model to evaluate; return its pipeline, its description, and the fingerprint of its weights.

    location: another model than the calibration's, or the place where the calibration's model lies now; native: the way
    to compute with packed weights. Raises ModelError for a model that is not there, and for a calibration's model whose
    weights have changed.
    """
    info, model = describe_run_model(manifest, location), location.model
    same = info.version == manifest["model_version"]
    use_t5 = manifest["use_t5"] if same else info.use_t5 and manifest["use_t5"]
    if model is None and info.hub_id is None:
        check_fingerprint(manifest, info)
    pipeline = load_pipeline(
        info,
        whole_model(choose_dtype(info, manifest["activation_dtype"])),
        use_t5,
        lazy=True,
        native=native,
    )
    if model is None and info.hub_id is not None:
        check_fingerprint(manifest, info)  # now that its files are in the cache
    return pipeline, info, model_fingerprint(info, use_t5)


def plan_evaluation(
    options: EvaluationOptions, manifest: Mapping[str, Any], info: ModelInfo, fingerprint: str | None, use_t5: bool,
    prompts: list[str],
) -> EvaluationPlan:  # fmt: skip
    """Return the plan that every variant shares. The calibration's values stand in for options that are not given.

    Latent size, guidance and negative prompt of another model are the model's own. Raises OptionError for a seed that
    is too large.
    """
    latent_size, default_cfg, negative = (manifest[key] for key in ("latent_size", "cfg_scale", "negative_prompt"))
    if fingerprint != manifest["weights_fingerprint"]:  # the manifest describes another model
        latent_size, default_cfg, negative = info.latent_size, info.cfg_weight, ""
    cfg_weight = choose_guidance(info, default_cfg if options.cfg_weight is None else options.cfg_weight)
    check_seeds(options.seed, len(prompts))
    if NO_LORA_VARIANT in (options.variants or "").split(",") and not info.loras:
        raise OptionError(f"--variants {NO_LORA_VARIANT}: the model has no LoRA; leave it out")
    return EvaluationPlan(
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
        other=({"shift": info.sampler_shift} if "shift" in manifest else {})
        | ({"guidance": info.guidance} if info.guidance is not None else {}),
    )


def evaluate(
    pipeline: Pipeline, texts: PromptEncoder, plan: EvaluationPlan, paths: EvaluationPaths, variants: Sequence[Variant],
    resume: bool, ranks: SingleProcess = SINGLE_PROCESS,
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, dict]] | None:  # fmt: skip
    """Draw and measure every variant; the first one is the original. Return None on ranks other than 0.

    Rank 0 gets the original's images (N, H, W, 3) uint8, and {variant: images} and {variant: metrics} of all variants.
    The original, and with `resume` the others, are taken from an earlier run's file where there is one. Latents are in
    memory for two variants at a time.
    """
    images, results, original, without = {}, {}, None, None
    variants = sorted(variants, key=lambda variant: (variant.name != "fp", variant.name != NO_LORA_VARIANT))
    total = len(variants) * plan.num_steps * len(plan.batches)
    with progress_bar(total, "sampling", "step") as bar:
        for variant in variants:
            bar.set_description(variant.name)
            found = stored_or_sampled(pipeline, texts, plan, paths, variant, resume or variant.name == "fp", bar, ranks)
            if found is None:
                continue
            original = found if original is None else original
            images[variant.name] = found["images"]
            results[variant.name] = describe_variant(plan.prompts, plan.seed, original, found)
            if variant.name == NO_LORA_VARIANT:
                without = found["latents"][:, -1].copy()
            elif without is not None:
                kept = effect_cosine(original["latents"][:, -1], without, found["latents"][:, -1])
                results[variant.name]["lora_effect"] = kept
            bar.n = total * len(results) // len(variants)
    return None if original is None else (original["images"], images, results)


def stored_or_sampled(
    pipeline: Pipeline, texts: PromptEncoder, plan: EvaluationPlan, paths: EvaluationPaths, variant: Variant,
    stored: bool, bar: ProgressBar, ranks: SingleProcess,
) -> dict[str, np.ndarray] | None:  # fmt: skip
    """Return a variant's images and latents as `sample` does: read from its file, or sampled and written to it.

    stored: a file of an earlier run may be used. Returns None on ranks other than 0. Rank 0 removes the variant's files
    of other plans.
    """
    identity, arrays = plan.identity(variant), None
    path = paths.run(variant.name, identity)
    if ranks.rank == 0:
        for old in paths.runs_of(variant.name):
            if old != path:
                remove_file(old)  # its parameters or files were others, or it is half-written
        if stored and os.path.lexists(path):
            arrays = read_variant(path, identity, len(plan.prompts), plan.num_steps + 1, plan.latent_size)
    if ranks.from_rank_0(arrays is not None):
        return arrays
    arrays = sample(pipeline, texts, plan, variant, bar, ranks)
    if ranks.rank:
        return None
    write_variant(path, identity, arrays)
    return arrays


def sample(
    pipeline: Pipeline, texts: PromptEncoder, plan: EvaluationPlan, variant: Variant, bar: ProgressBar,
    ranks: SingleProcess = SINGLE_PROCESS, marks: list[float] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Draw all prompts with a variant; return its images and the latents of every step.

    Returns {"images": (N, H, W, 3) uint8, "latents": (N, steps + 1, h, w, 16) float32}. Ranks share the batches: an
    image belongs to the same batch whichever rank draws it. Transformer and decoder are never in memory together.
    marks: a list that gets three times, of the beginning of sampling, the beginning of decoding, and the end. Raises
    StoreError where a latent holds NaN or infinity.
    """
    marks = [] if marks is None else marks
    batches, size = plan.batches, plan.batch_size
    texts.encode(batches[0])
    pipeline.drop(DECODER)
    finished, latents = {}, {}
    with variant.in_place(pipeline):
        marks.append(time.perf_counter())
        for number in ranks.owned_indices(len(batches)):
            begin, prompts = number * size, batches[number]
            text = texts.encode(prompts)
            noise = mx.concatenate(
                [initial_noise(plan.seed + begin + i, plan.latent_size) for i in range(len(prompts))]
            )
            noise = noise.astype(pipeline.activation_dtype)
            trajectory = []
            with contextlib.closing(euler_steps(pipeline, text, noise, plan.num_steps, plan.cfg_weight)) as states:
                for state in quantized_steps(pipeline, states, variant.rule, 2 if plan.cfg_weight > 0 else 1):
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
        "latents": gathered_rows(ranks, latents, lengths, (plan.num_steps + 1, *plan.latent_size, 16)),
    }


def gathered_rows(
    ranks: SingleProcess, own: Mapping[int, np.ndarray], lengths: Sequence[int], row: tuple[int, ...]
) -> np.ndarray:
    """Return the rows of all batches in their order, gathered from the batches that each rank has.

    own: {index of a batch: its rows}; lengths: the number of rows of each batch; row: the shape of a row. Several ranks
    exchange float32, and one process leaves the dtype as it is.
    """
    if ranks.size == 1:
        return np.concatenate(list(own.values()))
    like, found = mx.zeros((max(lengths), *row)), []
    for turn in range(0, len(lengths), ranks.size):
        mine, padded = own.get(turn + ranks.rank), None
        if mine is not None:
            padding = [(0, len(like) - len(mine))] + [(0, 0)] * len(row)
            padded = mx.array(np.pad(mine, padding))
        for length, rows in zip(lengths[turn:], ranks.gathered(padded, like), strict=False):
            found.append(np.array(rows[:length]))
    return np.concatenate(found)


def estimate_evaluation(
    pipeline: Pipeline, plan: EvaluationPlan, variants: Sequence[Variant], folder: Path, ranks: SingleProcess
) -> Estimate:
    """Estimate a whole evaluation from two steps of the first batch with the last variant. folder: the output's."""
    few = replace(plan, prompts=plan.prompts[: plan.batch_size], num_steps=2)
    texts = PromptEncoder(pipeline, few.prompts, few.cfg_weight, few.negative_prompt, None)
    marks: list[float] = []
    with progress_bar(few.num_steps, "timing", "step", leave=False) as bar:
        arrays = sample(pipeline, texts, few, variants[-1], bar, marks=marks)
    begin, sampled, end = marks
    batches = len(plan.batches)
    seconds = (sampled - begin) / few.num_steps * plan.num_steps * batches + (end - sampled) * batches
    latents = arrays["latents"][0, 0].nbytes * (plan.num_steps + 1)
    return Estimate(
        work=f"{len(variants)} variants",
        seconds=seconds * len(variants) / ranks.size,
        bytes_written=(arrays["images"][0].nbytes + latents) * len(plan.prompts) * len(variants),
        folder=folder,
        peak_bytes=mx.get_peak_memory(),
    )


def quantized_steps(
    pipeline: Pipeline, states: Iterator[EulerStep], rule: ActivationRule | None, rows_per_image: int
) -> Iterator[EulerStep]:
    """Yield the states of a sampling whose passes see inputs quantized by `rule`, each at its noise level.

    states: the steps of `euler_steps`; rule: None leaves the inputs as they are; rows_per_image: 2 with guidance, 1
    without.
    """
    first = next(states)  # it builds the modulation cache, which refuses live hooks
    if rule is None:
        yield from chain([first], states)
        return
    with inputs_quantized(pipeline.mmdit, rule, rows_per_image) as step:
        for state in chain([first], states):
            step(state.sigma.item())  # type: ignore[arg-type]  # MLX's stubs let item() return a complex number
            yield state
            if state.is_final:
                return


def refuse_not_finite(variant: str, latents: np.ndarray, ids: Sequence[int]) -> None:
    """Raise StoreError, which names the first image and step, where latents hold NaN or infinity.

    latents: (N, steps + 1, h, w, 16); ids: the number of each image in the error.
    """
    bad = np.argwhere(~np.isfinite(latents).all(axis=(2, 3, 4)))
    if len(bad):
        image, step = bad[0]
        raise StoreError(f"{variant}: the latent of image {ids[image]} holds NaN or infinity after step {step}")
