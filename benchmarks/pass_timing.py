"""Build a pass of the transformer, of the bundled model or of SD3-Medium's size, and time several ways to run it."""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_reduce

from w4a8.model.catalog import default_dtype, describe_model
from w4a8.model.diffusionkit import MMDiT
from w4a8.model.dual_attention import empty_transformer
from w4a8.model.families import family_of
from w4a8.model.loading import TEXT, TRANSFORMER, Pipeline, load_pipeline
from w4a8.model.modulation import modulation_cache
from w4a8.model.prompt_encoder import TextConditioning, encode_prompts
from w4a8.model.replay import Replay
from w4a8.model.sampling import initial_noise, sigma_schedule
from w4a8.passes import Pass

SD3_MEDIUM = "argmaxinc/mlx-stable-diffusion-3-medium"


def random_transformer(dtype: mx.Dtype, model: str = SD3_MEDIUM, **sizes: Any) -> MMDiT:
    """Return a transformer of a hub model's size with random weights; sizes change entries of its config."""
    mmdit = empty_transformer(dataclasses.replace(family_of(model).config, **sizes))
    mmdit.update(tree_map(lambda array: array.astype(dtype), mmdit.parameters()))
    mx.eval(mmdit.parameters())
    return mmdit


def weight_bytes(module: nn.Module) -> int:
    """Return the number of bytes of a module's parameters."""
    return tree_reduce(lambda total, array: total + array.nbytes, module.parameters(), 0)


class RandomPipeline(Pipeline):
    """SD3-Medium's transformer with random weights: it computes as the real one does, and costs no download."""

    def read(self, part: str) -> None:
        """Make the transformer, the only part that there is."""
        self.mmdit = random_transformer(self.activation_dtype)

    def explained(self) -> AbstractContextManager[None]:
        """Add nothing to errors: there are no files."""
        return nullcontext()


@contextmanager
def one_pass(size: str, text_tokens: int, latent_size: int = 64, alone: bool = False) -> Iterator[Pass]:
    """Yield a pass of sd3-emoji, or of SD3-Medium with random weights and inputs.

    alone: drop the text encoders first, and count MLX's peak memory from then on.
    """
    dtype = default_dtype()
    if size == "sd3-emoji":
        pipeline = load_pipeline(describe_model(size), {TRANSFORMER: dtype, TEXT: dtype})
        text = encode_prompts(pipeline, ["rocket"], 4.0)
        if alone:
            pipeline.drop(TEXT)
            mx.reset_peak_memory()
        latent = initial_noise(0, (16, 16)).astype(pipeline.activation_dtype)
        timestep = sigma_schedule(pipeline, 50)[1][10]
    else:
        pipeline = RandomPipeline(describe_model(SD3_MEDIUM), {TRANSFORMER: dtype}, use_t5=False)
        shapes = ((2, text_tokens, 4096), (2, 2048), (1, latent_size, latent_size, 16))
        tokens, pooled, latent = (
            mx.random.normal(shape, key=mx.random.key(seed)).astype(pipeline.activation_dtype)
            for seed, shape in enumerate(shapes)
        )
        text, timestep = TextConditioning(tokens, pooled), mx.array(700.0).astype(pipeline.activation_dtype)
    sample = {"x": np.array(latent), "timestep": np.array(timestep)}
    with modulation_cache(pipeline, [text.pooled], timestep[None]):
        yield Pass(pipeline, 0, 0, sample, Replay(pipeline, text))


def compare(ways: Mapping[str, Callable[[], None]], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Run the ways in turns; return the median seconds of each, and its median peak bytes above the memory in use before."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            gc.collect()
            mx.synchronize()
            active = mx.get_active_memory()
            mx.reset_peak_memory()
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
            peaks[name].append(mx.get_peak_memory() - active)
    return {name: median(all_of) for name, all_of in seconds.items()}, {
        name: median(all_of) for name, all_of in peaks.items()
    }
