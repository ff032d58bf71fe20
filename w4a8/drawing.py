"""draw_images.py: prompts to pictures, from any model, and two models side by side."""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from PIL import Image

from calibration_store.errors import OptionError
from calibration_store.files import write_png
from calibration_store.layout import DrawingPaths, QuantizedModelPaths
from calibration_store.pictures import drawing_chunks
from calibration_store.quantized_model import EXPORT, read_activations
from w4a8.backend.progress import ProgressBar
from w4a8.evaluation.drawn_images import quantized_steps
from w4a8.evaluation.metrics import image_metrics
from w4a8.generation import check_guidance, check_latent_size, decoding
from w4a8.model.catalog import ModelInfo, choose_dtype, model_files
from w4a8.model.layers import model_layers
from w4a8.model.loading import check_folder, load_pipeline
from w4a8.model.memory_needs import needs_of, refuse_too_large
from w4a8.model.parts import TRANSFORMER, Pipeline, whole_model
from w4a8.model.prompt_encoder import PromptEncoder, check_prompts
from w4a8.model.sampling import check_seeds, decode_latents, euler_steps, initial_noise
from w4a8.options import DrawingOptions
from w4a8.quantized.activation_rules import ActivationRule
from w4a8.quantized.exported import rule_of_export


@dataclass(frozen=True)
class Plan:
    """What is drawn: the same for every model."""

    prompts: list[str]
    seed: int
    num_steps: int
    cfg_weight: float
    negative_prompt: str
    latent_size: tuple[int, int]
    batch_size: int
    use_t5: bool | None
    dtype: str
    native: str


@dataclass(frozen=True)
class Drawing:
    """What a model drew, and what it took; images (N, H, W, 3) uint8; seconds an image, without the first batch if there are more."""

    model: str
    images: np.ndarray
    seconds: float
    peak_bytes: int
    simulated: str | None


def plan_drawing(options: DrawingOptions, infos: Sequence[ModelInfo], prompts: list[str], seed: int) -> Plan:
    """Return what is drawn; defaults come from the first model. Raises OptionError for what one of the models cannot draw."""
    first = infos[0]
    cfg_weight = first.cfg_weight if options.cfg_weight is None else options.cfg_weight
    latent_size = options.latent_size or first.latent_size
    for info in infos:
        check_latent_size(info, latent_size)
        check_guidance(info, cfg_weight)
        check_folder(info, bool(options.use_t5), None)
        if info.vae_downscale != first.vae_downscale:
            raise OptionError(f"--compare {info.version}: its images have another size")
    if options.negative_prompt and cfg_weight <= 1:
        raise OptionError("--negative-prompt needs --cfg-weight above 1: DiffusionKit ignores it otherwise")
    check_seeds(seed, len(prompts))
    return Plan(
        prompts=prompts,
        seed=seed,
        num_steps=options.num_steps or first.num_steps,
        cfg_weight=cfg_weight,
        negative_prompt=options.negative_prompt,
        latent_size=latent_size,
        batch_size=min(options.batch_size, len(prompts)),
        use_t5=options.use_t5,
        dtype=choose_dtype(first, options.dtype),
        native=options.native,
    )


def load_model(info: ModelInfo, plan: Plan, activations: bool) -> tuple[Pipeline, ActivationRule | None]:
    """A whole model, its prompts checked, and with `activations` the rule that its folder holds for the inputs."""
    mx.reset_peak_memory()
    rule = None
    if activations:
        ranges = None if info.folder is None else QuantizedModelPaths(info.folder).activations
        if ranges is None or not os.path.lexists(ranges):
            raise OptionError(
                f"--activations: {info.version} has no activations.json, which stage 5 writes: {EXPORT} --activations a8"
            )
        rule = rule_of_export(read_activations(info.folder), ranges)
    use_t5 = info.use_t5 if plan.use_t5 is None else plan.use_t5
    pipeline = load_pipeline(info, whole_model(choose_dtype(info, plan.dtype)), use_t5, lazy=True, native=plan.native)
    if rule is not None:
        rule.check("--activations", model_layers(pipeline.mmdit))
    check_prompts(pipeline, plan.prompts)
    check_prompts(pipeline, [plan.negative_prompt], "--negative-prompt")
    return pipeline, rule


def draw(
    pipeline: Pipeline, info: ModelInfo, plan: Plan, rule: ActivationRule | None, paths: DrawingPaths, compared: bool,
    bar: ProgressBar,
) -> Drawing:  # fmt: skip
    """Draw every prompt and write each picture as it is finished. A short last batch is filled up with its last image."""
    images: list[np.ndarray] = []
    needs = needs_of(pipeline, plan.latent_size, plan.batch_size, plan.cfg_weight > 0, plan.num_steps + 1)
    together = refuse_too_large(pipeline, needs, plan.batch_size, ("--batch-size", "--no-t5", "--latent-size"))
    texts = PromptEncoder(pipeline, plan.prompts, plan.cfg_weight, plan.negative_prompt, None)
    texts.encode(plan.prompts[:1])
    pipeline.load(TRANSFORMER)
    marks = [time.perf_counter()]
    for start in range(0, len(plan.prompts), plan.batch_size):
        prompts = plan.prompts[start : start + plan.batch_size]
        filled = prompts + prompts[-1:] * (plan.batch_size - len(prompts))
        seeds = [plan.seed + start + min(row, len(prompts) - 1) for row in range(plan.batch_size)]
        text = texts.encode(filled)
        noise = mx.concatenate([initial_noise(seed, plan.latent_size) for seed in seeds])
        with contextlib.closing(euler_steps(pipeline, text, noise, plan.num_steps, plan.cfg_weight)) as states:
            for state in quantized_steps(pipeline, states, rule, 2 if plan.cfg_weight > 0 else 1):
                last = state
        with decoding(pipeline, together):
            pictures = decode_latents(pipeline, last.x[: len(prompts)], range(start, start + len(prompts)))
        for index, picture in enumerate(pictures, start):
            write_png(paths.image(index, compared), picture, chunks_of(plan, index, picture, info.version))
            images.append(np.asarray(picture))
            bar.update()
        marks.append(time.perf_counter())
    seconds = np.diff(marks)[1:] if len(marks) > 2 else np.diff(marks)  # the first compiles what a GPU needs
    simulated = None if rule is None else f"A{rule.exported()['bits']}"
    return Drawing(info.version, np.stack(images), seconds.mean() / plan.batch_size, mx.get_peak_memory(), simulated)


def chunks_of(plan: Plan, index: int, picture: Image.Image, model: str) -> dict[str, str]:
    """What an image's PNG says of itself."""
    return drawing_chunks(
        index, plan.prompts[index], plan.negative_prompt, plan.seed + index, plan.num_steps, plan.cfg_weight, picture.size, model
    )  # fmt: skip


def compare_drawings(first: Drawing, second: Drawing) -> dict[str, np.ndarray]:
    """PSNR in dB and SSIM of every pair, (N,)."""
    return image_metrics(second.images, first.images)


def transformer_bytes(info: ModelInfo) -> int | None:
    """Size of the file that the transformer is in; None where it is not here."""
    files = model_files(info, use_t5=False)
    return None if files is None else files["mmdit"].stat().st_size
