"""Measure what an error at each step of sampling does to the finished latent: one step alone has quantized weights."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from calibration_store.errors import OptionError, StoreError
from calibration_store.evaluation import read_variant
from calibration_store.layout import EvaluationPaths
from w4a8.backend.progress import ProgressBar, progress_bar
from w4a8.evaluation.drawn_images import EvaluationPlan
from w4a8.evaluation.variants import Variant
from w4a8.model.parts import Pipeline
from w4a8.model.prompt_encoder import PromptEncoder
from w4a8.model.replay import modulated
from w4a8.model.sampling import sigma_schedule

Derivative = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # (latents, their images, step) -> guided velocities


def variant_of_steps(variants: list[Variant]) -> Variant | None:
    """Return the variant whose weights are tried at single steps: the last one that has quantized weights alone."""
    return next((one for one in reversed(variants) if one.weights is not None and one.rule is None), None)


def refuse_effects_without_weights(variants: list[Variant], images: int) -> None:
    """Raise OptionError for --step-effects where no variant has quantized weights alone."""
    if images and variant_of_steps(variants) is None:
        raise OptionError(
            f"--step-effects {images}: needs a variant with quantized weights alone, such as --variants w4-rtn,native"
        )


def measured_effects(
    pipeline: Pipeline, texts: PromptEncoder, plan: EvaluationPlan, paths: EvaluationPaths, variants: list[Variant],
    images: int,
) -> dict[str, Any] | None:  # fmt: skip
    """Return the entry `step_effects` for the first `images` images of an evaluation whose original is on the disk.

    Returns None for no images.
    """
    original, variant = variants[0], variant_of_steps(variants)
    if not images or variant is None:
        return None
    path = paths.run(original.name, plan.identity(original))
    shape = len(plan.prompts), plan.num_steps + 1, plan.latent_size
    arrays = read_variant(path, plan.identity(original), *shape)
    if arrays is None:
        raise StoreError(f"{path}: cannot be read again; run evaluate_quantization.py again to make it anew")
    latents = arrays["latents"][:images]
    with progress_bar(num_passes(plan.num_steps, len(latents)), "single steps", "pass", leave=False) as bar:
        return measure_step_effects(pipeline, texts, plan, variant, latents, bar)


def num_passes(steps: int, images: int) -> int:
    """Return the number of images that pass the model, which the progress is counted in."""
    return images * (steps + steps * (steps - 1) // 2)


def measure_step_effects(
    pipeline: Pipeline, texts: PromptEncoder, plan: EvaluationPlan, variant: Variant, latents: np.ndarray, bar: ProgressBar,
) -> dict[str, Any]:  # fmt: skip
    """Return the entry `step_effects` of metrics.json.

    latents: the original's, of the first images of the plan, (N, steps + 1, h, w, 16). For each step: sigma; the
    velocity's relative error with the variant's weights at the original's latent; how far the finished latent moves,
    relative to its length, when that step alone is computed with them; and which share of the error that the step put
    in is left at the end. All are means over images.
    """
    images, count = len(latents), plan.num_steps
    sigmas = np.array(sigma_schedule(pipeline, count)[0], np.float64)
    derivative = _derivative(pipeline, texts, plan, images, bar)
    widths = np.diff(sigmas)[:, None, None, None, None]
    with variant.in_place(pipeline):
        slopes = np.stack([derivative(latents[:, step], np.arange(images), step) for step in range(count)])
    before = np.moveaxis(latents[:, :-1].astype(np.float64), 1, 0)  # (steps, N, …)
    exact = np.moveaxis(np.diff(latents.astype(np.float64), axis=1), 1, 0)
    moved = before + widths * slopes  # after the one step
    put_in = _lengths(moved - before - exact)
    running = np.empty((0, *latents.shape[2:]))
    for step in range(count):  # latents that went astray at an earlier step go on with the original's weights
        if len(running):
            owners = np.tile(np.arange(images), step)
            running = running + widths[step] * derivative(running, owners, step)
        running = np.concatenate([running, moved[step]])
    end = latents[:, -1].astype(np.float64)
    final = running.reshape(count, images, *latents.shape[2:])
    off = _lengths(final - end)
    return {
        "variant": variant.name,
        "images": images,
        "steps": [
            {
                "step": step,
                "sigma": float(sigmas[step]),
                "velocity_error": float((put_in[step] / _lengths(exact[step])).mean()),
                "moves": float((off[step] / _lengths(end)).mean()),
                "left": float((off[step] / np.maximum(put_in[step], np.finfo(np.float64).tiny)).mean()),
            }
            for step in range(count)
        ],
    }


def _lengths(arrays: np.ndarray) -> np.ndarray:
    """Return the lengths of latents (…, h, w, 16), (…)."""
    return np.sqrt(np.square(arrays).sum(axis=(-3, -2, -1)))


def _derivative(
    pipeline: Pipeline, texts: PromptEncoder, plan: EvaluationPlan, images: int, bar: ProgressBar
) -> Derivative:
    """Return a function that gives the guided velocity of latents, `batch_size` of them in a pass."""
    text = texts.encode(plan.prompts[:images])
    rows, dtype = text.pooled.shape[0] // images, pipeline.activation_dtype
    timesteps = sigma_schedule(pipeline, plan.num_steps)[1]

    def derivative(latents: np.ndarray, owners: np.ndarray, step: int) -> np.ndarray:
        found = []
        for begin in range(0, len(latents), plan.batch_size):
            part = slice(begin, begin + plan.batch_size)
            x, who = mx.array(latents[part], dtype), owners[part]
            picked = mx.array(np.concatenate([who + row * images for row in range(rows)]))
            mmdit = pipeline.mmdit
            embedded = mmdit.t_embedder(mx.repeat(timesteps[step][None], len(picked)))
            modulation = mmdit.y_embedder(text.pooled[picked])[:, None, None, :] + embedded
            with modulated(mmdit, modulation):
                velocity = mmdit(
                    latent_image_embeddings=mx.concatenate([x] * rows),
                    token_level_text_embeddings=mx.expand_dims(text.tokens[picked], 2),
                    timestep=mx.zeros((1,)),
                ).astype(mx.float32)
            if plan.cfg_weight > 0:
                positive, negative = mx.split(velocity, 2)
                velocity = negative + plan.cfg_weight * (positive - negative)
            found.append(np.array(velocity, np.float64))
            bar.update(len(x))
        return np.concatenate(found)

    return derivative
