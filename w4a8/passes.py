"""Passes of the model at latents that stage 1 stored: what stages 2W and 2A record from."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from calibration_store.errors import OptionError
from calibration_store.layout import CalibrationPaths
from calibration_store.manifest import run_identity, select_images, select_steps
from calibration_store.samples import read_sample
from w4a8 import __version__
from w4a8.backend.parallel import threads_for
from w4a8.backend.words import shortened
from w4a8.model.memory_needs import config_of, needs_of, refuse_too_large
from w4a8.model.parts import Pipeline
from w4a8.model.prompt_encoder import PromptEncoder, TextConditioning, text_tokens
from w4a8.model.replay import Replay, modulated, replaying
from w4a8.model.runs import run_schedule
from w4a8.options import CacheOptions

_Result = TypeVar("_Result")
SampleId = tuple[int, int]  # (image_id, step_index)


@dataclass(frozen=True)
class Pass:
    """One pass of the model, as it ran in stage 1."""

    pipeline: Pipeline
    image_id: int
    step: int
    sample: Mapping[str, np.ndarray]
    replay: Replay

    @property
    def where(self) -> str:
        return f"step {self.step} of image {self.image_id}"

    def forward(self) -> mx.array:
        """The transformer's output (R, h, w, 16), unevaluated."""
        return self.replay.forward(self.sample["x"], self.sample["timestep"])

    def modulation_input(self) -> mx.array:
        """What feeds every adaLN layer, (R, 1, 1, hidden), unevaluated."""
        return self.replay.modulation_input(self.sample["timestep"])


@dataclass(frozen=True)
class PassBatch:
    """Several samples in one pass, of any images and steps: row r·samples + i of its arrays is of sample i.

    Its figures differ from those of each sample's own pass by float noise.
    """

    pipeline: Pipeline
    places: Sequence[SampleId]
    samples: Sequence[Mapping[str, np.ndarray]]
    text: TextConditioning

    @property
    def where(self) -> str:
        (first, step), (last, _) = self.places[0], self.places[-1]
        return f"step {step} of image {first}" if len(self.places) == 1 else f"images {first} to {last}"

    @property
    def _rows(self) -> int:
        return len(self.text.pooled) // len(self.places)

    def forward(self) -> mx.array:
        """The transformer's output (R·samples, h, w, 16), unevaluated."""
        latents = np.concatenate([sample["x"] for sample in self.samples] * self._rows)
        with modulated(self.pipeline.mmdit, self.modulation_input()):
            return self.pipeline.mmdit(
                latent_image_embeddings=mx.array(latents, self.text.tokens.dtype),
                token_level_text_embeddings=mx.expand_dims(self.text.tokens, 2),
                timestep=mx.zeros((1,)),
            )

    def modulation_input(self) -> mx.array:
        """What feeds every adaLN layer, (R·samples, 1, 1, hidden), unevaluated."""
        timesteps = np.concatenate([sample["timestep"][None] for sample in self.samples] * self._rows)
        mmdit = self.pipeline.mmdit
        return mmdit.y_embedder(self.text.pooled)[:, None, None, :] + mmdit.t_embedder(
            mx.array(timesteps, self.text.pooled.dtype)
        )


LAUNCH_BOUND, MOST_AT_ONCE = (
    2**22,
    64,
)  # elements of a GPU's token arrays below which passes cost the same; samples at most


