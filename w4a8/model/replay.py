"""Run the model again as it ran at a stored latent."""

import contextlib
from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from w4a8.model.layers import model_blocks
from w4a8.model.modulation import modulation_cache
from w4a8.model.parts import Pipeline
from w4a8.model.prompt_encoder import TextConditioning


class Replay:
    """The model as it ran for one image of a calibration run. `replaying` makes the objects of this class."""

    def __init__(self, pipeline: Pipeline, text: TextConditioning):
        self._mmdit, self._dtype = pipeline.mmdit, text.tokens.dtype
        self._pooled = text.pooled
        self._tokens = mx.expand_dims(text.tokens, 2)
        self._rows = text.pooled.shape[0]

    def forward(self, x: np.ndarray, timestep: np.ndarray) -> mx.array:
        """Run the transformer on x (1, h, w, 16) at timestep (), both as stored.

        Returns its output (R, h, w, 16), unevaluated.
        """
        return self._mmdit(
            latent_image_embeddings=mx.concatenate([mx.array(x, self._dtype)] * self._rows),
            token_level_text_embeddings=self._tokens,
            timestep=mx.broadcast_to(mx.array(timestep, self._dtype), [self._rows]),
        )

    def modulation_input(self, timestep: np.ndarray) -> mx.array:
        """Return the input of every adaLN layer, pooled text plus timestep embedding (R, 1, 1, hidden), unevaluated."""
        embedded = self._mmdit.t_embedder(mx.repeat(mx.array(timestep, self._dtype)[None], self._rows, axis=0))
        return self._mmdit.y_embedder(self._pooled)[:, None, None, :] + embedded


@contextlib.contextmanager
def replaying(pipeline: Pipeline, text: TextConditioning, timesteps: Sequence[np.ndarray]) -> Iterator[Replay]:
    """Replay an image with the conditioning of its prompt.

    A pass has R = 2 rows with guidance (conditional, unconditional), else 1. timesteps: the stored ones that will be
    used. Hooks must be installed inside this block, because leaving it puts the adaLN weights back.
    """
    with modulation_cache(pipeline, [text.pooled], mx.array(np.array(timesteps), text.pooled.dtype)):
        yield Replay(pipeline, text)


@contextlib.contextmanager
def modulated(mmdit: nn.Module, modulation_input: mx.array) -> Iterator[None]:
    """Let every adaLN layer modulate by modulation_input (rows, 1, 1, hidden) in passes at timestep 0.

    The rows of a pass may then belong to different prompts and noise levels.
    """
    owners = [stream for block in model_blocks(mmdit).values() for stream in block.streams.values()]
    owners.append(mmdit.final_layer)
    try:
        for module in owners:
            module["_modulation_params"] = {0.0: module.adaLN_modulation(modulation_input)}
        yield
    finally:
        for module in owners:
            module.pop("_modulation_params", None)
