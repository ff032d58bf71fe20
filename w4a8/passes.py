"""Passes of the model at latents that stage 1 stored; stages 2W and 2A record them."""

import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from calibration_store.errors import OptionError
from calibration_store.layout import CalibrationPaths
from calibration_store.manifest import run_identity, select_images, select_steps
from calibration_store.samples import read_sample
from w4a8 import __version__
from w4a8.backend.parallel import SMALL, threads_for, working_cores
from w4a8.backend.progress import progress_bar
from w4a8.backend.words import shortened
from w4a8.effort import Effort, late_steps
from w4a8.model.memory_needs import needs_of, refuse_too_large
from w4a8.model.parts import Pipeline
from w4a8.model.prompt_encoder import PromptEncoder, TextConditioning
from w4a8.model.replay import Replay, modulated, replaying
from w4a8.model.runs import run_schedule
from w4a8.options import CacheOptions

_Result = TypeVar("_Result")


class SampleId(NamedTuple):
    """The image and the step of a stored sample; equal to the plain tuple of both."""

    image_id: int
    step: int  # index of the step, 0 at the noisiest latent


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
        """The sample's image and step, in words."""
        return f"step {self.step} of image {self.image_id}"

    def forward(self) -> mx.array:
        """Return the transformer's output (R, h, w, 16), unevaluated; R = 2 rows with guidance, else 1."""
        return self.replay.forward(self.sample["x"], self.sample["timestep"])

    def modulation_input(self) -> mx.array:
        """Return the input of every adaLN layer, (R, 1, 1, hidden), unevaluated."""
        return self.replay.modulation_input(self.sample["timestep"])


@dataclass(frozen=True)
class PassBatch:
    """Several samples in one pass, of any images and steps: row r·samples + i of its arrays belongs to sample i.

    Its arrays differ from those of each sample's own pass by float noise.
    """

    pipeline: Pipeline
    sample_ids: Sequence[SampleId]
    samples: Sequence[Mapping[str, np.ndarray]]
    text: TextConditioning

    @property
    def where(self) -> str:
        """The samples' images, in words."""
        (first, step), (last, _) = self.sample_ids[0], self.sample_ids[-1]
        return f"step {step} of image {first}" if len(self.sample_ids) == 1 else f"images {first} to {last}"

    @property
    def _rows(self) -> int:
        """R: 2 rows a sample with guidance, else 1."""
        return len(self.text.pooled) // len(self.sample_ids)

    def forward(self) -> mx.array:
        """Return the transformer's output (R·samples, h, w, 16), unevaluated."""
        latents = np.concatenate([sample["x"] for sample in self.samples] * self._rows)
        with modulated(self.pipeline.mmdit, self.modulation_input()):
            return self.pipeline.mmdit(
                latent_image_embeddings=mx.array(latents, self.text.tokens.dtype),
                token_level_text_embeddings=mx.expand_dims(self.text.tokens, 2),
                timestep=mx.zeros((1,)),
            )

    def modulation_input(self) -> mx.array:
        """Return the input of every adaLN layer, (R·samples, 1, 1, hidden), unevaluated."""
        timesteps = np.concatenate([sample["timestep"][None] for sample in self.samples] * self._rows)
        mmdit = self.pipeline.mmdit
        return mmdit.y_embedder(self.text.pooled)[:, None, None, :] + mmdit.t_embedder(
            mx.array(timesteps, self.text.pooled.dtype)
        )


# Elements of a GPU's token arrays below which passes cost the same, and the largest number of samples in a pass.
LAUNCH_BOUND, MOST_AT_ONCE = 2**22, 64


