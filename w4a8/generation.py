"""Stage 1's run: sample the batches that are left, write their samples and images, and keep the manifest up to date."""

import time
from collections.abc import Container, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from calibration_store.errors import StoreError
from calibration_store.files import BackgroundWriter, write_png
from calibration_store.layout import CalibrationPaths
from calibration_store.manifest import image_identity, saved_steps, write_manifest
from calibration_store.pictures import picture_chunks
from calibration_store.samples import sample_arrays, write_sample
from w4a8.backend.estimates import Estimate
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.backend.progress import ProgressBar, progress_bar
from w4a8.generation_plan import batches_to_do, bytes_to_do
from w4a8.model.memory_needs import needs_of, refuse_too_large
from w4a8.model.parts import DECODER, TRANSFORMER, Pipeline, to_numpy
from w4a8.model.prompt_encoder import PromptEncoder
from w4a8.model.sampling import EulerStep, decode_latents, euler_steps, initial_noise


def prepare(
    pipeline: Pipeline, plan: Mapping[str, Any], batches: Sequence[Sequence[dict]], text_group: int | None
) -> tuple[PromptEncoder, bool]:
    """Encode the first prompts and read every part of the model; return the encoder of all prompts, and `together`.

    batches: those that will be sampled, in order; text_group: the number of prompts that are encoded at once, None:
    chosen by memory. `together` says whether transformer and decoder fit into memory at the same time. Raises a
    UserError for a model that does not fit and for damaged weights; nothing is deleted or written before.
    """
    guidance, size = plan["cfg_scale"], plan["batch_size"]
    needs = needs_of(pipeline, plan["latent_size"], size, guidance > 0, plan["num_steps"] + 1)
    together = refuse_too_large(pipeline, needs, size, what_takes_less(plan))
    texts = PromptEncoder(pipeline, prompts_of(batches), guidance, plan["negative_prompt"], text_group)
    texts.encode(prompts_of(batches[:1]))
    if plan["save_images"]:
        pipeline.load(DECODER)
        pipeline.drop(*(() if together else (DECODER,)))
    pipeline.load(TRANSFORMER)
    return texts, together


def prompts_of(batches: Sequence[Sequence[dict]]) -> list[str]:
    """Return the prompts of the images of all batches, in order."""
    return [image["prompt"] for batch in batches for image in batch]


def what_takes_less(plan: Mapping[str, Any]) -> list[str]:
    """Return the options of stage 1 that would make this run take less memory."""
    can = {
        "--no-t5": plan["use_t5"],
        "--dtype": plan["activation_dtype"] == "float32",
        "--no-images": plan["save_images"],
    }
    return ["--batch-size", "--latent-size", *(option for option, possible in can.items() if possible)]


def generate(
    pipeline: Pipeline, texts: PromptEncoder, paths: CalibrationPaths, plan: dict[str, Any], complete: dict[int, dict],
    together: bool, bar: ProgressBar, ranks: SingleProcess = SINGLE_PROCESS,
) -> None:  # fmt: skip
    """Sample every incomplete batch, and write its samples and images.

    An image enters `complete` and the manifest once its files are on the disk. Each rank samples its own batches; rank
    0 writes the manifest, which lists the other ranks' images when all are done. together: the result of `prepare`.
    """
    kept = set(saved_steps(plan["num_steps"], plan["stride"]))
    if ranks.rank == 0:
        write_manifest(paths, plan, complete)
    with BackgroundWriter(pending=2 * plan["batch_size"]) as writer:
        for batch in batches_to_do(plan, complete, ranks):
            steps_bar = progress_bar(plan["num_steps"], "steps", "step", leave=False)
            with steps_bar, closing(sample_batch(pipeline, texts, plan, batch, plan["num_steps"])) as steps:
                for step in steps:
                    if step.step_index in kept:
                        write_latents(writer, paths, plan, batch, step, complete)
                    steps_bar.update(step.step_index > 0)
            if plan["save_images"]:
                with decoding(pipeline, together):
                    write_images(writer, paths, pipeline, batch, step.x, complete)
            writer.drain()
            new = {image["image_id"]: image for image in batch if image["image_id"] not in complete}
            complete.update(new)
            if ranks.rank == 0:
                write_manifest(paths, plan, complete)
            ranks.advance(bar, len(new))
    if ranks.size > 1:
        ranks.complete(bar)
        complete.update({image["image_id"]: image for image in plan["images"]})
        if ranks.rank == 0:
            write_manifest(paths, plan, complete)


