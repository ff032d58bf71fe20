"""The error of finished latents: the last steps of sampling, unrolled, with their gradients a block at a time.

Errors of the last steps make the image, and errors of neighbouring steps add up or cancel, which a loss on single steps
does not see. The loss is the mean over images of the logarithm of the latent's squared error, as PSNR is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from calibration_store.layout import CalibrationPaths
from calibration_store.manifest import read_manifest, saved_steps
from calibration_store.samples import read_sample
from w4a8.backend.parallel import streams_for
from w4a8.backend.sums import summed
from w4a8.model.layers import joined_patches, run_final_layer
from w4a8.rounding.methods import Arrays
from w4a8.rounding.rest import FINAL_LAYER, placed
from w4a8.rounding.settings import Indices
from w4a8.rounding.training_samples import Samples
from w4a8.rounding.units import SMALLEST_ERROR, Gradients
from w4a8.rounding.whole_model import Passes, WholeModel

UNROLLED = 4  # steps at the end of sampling
State = Mapping[str, Arrays]


@dataclass(frozen=True)
class LastSteps:
    """The end of every image's sampling, as the original model drew it.

    begin and end: latents (images, h, w, 16) float32 before the first unrolled step and after the last one. sigmas:
    noise levels from the first unrolled step to the last latent. cached: for each image a cached sample, whose text
    tokens and modulation input are used, and its noise level; steps: for each unrolled step the nearest cached one, as
    a position in key_timesteps. cfg_weight: guidance; 0: rows of the prompt alone.
    """

    begin: np.ndarray
    end: np.ndarray
    sigmas: Sequence[float]
    cached: Sequence[int]
    cached_sigmas: Sequence[float]
    steps: Sequence[int]
    cfg_weight: float
    training: Sequence[int]
    held_out: Sequence[int]

    @classmethod
    def read(
        cls, calib_dir: Path, cache: Mapping[str, Any], samples: Samples, schedule: Sequence[float]
    ) -> "LastSteps":
        """Read the latents of the cached images that stage 1 saved. Raises StoreError where one is missing or damaged.

        cache: the block cache's metadata; schedule: noise levels of the calibration run, num_steps + 1.
        """
        manifest, images, key_steps = read_manifest(calib_dir), cache["selected_image_ids"], cache["key_timesteps"]
        first, ends = read_ends(calib_dir, manifest, images)
        of_image: dict[int, int] = {}  # the cached sample of the latest step
        for position, (image, step) in enumerate(samples.sample_ids):
            best = of_image.get(image)
            if best is None or step > samples.sample_ids[best][1]:
                of_image[image] = position
        cached = [of_image[image] for image in images]
        levels = list(schedule[first : manifest["num_steps"] + 1])
        known = np.array([schedule[step] for step in key_steps])
        nearest = [int(np.abs(known - sigma).argmin()) for sigma in levels[:-1]]
        judging = {samples.sample_ids[position][0] for position in samples.held_out}
        trained = {samples.sample_ids[position][0] for position in samples.training}
        return cls(
            ends[0], ends[1], levels, cached, [schedule[samples.sample_ids[position][1]] for position in cached], nearest,
            manifest["cfg_scale"],
            training=[at for at, image in enumerate(images) if image in trained],
            held_out=[at for at, image in enumerate(images) if image in judging],
        )  # fmt: skip


def read_ends(
    calib_dir: Path, manifest: Mapping[str, Any], images: Sequence[int]
) -> tuple[int, tuple[np.ndarray, np.ndarray]]:
    """Return the first unrolled step, and the images' latents before it and after the last step.

    It is the last saved step before the last UNROLLED ones. Latents are (images, h, w, 16) float32. Raises StoreError
    where one is missing or damaged.
    """
    paths, count = CalibrationPaths(calib_dir), manifest["num_steps"]
    saved = saved_steps(count, manifest["stride"])
    first = max((step for step in saved if step <= count - UNROLLED), default=saved[0])
    begin, end = (
        np.concatenate([read_sample(paths, manifest, image, step)["x"] for image in images]).astype(np.float32)
        for step in (first, count)
    )
    return first, (begin, end)


class FinishedLatents:
    """The loss of the finished latents of a quantized model, and its slopes along what the last phase moves."""

    def __init__(self, whole: WholeModel, last: LastSteps):
        """whole: the model; last: the end of every image's sampling."""
        self.whole, self.last, self.mmdit = whole, last, whole.mmdit

    def loss(self, images: Indices, state: State | None, with_inputs: bool = False) -> float:
        """Return the geometric mean of the finished latents' mean squared errors.

        state: a point of the training, None for round-to-nearest; with_inputs: inputs are quantized, too.
        """
        chunks, total = self.whole.settings.micro_batches(images), 0.0
        with streams_for(len(chunks)) as streams:
            for start in range(0, len(chunks), len(streams)):
                parts = chunks[start : start + len(streams)]
                found = self._sampled(state, parts, streams, with_inputs)
                for part, latents in zip(parts, found, strict=True):
                    total += float(self._logs(latents[-1], part).sum())
        return math.exp(total / len(images))

    def slopes(self, state: State, images: np.ndarray) -> tuple[mx.array, Gradients]:
        """Return the mean logarithm of the errors, and its slopes as `WholeModel.slopes` gives them."""
        whole, chunks = self.whole, self.whole.settings.micro_batches(images)
        moved = {key: state[key] for key in ("scale", "zero_point", "bias", "rest")}
        ranges = whole.learned_ranges(state)
        with streams_for(len(chunks)) as streams:
            return summed(
                whole.ranks,
                len(chunks),
                len(streams),
                lambda numbers: self._of_parts(state, [chunks[i] for i in numbers], streams, len(images)),
                (mx.array(0.0), moved | {"ranges": ranges}),
            )

    # the steps

    def _passes(
        self, parts: Sequence[Indices], streams: Sequence[mx.Stream], step: int, with_inputs: bool
    ) -> tuple[list[mx.array], Passes]:
        """Return the text tokens of each micro-batch, and the passes of an unrolled step."""
        texts, modulations, rows = [], [], []
        for part in parts:
            batch = self.whole.samples.batch([self.last.cached[image] for image in part])
            per_image = len(batch.modulation) // len(part)
            known = np.repeat([self.last.cached_sigmas[image] for image in part], per_image)
            moved = self._embedded(np.full(len(known), self.last.sigmas[step])) - self._embedded(known)
            texts.append(batch.tokens[1])
            modulations.append(batch.modulation + moved)
            rows.append(mx.full((len(known),), self.last.steps[step], mx.int32) if with_inputs else None)
        mx.eval(texts, modulations)
        return texts, Passes(modulations, rows, streams, lambda index, block: None)

    def _embedded(self, sigmas: np.ndarray) -> mx.array:
        """Return the embedding of noise levels (rows,): (rows, 1, 1, hidden)."""
        return self.mmdit.t_embedder(mx.array(np.float32(1000.0) * sigmas.astype(np.float32)))

    def _image_tokens(self, x: mx.array, rows: int) -> mx.array:
        """Return the image tokens of latents (images, h, w, 16), each for its rows: (rows, tokens, 1, hidden)."""
        x = mx.repeat(x, rows // len(x), axis=0)
        embedded = self.mmdit.x_embedder(x)
        if "x_pos_embedder" in self.mmdit:
            embedded = embedded + self.mmdit.x_pos_embedder(x)
        return embedded.reshape(len(x), -1, 1, self.mmdit.config.hidden_size)

    def _derivative(self, tokens: mx.array, rest: Arrays, modulation: mx.array, like: mx.array) -> mx.array:
        """Return the guided velocity (images, h, w, 16) of the last block's image tokens. like: latents of that shape."""
        with placed(self.whole.places[FINAL_LAYER], rest):
            patches = run_final_layer(self.mmdit, tokens, modulation)
        velocity = joined_patches(self.mmdit, patches, *like.shape[1:3])
        if self.last.cfg_weight <= 0:
            return velocity
        positive, negative = velocity[0::2], velocity[1::2]
        return negative + self.last.cfg_weight * (positive - negative)

    def _sampled(
        self, state: State | None, parts: Sequence[Indices], streams: Sequence[mx.Stream], with_inputs: bool
    ) -> list[list[mx.array]]:
        """Return the latents of each micro-batch before every unrolled step, and the finished ones."""
        rest = self.whole.rest_of(FINAL_LAYER, state)
        latents = [[mx.array(self.last.begin[np.asarray(part)])] for part in parts]
        for step in range(len(self.last.sigmas) - 1):
            texts, passes = self._passes(parts, streams, step, with_inputs)
            tokens = [[self._image_tokens(x[-1], len(text)), text] for x, text in zip(latents, texts, strict=True)]
            given = self.whole.forward(state, tokens, passes, keep=False)
            width = self.last.sigmas[step + 1] - self.last.sigmas[step]
            for index, stream in passes.ways:
                with mx.stream(stream):
                    x = latents[index][-1]
                    slope = self._derivative(given[index][-1][0], rest, passes.modulations[index], x)
                    latents[index].append(x + width * slope)
            mx.eval(latents)
        return latents

    def _logs(self, latents: mx.array, part: Indices) -> mx.array:
        """Return the logarithm of the mean squared error of finished latents (images, h, w, 16), (images,)."""
        target = mx.array(self.last.end[np.asarray(part)])
        return mx.log(mx.mean(mx.square(latents - target), axis=(1, 2, 3)) + SMALLEST_ERROR)

    # gradients, a step and a block at a time

    def _of_parts(
        self, state: State, parts: Sequence[Indices], streams: Sequence[mx.Stream], count: int
    ) -> list[tuple[mx.array, Gradients]]:
        """Return (loss, slopes) of each of some micro-batches: their shares of the mean over `count` images."""
        whole, with_inputs = self.whole, bool(self.whole.settings.activation_bits)
        latents = self._sampled(state, parts, streams, with_inputs)
        losses, slopes_of = [], []
        for index, part in enumerate(parts):
            loss, slope = mx.value_and_grad(lambda x, part=part: self._logs(x, part).sum() / count)(
                latents[index].pop()
            )
            losses.append(loss)
            slopes_of.append(slope)
        mx.eval(losses, slopes_of)
        totals: list[Gradients] = [{} for _ in parts]
        for step in reversed(range(len(self.last.sigmas) - 1)):
            texts, passes = self._passes(parts, streams, step, with_inputs)
            width = self.last.sigmas[step + 1] - self.last.sigmas[step]
            before = [each.pop() for each in latents]
            tokens = [[self._image_tokens(x, len(text)), text] for x, text in zip(before, texts, strict=True)]
            heads = [
                partial(self._weighted, modulation, like, width * slope)
                for modulation, like, slope in zip(passes.modulations, before, slopes_of, strict=True)
            ]
            _, token_slopes, found = whole.gradients(state, tokens, passes, heads)
            for index, stream in passes.ways:
                with mx.stream(stream):
                    embed = partial(self._weighted_tokens, token_slopes[index][0])
                    slopes_of[index] = slopes_of[index] + mx.grad(embed)(before[index])
                    totals[index] = found[index] if not totals[index] else tree_map(mx.add, totals[index], found[index])
            mx.eval(slopes_of, totals)
        return list(zip(losses, totals, strict=True))

    def _weighted(
        self, modulation: mx.array, like: mx.array, slope: mx.array, tokens: mx.array, rest: Arrays
    ) -> mx.array:
        """Return Σ velocity·slope: its gradients along tokens and the final layer's rest are those of the loss."""
        return (self._derivative(tokens, rest, modulation, like) * mx.stop_gradient(slope)).sum()

    def _weighted_tokens(self, slope: mx.array, x: mx.array) -> mx.array:
        """Return Σ tokens·slope of the image tokens of latents x."""
        return (self._image_tokens(x, len(slope)) * mx.stop_gradient(slope)).sum()