@dataclass(frozen=True)
class StoredPasses:
    """Passes at samples of a calibration run; `open` makes them."""

    pipeline: Pipeline
    latent_size: tuple[int, int]
    rows: int  # of a pass of one sample: 2 with guidance, else 1
    prompts: dict[int, str]  # by image_id, in the order of the run
    texts: PromptEncoder
    read: Callable[[SampleId], Mapping[str, np.ndarray]]  # raises StoreError for a missing or damaged sample

    @classmethod
    def open(
        cls, pipeline: Pipeline, calib_dir: Path, manifest: dict[str, Any], images: Sequence[Mapping[str, Any]],
        text_group: int | None = None,
    ) -> "StoredPasses":  # fmt: skip
        """Check that a pass fits into memory, and encode the first prompts.

        images: the manifest's entries of the images that are used; the prompts of text_group images (None: by memory)
        are encoded at once. Raises OptionError where a pass does not fit.
        """
        size, guidance = manifest["latent_size"], manifest["cfg_scale"]
        refuse_too_large(pipeline, needs_of(pipeline, size, 1, guidance > 0, manifest["num_steps"] + 1), 1, ())
        prompts = {image["image_id"]: image["prompt"] for image in images}
        texts = PromptEncoder(pipeline, list(prompts.values()), guidance, manifest["negative_prompt"], text_group)
        texts.encode([images[0]["prompt"]])
        schedule, paths = run_schedule(manifest), CalibrationPaths(calib_dir)

        def read(sample_id: SampleId) -> Mapping[str, np.ndarray]:
            return read_sample(paths, manifest, *sample_id, schedule)

        return cls(pipeline, size, 2 if guidance > 0 else 1, prompts, texts, read)

    def check(self, sample_ids: Sequence[SampleId]) -> None:
        """Read samples before an earlier run's files are removed. Raises StoreError for a missing or damaged one."""
        with progress_bar(len(sample_ids), "checking the samples", "sample", leave=False) as bar:
            for sample_id in sample_ids:
                self.read(sample_id)
                bar.update()

    def over(self, sample_ids: Sequence[SampleId]) -> Generator[Pass, None, None]:
        """Yield a pass for every sample; the samples are ordered by image.

        Hooks go inside the loop; close the generator when you leave early.
        """
        with closing(self.groups(sample_ids, 1)) as groups:
            for (one,) in groups:
                yield one

    def groups(self, sample_ids: Sequence[SampleId], count: int) -> Generator[list[Pass], None, None]:
        """Yield the passes of `over`, `count` at most of an image at once, for work side by side."""
        for image_id, group in groupby(sample_ids, key=lambda sample_id: sample_id.image_id):
            steps = [step for _, step in group]
            samples = [self.read(SampleId(image_id, step)) for step in steps]
            text = self.texts.encode([self.prompts[image_id]])
            with (
                replaying(self.pipeline, text, [sample["timestep"] for sample in samples]) as replay,
                threads_for(self._token_elements()),
            ):
                own = [
                    Pass(self.pipeline, image_id, step, sample, replay)
                    for step, sample in zip(steps, samples, strict=True)
                ]
                for start in range(0, len(own), count):
                    yield own[start : start + count]

    def side_by_side(self) -> int:
        """Return the number of passes that run at the same time: one a core where a second thread is of no use to a pass."""
        return working_cores() if self._token_elements() <= SMALL else 1

    def _token_elements(self) -> int:
        """Return the number of elements in the token arrays (R, tokens, hidden) of one sample's pass."""
        config, (height, width) = self.pipeline.mmdit_config, self.latent_size
        tokens = height * width // config.patch_size**2 + self.pipeline.text_tokens
        return self.rows * tokens * config.hidden_size

    def samples_at_once(self) -> int:
        """Return the number of samples in one pass that cost a GPU no more than a single one; 1 on a CPU."""
        if mx.default_device() == mx.Device(mx.cpu):
            return 1
        return max(1, min(MOST_AT_ONCE, LAUNCH_BOUND // self._token_elements()))

    def batches(self, sample_ids: Sequence[SampleId], size: int) -> Iterator[PassBatch]:
        """Yield passes over `size` samples at once, which may belong to several images."""
        for start in range(0, len(sample_ids), size):
            chosen = sample_ids[start : start + size]
            text = self.texts.encode([self.prompts[image_id] for image_id, _ in chosen])
            yield PassBatch(self.pipeline, chosen, list(map(self.read, chosen)), text)

    def probe(self, step: int, work: Callable[[Pass], _Result]) -> tuple[float, _Result]:
        """Return the seconds of `work` in its second run on the first image's pass at a step, and its result."""
        with closing(self.over([SampleId(next(iter(self.prompts)), step)])) as passes:
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
    """Return the images that a stage uses, and the entries of its plan about this choice.

    before: the plan that --resume goes on with, whose images stay; steps: the steps to use in place of every stride-th.
    Raises StoreError when the run is unfinished or has fewer images.
    """
    images = select_images(manifest, num_images, before["selected_image_ids"] if before else None)
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
    """Read `--steps 8,12,16-19` as step indices; None where the option is not given.

    Raises OptionError for a step that stage 1 did not save.
    """
    if text is None:
        return None
    saved = select_steps(manifest, 1)
    found: set[int] = set()
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


FEWEST_STEPS = 4  # steps of each image, while a budget leaves images out
DISK_SHARE, MOST_CACHED = 0.25, 16e9  # share of the free disk, and bytes, that a cache takes where no budget is given


def default_budget(folder: Path) -> int:
    """Return the bytes that a cache in this folder takes at most where --max-bytes does not say."""
    return int(min(DISK_SHARE * shutil.disk_usage(folder).free, MOST_CACHED))


def choose_amount(
    options: CacheOptions,
    effort: Effort,
    manifest: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    sample_bytes: int,
) -> tuple[int, int, list[int] | None]:
    """Choose (number of images, stride, steps or None).

    They are the given ones, or those of the plan before, which --resume goes on with. Else they are as many as fit
    --max-bytes, images first, or without it all images that fit `default_budget`, with the effort's late steps. With steps
    the stride is 1. Raises OptionError as `chosen_steps` does.
    """
    num_images, stride = options.num_images, options.stride
    steps = chosen_steps(manifest, options.steps)
    if before is not None:
        if options.is_given("effort") and stride is None and steps is None and options.max_bytes is None:
            steps = late_steps(select_steps(manifest, 1), manifest["num_steps"], effort.steps)
        elif stride is None and steps is None:
            stride, steps = before["stride"], before["key_timesteps"]
        return num_images or before["num_images"], stride or 1, steps
    budget = default_budget(options.calib_dir) if options.max_bytes is None else options.max_bytes
    fitting, most, saved = max(1, budget // sample_bytes), len(manifest["images"]), select_steps(manifest, 1)
    if steps is None and stride is None and options.max_bytes is None:
        steps = late_steps(saved, manifest["num_steps"], effort.steps)
    if steps is not None:
        return num_images or min(max(1, fitting // len(steps)), most), 1, steps
    steps_of = {each: len(select_steps(manifest, each)) for each in range(1, len(saved) + 1)}
    if num_images is None:
        few_steps = min(FEWEST_STEPS, len(saved)) if stride is None else steps_of.get(stride, 1)
        num_images = min(max(1, fitting // few_steps), most)
    if stride is None:
        stride = next((each for each, count in steps_of.items() if num_images * count <= fitting), len(saved))
    return num_images, stride, None


def say_how_few(chosen: int, images: int, resumed: bool) -> str:
    """Return a sentence about a cache of fewer images than the run has; resumed: an earlier command chose them."""
    few = f"{chosen} of {images} images"
    return f"This cache was begun with {few}." if resumed else f"{few} fit; a larger --max-bytes allows more."


def sample_ids_of(plan: Mapping[str, Any]) -> list[SampleId]:
    """Return every sample of a plan, image by image."""
    return [SampleId(image_id, step) for image_id in plan["selected_image_ids"] for step in plan["key_timesteps"]]