def sample_batch(
    pipeline: Pipeline, texts: PromptEncoder, plan: dict[str, Any], batch: list[dict], num_steps: int
) -> Generator[EulerStep, None, None]:
    """Return a generator of the Euler steps of one batch of images.

    A short last batch is filled up with its last image. The bytes of an image then depend on its place in a batch of
    the run's size and on nothing else, also when the run grows later.
    """
    cfg_weight = plan["cfg_scale"]
    batch = batch + batch[-1:] * (plan["batch_size"] - len(batch))
    text = texts.encode([image["prompt"] for image in batch])
    noise = mx.concatenate([initial_noise(image["seed"], tuple(plan["latent_size"])) for image in batch])
    return euler_steps(pipeline, text, noise, num_steps, cfg_weight)


def write_latents(
    writer: BackgroundWriter, paths: CalibrationPaths, plan: Mapping[str, Any], batch: list[dict], step: EulerStep,
    complete: Container[int],
) -> None:  # fmt: skip
    """Hand the samples of one step to the writer, in the dtype of the model's input.

    complete: the image_ids whose files are on the disk; they are not written again. Raises StoreError where a latent
    holds NaN or infinity.
    """
    dtype = plan["activation_dtype"]
    x = to_numpy(step.x.astype(getattr(mx, dtype)))
    finite = np.isfinite(x).all(axis=(1, 2, 3))
    if not finite[: len(batch)].all():
        image = batch[int(np.argmin(finite))]["image_id"]
        way = (
            "a smaller --cfg-weight or another copy of the model"
            if dtype == "float32"
            else "--dtype float32 or a smaller --cfg-weight"
        )
        raise StoreError(f"step {step.step_index} of image {image} holds NaN or infinity; try {way}")
    timestep, sigma = to_numpy(step.timestep), float(step.sigma)
    for row, image in enumerate(batch):
        if image["image_id"] not in complete:
            arrays = sample_arrays(x[row : row + 1], timestep, sigma, step.step_index, image["image_id"], step.is_final)
            writer.submit(write_sample, paths, arrays, image_identity(plan, image["image_id"]))


@contextmanager
def decoding(pipeline: Pipeline, together: bool) -> Iterator[None]:
    """Make room for the decoder in the block, and for the transformer after it, unless both fit into memory."""
    pipeline.drop(*(() if together else (TRANSFORMER,)))
    yield
    pipeline.drop(*(() if together else (DECODER,)))


def write_images(
    writer: BackgroundWriter,
    paths: CalibrationPaths,
    pipeline: Pipeline,
    batch: list[dict],
    x: mx.array,
    complete: Container[int],
) -> None:
    """Decode finished latents x (images, h, w, 16) and hand the PNG files to the writer.

    complete: the image_ids whose files are on the disk; they are not written again.
    """
    for row, image in enumerate(batch):
        if image["image_id"] not in complete:
            picture = decode_latents(pipeline, x[row : row + 1], [image["image_id"]])[0]
            writer.submit(write_png, paths.image(image["image_id"]), picture, picture_chunks(image))


def estimate_generation(
    pipeline: Pipeline, texts: PromptEncoder, paths: CalibrationPaths, plan: dict[str, Any], complete: dict[int, dict],
    together: bool, ranks: SingleProcess,
) -> Estimate:  # fmt: skip
    """Estimate what is left of a run from this process's first batch: its set-up, two steps and one decoded image."""
    batches = batches_to_do(plan, complete, ranks)
    missing = plan["num_images"] - len(complete)
    return Estimate(
        work=f"{missing} of {plan['num_images']} images",
        seconds=_probe_seconds(pipeline, texts, plan, batches, together) if batches else 0.0,
        bytes_written=bytes_to_do(plan, pipeline.info, missing),
        folder=paths.root,
        peak_bytes=mx.get_peak_memory(),
    )


def _probe_seconds(
    pipeline: Pipeline, texts: PromptEncoder, plan: dict[str, Any], batches: list[list[dict]], together: bool
) -> float:
    with closing(sample_batch(pipeline, texts, plan, batches[0], 1)) as steps:
        next(steps)  # a warm-up that reads the weights into memory and compiles the adaLN kernels
    marks = [time.perf_counter()]
    with closing(sample_batch(pipeline, texts, plan, batches[0], 2)) as steps:
        for step in steps:
            marks.append(time.perf_counter())
    setup_seconds, step_seconds = marks[1] - marks[0], marks[-1] - marks[-2]
    cached_timesteps = 3  # two steps and the finished latent; a whole run caches num_steps + 1
    per_batch = setup_seconds * (plan["num_steps"] + 1) / cached_timesteps + step_seconds * plan["num_steps"]
    decode_seconds = 0.0
    if plan["save_images"]:
        start = time.perf_counter()
        with decoding(pipeline, together):
            decode_latents(pipeline, step.x[:1])
        decode_seconds = time.perf_counter() - start
    return len(batches) * per_batch + sum(map(len, batches)) * decode_seconds