@dataclass(frozen=True)
class StoredPasses:
    """Passes at samples of a calibration run; images: the manifest's entries of those that are used.

    The prompts of text_group images (None: by memory) are encoded at once, the first before anything else.
    """

    pipeline: Pipeline
    calib_dir: Path
    manifest: Mapping[str, Any]
    images: Sequence[Mapping[str, Any]]
    text_group: int | None = None

    def __post_init__(self):
        size, guidance = self.manifest["latent_size"], self.manifest["cfg_scale"] > 0
        refuse_too_large(
            self.pipeline, needs_of(self.pipeline, size, 1, guidance, self.manifest["num_steps"] + 1), 1, ()
        )
        self.texts.of([self.images[0]["prompt"]])

    @cached_property
    def texts(self) -> PromptEncoder:
        manifest, prompts = self.manifest, [image["prompt"] for image in self.images]
        return PromptEncoder(self.pipeline, prompts, manifest["cfg_scale"], manifest["negative_prompt"], self.text_group)

    def over(self, places: Sequence[SampleId]) -> Iterator[Pass]:
        """A pass for every place (ordered by image). Hooks go inside the loop; close the iterator when you leave early."""
        images = {image["image_id"]: image for image in self.images}
        schedule, paths = run_schedule(self.manifest), CalibrationPaths(self.calib_dir)
        for image_id, group in groupby(places, key=lambda place: place[0]):
            steps = [step for _, step in group]
            samples = [read_sample(paths, self.manifest, image_id, step, schedule) for step in steps]
            timesteps = [sample["timestep"] for sample in samples]
            with (
                replaying(self.pipeline, images[image_id], timesteps, self.texts) as replay,
                threads_for(replay.tokens_size(self.manifest["latent_size"])),
            ):
                for step, sample in zip(steps, samples, strict=True):
                    yield Pass(self.pipeline, image_id, step, sample, replay)

    def samples_at_once(self) -> int:
        """Samples in one pass that cost a GPU no more than one alone; 1 on a CPU."""
        if mx.default_device() == mx.Device(mx.cpu):
            return 1
        config, (height, width) = config_of(self.pipeline), self.manifest["latent_size"]
        tokens = height * width // config.patch_size**2 + text_tokens(self.pipeline)
        rows = 2 if self.manifest["cfg_scale"] > 0 else 1
        return max(1, min(MOST_AT_ONCE, LAUNCH_BOUND // (rows * tokens * config.hidden_size)))

    def batches(self, places: Sequence[SampleId], size: int) -> Iterator[PassBatch]:
        """Passes over so many places at once, which need not be of one image."""
        prompts = {image["image_id"]: image["prompt"] for image in self.images}
        schedule, paths = run_schedule(self.manifest), CalibrationPaths(self.calib_dir)
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            samples = [read_sample(paths, self.manifest, *place, schedule) for place in chosen]
            yield PassBatch(self.pipeline, chosen, samples, self.texts.of([prompts[image_id] for image_id, _ in chosen]))

    def probe(self, step: int, work: Callable[[Pass], _Result]) -> tuple[float, _Result]:
        """Seconds of `work` on the first image's pass at a step (the second of two times), and what it gave."""
        with closing(self.over([(self.images[0]["image_id"], step)])) as passes:
            first = next(passes)
            for _ in range(2):
                start = time.perf_counter()
                found = work(first)
                seconds = time.perf_counter() - start
        return seconds, found


def select_passes(
    manifest: Mapping[str, Any],
    num_images: int,
    stride: int,
    before: Mapping[str, Any] | None,
    steps: Sequence[int] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The images that a stage uses, and what its plan says of the choice; before: the plan that --resume goes on with.

    steps: those to use, instead of every stride-th.
    """
    images = select_images(manifest, num_images, before and before["selected_image_ids"])
    image_ids = [image["image_id"] for image in images]
    return images, {
        "calibration_run": run_identity(manifest, image_ids),
        "w4a8_version": __version__,
        "num_images": num_images,
        "stride": stride,
        "selected_image_ids": image_ids,
        "key_timesteps": list(steps) if steps is not None else select_steps(manifest, stride),
    }


def chosen_steps(manifest: Mapping[str, Any], text: str | None) -> list[int] | None:
    """`--steps 8,12,16-19` as step indices; None where none are given. Raises OptionError for those that were not saved."""
    if text is None:
        return None
    saved, found = select_steps(manifest, 1), set()
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if ends is None:
            raise OptionError(f"--steps {text}: step indices such as 8,12,16-19")
        found |= set(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    lacking = sorted(found - set(saved))
    if lacking or not found:
        raise OptionError(
            f"--steps {text}: step {lacking[0] if lacking else '?'} was not saved; there are {shortened(saved)}"
        )
    return sorted(found)


FEWEST_STEPS = 4  # of an image, while a budget leaves images out


def choose_amount(
    options: CacheOptions, manifest: Mapping[str, Any], before: Mapping[str, Any] | None, sample_bytes: int
) -> tuple[int, int, list[int] | None]:
    """Choose (images, stride, steps or None): as given, as a run that goes on has them, or as many as fit --max-bytes.

    Images come first, then steps; without a budget 5 images and every 5th step. With steps of their own the stride is 1.
    """
    num_images, stride, budget = options.num_images, options.stride, options.max_bytes
    steps = chosen_steps(manifest, options.steps)
    if before is not None and budget is not None:  # chosen already
        num_images, stride = num_images or before["num_images"], stride or before["stride"]
    if steps is not None:
        fitting = 5 if budget is None else max(1, min(budget // sample_bytes // len(steps), len(manifest["images"])))
        return num_images or fitting, 1, steps
    if budget is None:
        return num_images or 5, stride or 5, None
    fitting = max(1, budget // sample_bytes)
    saved = len(select_steps(manifest, 1))
    steps_of = {each: len(select_steps(manifest, each)) for each in range(1, saved + 1)}
    if num_images is None:
        few_steps = min(FEWEST_STEPS, saved) if stride is None else steps_of.get(stride, 1)
        num_images = min(max(1, fitting // few_steps), len(manifest["images"]))
    if stride is None:
        stride = next((each for each, count in steps_of.items() if num_images * count <= fitting), saved)
    return num_images, stride, None


def places_of(plan: Mapping[str, Any]) -> list[SampleId]:
    """Every (image_id, step) of a plan, image by image."""
    return [(image_id, step) for image_id in plan["selected_image_ids"] for step in plan["key_timesteps"]]
