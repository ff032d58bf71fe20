"""Sample images: draw noise, make Euler steps in a generator, decode latents."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from PIL import Image

from calibration_store.errors import OptionError
from calibration_store.limits import MOST_SEED
from w4a8.backend.parallel import row_groups, side_by_side
from w4a8.model.catalog import ModelError, ModelInfo
from w4a8.model.decoding import decode
from w4a8.model.diffusionkit import CFGDenoiser, append_dims
from w4a8.model.modulation import modulation_cache
from w4a8.model.parts import Pipeline
from w4a8.model.prompt_encoder import TextConditioning


def sigma_schedule(pipeline: Pipeline, num_steps: int) -> tuple[mx.array, mx.array]:
    """Return DiffusionKit's schedule: sigmas (num_steps + 1,) float32, the last 0, and timesteps, activation dtype."""
    sigmas = pipeline.get_sigmas(pipeline.sampler, num_steps)
    timesteps = pipeline.sampler.timestep(sigmas).astype(pipeline.activation_dtype)
    mx.eval(sigmas, timesteps)
    return sigmas, timesteps


def choose_guidance(info: ModelInfo, given: float | None) -> float:
    """Return the guidance for a value of `--cfg-weight`, or the model's own for None.

    1 becomes 0: negative + 1 · (positive - negative) is the positive velocity, which needs no rows of a negative
    prompt. Raises OptionError for guidance where DiffusionKit runs no such rows.
    """
    cfg_weight = info.cfg_weight if given is None else given
    if cfg_weight == 1:
        return 0.0
    if cfg_weight > 0 and not info.family.guided:
        raise OptionError(
            f"--cfg-weight {cfg_weight:g}: {info.version} is run without guidance; leave it out, or give 0"
        )
    return cfg_weight


def choose_steps(info: ModelInfo, given: int | None) -> int:
    """Return the number of Euler steps for a value of `--num-steps`, or the model's own for None.

    Raises OptionError for a checkpoint whose name says that it takes few steps, and not how many.
    """
    steps = given or info.num_steps
    if not steps:
        raise OptionError(
            f"{info.title}: its name says that it was made for few steps, and not for how many; give --num-steps "
            "(its page says how many), and --cfg-weight where it wants guidance"
        )
    return steps


def check_seeds(seed: int, images: int) -> None:
    """Raise OptionError where the seed of the last image, seed + images − 1, has more than 64 bits."""
    if seed + images - 1 > MOST_SEED:
        raise OptionError(f"--seed {seed}: seed + image must stay below 2^64")


def initial_noise(seed: int, latent_size: tuple[int, int]) -> mx.array:
    """Draw the noise (1, h, w, 16) float32 that DiffusionKit draws for `seed`, and leave NumPy's global state alone.

    DiffusionKit takes seeds of 32 bits. A seed of 64 bits seeds the same generator with its two halves, the lower half
    first.
    """
    h, w = latent_size
    words = seed if seed < 2**32 else [seed % 2**32, seed >> 32]
    return mx.array(np.random.RandomState(words).randn(1, 16, h, w)).transpose(0, 2, 3, 1)


@dataclass(frozen=True)
class EulerStep:
    """The state before step `step_index`; `is_final` marks the finished latent after the last step (sigma 0)."""

    step_index: int
    x: mx.array  # (B, h, w, 16) float32, evaluated
    timestep: mx.array  # () activation dtype, the key of the modulation cache
    sigma: mx.array  # () float32
    is_final: bool


def euler_steps(
    pipeline: Pipeline, text: TextConditioning, noise: mx.array, num_steps: int, cfg_weight: float
) -> Generator[EulerStep, None, None]:
    """Sample B images by the Euler method (Karras et al. 2022, Algorithm 2), and yield num_steps + 1 states.

    text: R rows; noise (B, h, w, 16). The modulation cache lives as long as the generator: close it (or run
    it to its end) before the model is used for anything else. For B = 1 every state equals that of
    DiffusionKit's `sample_euler` bit for bit.
    """
    images = noise.shape[0]
    rows_per_image = text.pooled.shape[0] // images
    sigmas, timesteps = sigma_schedule(pipeline, num_steps)
    start = pipeline.get_empty_latent(*noise.shape[1:3])
    x = pipeline.sampler.noise_scaling(sigmas[0], noise, start, pipeline.max_denoise(sigmas))
    mx.eval(x)

    def rows_of(array: mx.array, group: slice) -> mx.array:
        return mx.concatenate(
            [array[r * images + group.start : r * images + group.stop] for r in range(rows_per_image)]
        )

    tokens = [rows_of(text.tokens, group) for group in row_groups(images)]
    pooled = [rows_of(text.pooled, group) for group in row_groups(images)]
    mx.eval(tokens, pooled)
    denoise = CFGDenoiser(pipeline)
    with side_by_side(images) as groups, modulation_cache(pipeline, pooled, timesteps) as select:
        for i in range(num_steps):
            yield EulerStep(i, x, timesteps[i], sigmas[i], is_final=False)
            parts = []
            for index, (group, stream) in enumerate(groups):
                select(index)
                with mx.stream(stream):
                    part = x[group]
                    denoised = denoise(part, timesteps[i], sigmas[i], tokens[index], cfg_weight=cfg_weight)
                    derivative = (part - denoised) / append_dims(sigmas[i], part.ndim)
                    parts.append(part + derivative * (sigmas[i + 1] - sigmas[i]))
            x = parts[0] if len(parts) == 1 else mx.concatenate(parts)
            mx.eval(x)
        yield EulerStep(num_steps, x, timesteps[num_steps], sigmas[num_steps], is_final=True)


def decode_latents(pipeline: Pipeline, x: mx.array, image_ids: Sequence[int] | None = None) -> list[Image.Image]:
    """Turn finished latents (B, h, w, 16) in model space into B RGB images, one decoder pass each.

    image_ids: the names of the images in an error (default: 0 …). Raises ModelError when a pixel is not finite, because
    as an integer it would be black or white.
    """
    images = []
    for row in range(x.shape[0]):
        latent = pipeline.latent_format.process_out(x[row : row + 1]).astype(pipeline.activation_dtype)
        pixels = decode(pipeline.decoder, latent)[0].astype(mx.float32)
        if not mx.isfinite(pixels).all().item():
            what = "the decoded pixels" if mx.isfinite(latent).all().item() else "the finished latent's values"
            image = row if image_ids is None else image_ids[row]
            raise ModelError(f"image {image}: {what} hold NaN or infinity; {not_finite_advice(pipeline)}")
        pixels = mx.clip(pixels / 2 + 0.5, 0, 1)  # as DiffusionKit's decode_latents_to_image
        images.append(Image.fromarray(np.array((pixels * 255).astype(mx.uint8))))
    return images


def not_finite_advice(pipeline: Pipeline) -> str:
    """Advise what to try when numbers overflow in this precision."""
    if pipeline.activation_dtype == mx.float32:
        return "try a smaller --cfg-weight, or another copy of the model"
    return "try --dtype float32 in stage 1, or a smaller --cfg-weight"
