"""Complete DiffusionKit's transformer to the original model: k's bias, FLUX.1-dev's guidance, float32 timesteps.

DiffusionKit leaves the bias of k out. It does not cancel in the softmax: image and text tokens have different ones, and
SD3.5 and FLUX normalize k after it. It leaves FLUX.1-dev's guidance embedding out, too, and computes the sines and
cosines of a timestep in 16 bits, where the arguments reach 1000. The reference is diffusers (SD3Transformer2DModel,
FluxTransformer2DModel); tests/test_originals.py compares with its velocities.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from w4a8.model.diffusionkit import MLPEmbedder, MMDiT, MMDiTConfig, TimestepAdapter
from w4a8.model.dual_attention import empty_transformer

K_BIAS = ".k_proj.bias"  # how the names of k's biases end
GUIDANCE_PREFIX = "y_embedder.guidance_in."  # of the guidance embedding's names
GUIDANCE_SCALE = 1000.0  # guidance is embedded as a timestep is


class OriginalTimestepAdapter(TimestepAdapter):
    """DiffusionKit's embedding of a timestep, whose sines and cosines are computed in float32 and cast to the weights."""

    def timestep_embedding(self, t: mx.array) -> mx.array:
        """Return the embedding (rows, channels) of timesteps (rows,) in the precision of the weights."""
        layer = self.mlp.layers[0]
        return super().timestep_embedding(t).astype(layer.get("scales", layer.weight).dtype)


class GuidedTextAdapter(nn.Module):
    """The embedding of the pooled text plus that of the guidance, which every adaLN layer gets beside the timestep's."""

    def __init__(self, model: MMDiT, guidance: float):
        super().__init__()
        self.mlp = model.y_embedder.mlp
        self.guidance_in = MLPEmbedder(model.config.frequency_embed_dim, model.config.hidden_size)
        self.guidance = guidance
        self._embed = model.t_embedder.timestep_embedding

    def __call__(self, pooled: mx.array) -> mx.array:
        """Embed pooled features (rows, channels) to (rows, hidden)."""
        embedded = self._embed(mx.array([GUIDANCE_SCALE * self.guidance])).astype(pooled.dtype)
        return self.mlp(pooled) + self.guidance_in(embedded)


def original_transformer(config: MMDiTConfig, names: Collection[str], guidance: float | None = None) -> MMDiT:
    """Make DiffusionKit's transformer of a config with the parameters of these names that DiffusionKit lacks.

    A model without a bias of k was made for DiffusionKit, such as sd3-emoji, and is left as DiffusionKit has it.
    guidance: the value of `--guidance`, where `names` holds its embedding.
    """
    original = any(name.endswith(K_BIAS) for name in names)
    model = empty_transformer(dataclasses.replace(config, dtype=mx.float32) if original else config)
    if original:
        model.t_embedder = OriginalTimestepAdapter(model.config)
    modules: dict[str, Any] = dict(model.named_modules())
    for name in names:
        if name.endswith(K_BIAS):
            modules[name.removesuffix(".bias")].bias = mx.zeros((config.hidden_size,))
    if any(name.startswith(GUIDANCE_PREFIX) for name in names):
        model.y_embedder = GuidedTextAdapter(model, 1.0 if guidance is None else guidance)
    return model


def original_names(config: MMDiTConfig, guided: bool) -> set[str]:
    """Return the names of the parameters that DiffusionKit's transformer lacks. guided: FLUX.1-dev's embedding, too."""
    streams = [name for name, _ in empty_transformer(config).named_modules() if name.endswith(".k_proj")]
    ends = [f"mlp.layers.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")] if guided else []
    return {f"{name}.bias" for name in streams} | {GUIDANCE_PREFIX + end for end in ends}
