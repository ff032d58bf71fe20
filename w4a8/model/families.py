"""List the architectures and what the models of each share: pipeline, sampler, latents, encoders and checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from w4a8.model.diffusionkit import (
    DiffusionPipeline,
    FluxLatentFormat,
    FluxPipeline,
    FluxSampler,
    LatentFormat,
    MMDiTConfig,
    ModelSamplingDiscreteFlow,
    SD3LatentFormat,
    model_io,
)


@dataclass(frozen=True)
class Family:
    """An architecture: SD3 (medium, 3.5-large) or FLUX (schnell, dev)."""

    name: str
    pipeline: type[DiffusionPipeline]  # its encode_text is used
    sampler: type[ModelSamplingDiscreteFlow] | type[FluxSampler]
    latent_format: type[LatentFormat]
    half: str  # the 16-bit precision that DiffusionKit runs it in
    clip: tuple[str, ...]  # its CLIP text encoders
    cfg_weight: float  # DiffusionKit's own default
    prefix: str  # of the transformer's keys in the original checkpoint
    vae_prefix: str  # of the VAE's keys in that checkpoint
    vae_inside: bool  # whether the original checkpoint holds the VAE, too
    max_latent_size: int | None = None  # where positions are rotations; None: the size of the table of positions
    ignored: tuple[str, ...] = ()  # prefixes of a checkpoint's keys that not every model of the family has

    @property
    def needs_t5(self) -> bool:
        """Return whether prompts cannot be read without T5."""
        return "clip_g" not in self.clip

    @property
    def guided(self) -> bool:
        """Return whether a pass may have rows of a negative prompt."""
        return self.cfg_weight > 0

    def weights(self, original: Mapping[str, mx.array], config: MMDiTConfig) -> dict[str, mx.array]:
        """Return the transformer of an original checkpoint in DiffusionKit's names and shapes, lazily."""
        if self is SD3:
            return model_io.mmdit_state_dict_adjustments(dict(original), prefix=self.prefix)
        used = {key: array for key, array in original.items() if not key.startswith(self.ignored)}
        return model_io.flux_state_dict_adjustments(
            used, prefix=self.prefix, hidden_size=config.hidden_size, mlp_ratio=config.mlp_ratio
        )


SD3 = Family(
    "sd3", DiffusionPipeline, ModelSamplingDiscreteFlow, SD3LatentFormat, "float16", ("clip_l", "clip_g"), 5.0,
    "model.diffusion_model.", "first_stage_model.", True,
)  # fmt: skip
FLUX = Family(
    "flux", FluxPipeline, FluxSampler, FluxLatentFormat, "bfloat16", ("clip_l",), 0.0, "", "", False, 256,
    ("guidance_in.",),
)  # fmt: skip


FAMILIES = {family.name: family for family in (SD3, FLUX)}


def family_of(hub_id: str | None) -> Family:
    """Return the architecture of a hub id, or for None that of a model folder without one, which has SD3's layout."""
    return FLUX if hub_id is not None and "FLUX" in hub_id else SD3
