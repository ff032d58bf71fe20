"""Draw pictures from prompts, with any model and with two models side by side (draw_images.py)."""

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
from w4a8.generation import decoding
from w4a8.generation_plan import check_latent_size
from w4a8.model.catalog import ModelError, ModelInfo, choose_dtype, describe_model, model_files
from w4a8.model.checkpoint_contents import checkpoint_files
from w4a8.model.layers import model_layers
from w4a8.model.loading import check_folder, load_pipeline
from w4a8.model.memory_needs import needs_of, refuse_too_large
from w4a8.model.parts import TRANSFORMER, Pipeline, whole_model
from w4a8.model.prompt_encoder import PromptEncoder
from w4a8.model.sampling import check_seeds, choose_guidance, choose_steps, decode_latents, euler_steps, initial_noise
from w4a8.options import DrawingOptions
from w4a8.quantized.activation_rules import ActivationRule
from w4a8.quantized.exported import rule_of_export


@dataclass(frozen=True)
class Plan:
    """Prompts, seeds and sampling, which every model shares."""

    prompts: list[str]  # of every image
    seeds: list[int]  # of every image
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
    """The images that a model drew, and the time and the memory that they took."""

    model: str
    images: np.ndarray  # (N, H, W, 3) uint8
    seconds: float  # for one image; the first batch does not count where there are more
    peak_bytes: int
    simulated: str | None  # such as A8: activations quantized in simulation


def describe_compared(name: str) -> ModelInfo:
    """Describe the model of `--compare`. Raises ModelError that names this option."""
    try:
        return describe_model(name)
    except ModelError as error:
        raise ModelError(error.message.replace("--model", "--compare")) from None


def plan_drawing(options: DrawingOptions, infos: Sequence[ModelInfo], prompts: list[str], seed: int) -> Plan:
    """Return the plan that the models share; defaults come from the first model.

    Each prompt is drawn with each of --seeds, or once: image i with seed + i.

    Raises OptionError for options that contradict each other or one of the models.
    """
    first = infos[0]
    cfg_weight = choose_guidance(first, options.cfg_weight)
    latent_size = options.latent_size or latent_size_of_pixels(first, options.width, options.height)
    for info in infos:
        check_latent_size(info, latent_size)
        choose_guidance(info, cfg_weight)
        check_folder(info, bool(options.use_t5))
        if info.vae_downscale != first.vae_downscale:
            raise OptionError(f"--compare {info.version}: its images have another size")
    if options.negative_prompt and cfg_weight <= 1:
        raise OptionError("--negative-prompt needs --cfg-weight above 1: DiffusionKit ignores it otherwise")
    if options.seeds:
        drawn = [(prompt, each) for prompt in prompts for each in options.seeds]
    else:
        check_seeds(seed, len(prompts))
        drawn = [(prompt, seed + index) for index, prompt in enumerate(prompts)]
    return Plan(
        prompts=[prompt for prompt, _ in drawn],
        seeds=[each for _, each in drawn],
        num_steps=choose_steps(first, options.num_steps),
        cfg_weight=cfg_weight,
        negative_prompt=options.negative_prompt,
        latent_size=latent_size,
        batch_size=min(options.batch_size or 1, len(drawn)),
        use_t5=options.use_t5,
        dtype=choose_dtype(first, options.dtype),
        native=options.native,
    )


def latent_size_of_pixels(info: ModelInfo, width: int | None, height: int | None) -> tuple[int, int]:
    """Return the latent size (height, width) of an image in pixels; a side that is not given is the model's own.

    Raises OptionError for a side that the model cannot draw.
    """
    sides, unit = list(info.latent_size), info.vae_downscale * info.patch_size
    for index, (name, pixels) in enumerate((("--height", height), ("--width", width))):
        most = info.max_latent_size * info.vae_downscale
        if pixels is not None:
            if pixels % unit or not unit <= pixels <= most:
                raise OptionError(f"{name} {pixels}: {info.version} draws multiples of {unit} pixels up to {most}")
            sides[index] = pixels // info.vae_downscale
    return sides[0], sides[1]


