"""Import everything that the toolkit takes from DiffusionKit; no other module imports it.

DiffusionKit and argmaxtools import torch and coremltools for Core ML and for conversions, which nothing here uses, so
these packages need not be installed. w4a8/model/t5.py replaces T5's config and tokenizer, which DiffusionKit takes from
transformers.
"""

import logging

from w4a8.backend.lazy_imports import deferred
from w4a8.model import t5

with deferred("coremltools", "torch", transformers=t5):
    from diffusionkit.mlx import (
        MMDIT_CKPT,
        T5_MAX_LENGTH,
        CFGDenoiser,
        DiffusionPipeline,
        FluxPipeline,
        LatentFormat,
        append_dims,
        model_io,
    )
    from diffusionkit.mlx.clip import CLIPTextModel
    from diffusionkit.mlx.config import (
        CLIPTextModelConfig,
        MMDiTConfig,
        PositionalEncoding,
        VAEDecoderConfig,
        VAEEncoderConfig,
    )
    from diffusionkit.mlx.mmdit import (
        Attention,
        MLPEmbedder,
        MMDiT,
        QKNorm,
        TimestepAdapter,
        TransformerBlock,
        affine_transform,
        unpatchify,
    )
    from diffusionkit.mlx.model_io import _DEFAULT_MODEL as HUB_TEXT_ENCODERS
    from diffusionkit.mlx.model_io import _MODELS as HUB_TEXT_FILES
    from diffusionkit.mlx.sampler import FluxSampler, ModelSamplingDiscreteFlow
    from diffusionkit.mlx.t5 import SD3T5Encoder
    from diffusionkit.mlx.tokenizer import T5Tokenizer, Tokenizer
    from diffusionkit.mlx.vae import VAEDecoder, VAEEncoder, upsample_nearest

for _name in logging.root.manager.loggerDict:
    if _name.startswith(("diffusionkit", "argmaxtools")):
        logging.getLogger(_name).setLevel(logging.ERROR)  # their INFO lines cut through progress bars

__all__ = [  # noqa: RUF022
    "MMDIT_CKPT", "T5_MAX_LENGTH", "HUB_TEXT_ENCODERS", "HUB_TEXT_FILES", "DiffusionPipeline", "FluxPipeline", "CFGDenoiser", "ModelSamplingDiscreteFlow",
    "FluxSampler", "LatentFormat", "append_dims", "model_io",
    "Attention", "MLPEmbedder", "MMDiT", "QKNorm", "TimestepAdapter", "TransformerBlock", "affine_transform", "unpatchify", "MMDiTConfig", "PositionalEncoding", "CLIPTextModel", "CLIPTextModelConfig", "SD3T5Encoder", "Tokenizer",
    "T5Tokenizer", "VAEDecoder", "VAEDecoderConfig", "VAEEncoder", "VAEEncoderConfig", "upsample_nearest",]  # fmt: skip