def load_model(info: ModelInfo, plan: Plan, activations: bool) -> tuple[Pipeline, ActivationRule | None]:
    """Load a whole model and check the prompts; return its pipeline, and its activation rule or None.

    activations: quantize the inputs by the rule in the folder's activations.json. Raises OptionError where there is
    none, and ModelError for a prompt that the model cannot read.
    """
    mx.reset_peak_memory()
    rule = None
    if activations:
        if info.folder is None or not os.path.lexists(ranges := QuantizedModelPaths(info.folder).activations):
            raise OptionError(
                f"--activations: {info.version} has no activations.json, which stage 5 writes: "
                f"{EXPORT} --activations a8"
            )
        rule = rule_of_export(read_activations(info.folder), ranges)
    use_t5 = info.use_t5 if plan.use_t5 is None else plan.use_t5
    pipeline = load_pipeline(info, whole_model(choose_dtype(info, plan.dtype)), use_t5, lazy=True, native=plan.native)
    if rule is not None:
        rule.check("--activations", model_layers(pipeline.mmdit))
    return pipeline, rule


def draw(
    pipeline: Pipeline, info: ModelInfo, plan: Plan, rule: ActivationRule | None, paths: DrawingPaths, compared: bool,
    bar: ProgressBar,
) -> Drawing:  # fmt: skip
    """Draw every prompt with one model, and write each picture when it is finished.

    A short last batch is filled up with its last image. compared: the pictures are those of the second model of a pair.
    """
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
        seeds = plan.seeds[start : start + plan.batch_size]
        seeds += seeds[-1:] * (plan.batch_size - len(seeds))
        text = texts.encode(filled)
        noise = mx.concatenate([initial_noise(seed, plan.latent_size) for seed in seeds])
        with contextlib.closing(euler_steps(pipeline, text, noise, plan.num_steps, plan.cfg_weight)) as states:
            for state in quantized_steps(pipeline, states, rule, 2 if plan.cfg_weight > 0 else 1):
                last = state
        with decoding(pipeline, together):
            pictures = decode_latents(pipeline, last.x[: len(prompts)], range(start, start + len(prompts)))
        for index, picture in enumerate(pictures, start):
            write_png(paths.image(index, compared), picture, chunks_of(plan, index, picture, info.title))
            images.append(np.asarray(picture))
            bar.update()
        marks.append(time.perf_counter())
    seconds = np.diff(marks)[1:] if len(marks) > 2 else np.diff(marks)  # the first batch compiles a GPU's kernels
    exported = None if rule is None else rule.exported()  # a rule that was read from an export can be exported
    simulated = None if exported is None else f"A{exported['bits']}"
    return Drawing(info.version, np.stack(images), seconds.mean() / plan.batch_size, mx.get_peak_memory(), simulated)


def chunks_of(plan: Plan, index: int, picture: Image.Image, model: str) -> dict[str, str]:
    """Return the text chunks of an image's PNG. model: the name of the model that drew it."""
    return drawing_chunks(
        index, plan.prompts[index], plan.negative_prompt, plan.seeds[index], plan.num_steps, plan.cfg_weight,
        picture.size, model,
    )  # fmt: skip


def compare_drawings(first: Drawing, second: Drawing) -> dict[str, np.ndarray]:
    """Return {"psnr", "ssim", "flip"} of every pair of images, as `image_metrics` does, (N,) each."""
    return image_metrics(second.images, first.images)


def transformer_bytes(info: ModelInfo) -> int | None:
    """Return the size of the file that holds the transformer, in bytes; None where the file is not here."""
    if info.checkpoint is not None:
        return sum(file.stat().st_size for file in checkpoint_files(info.checkpoint))
    files = model_files(info, use_t5=False)
    return None if files is None else files["mmdit"].stat().st_size
