"""Read the parts of a hub model beside its transformer, for export."""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import orjson
from mlx.utils import tree_flatten

from calibration_store.model_folder import T5_PART, T5_PIECES
from w4a8.model.catalog import ModelError, ModelInfo
from w4a8.model.checkpoint_contents import read_contents
from w4a8.model.diffusionkit import (
    MMDiTConfig,
    VAEDecoderConfig,
    VAEEncoder,
    VAEEncoderConfig,
    model_io,
)
from w4a8.model.families import MODELS
from w4a8.model.folder_t5 import t5_section
from w4a8.model.hub_files import hub_file
from w4a8.model.hub_parts import text_file, vae_arrays
from w4a8.model.loading import load_pipeline
from w4a8.model.lora import text_encoders_of
from w4a8.model.parts import DECODER, TEXT
from w4a8.model.t5 import REPOSITORY, T5Config


def hub_decoder(info: ModelInfo) -> dict[str, mx.array]:
    """Return the parameters of a hub model's VAE decoder, in the family's 16 bits."""
    pipeline = load_pipeline(info, {DECODER: info.family.half})
    return dict(tree_flatten(pipeline.decoder.parameters()))


def hub_encoder(info: ModelInfo) -> dict[str, mx.array]:
    """Return the parameters of a hub model's VAE encoder, in the family's 16 bits.

    Raises ModelError where the checkpoint holds none that can be read.
    """
    config, half = VAEEncoderConfig(), getattr(mx, info.family.half)
    encoder = VAEEncoder(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        resnet_groups=config.resnet_groups,
    )
    try:
        found = model_io.vae_encoder_state_dict_adjustments(vae_arrays(info, "encoder"), prefix="encoder.")
        encoder.load_weights([(name, array.astype(half)) for name, array in found.items()])
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{info.checkpoint or info.version}: has no VAE encoder that can be read ({error})") from None
    return dict(tree_flatten(encoder.parameters()))


def text_encoders(info: ModelInfo, use_t5: bool = False) -> dict[str, nn.Module]:
    """Return the text encoders of a model in the family's 16 bits, by their names in a model folder; T5 if it is used."""
    pipeline = load_pipeline(info, {TEXT: info.family.half}, use_t5)
    encoders = {name: getattr(pipeline, name) for name in info.family.clip}
    return encoders | ({T5_PART: pipeline.t5_encoder.model} if use_t5 else {})


def hub_tokenizer(use_t5: bool) -> list[Path]:
    """Return the files of vocabulary and merges that CLIP's tokenizers share, and T5's tokenizer if it is used.

    Raises ModelError when CLIP's differ.
    """
    files = [text_file(f"tokenizer_l_{kind}") for kind in ("vocab", "merges")]
    for kind, path in zip(("vocab", "merges"), files, strict=True):
        if text_file(f"tokenizer_g_{kind}").read_bytes() != path.read_bytes():
            raise ModelError("the two tokenizers differ, and a model folder has room for one; leave --complete out")
    return [*files, *([hub_file(REPOSITORY, T5_PIECES, download=True)] if use_t5 else [])]


def complete_hub_config(info: ModelInfo, t5: nn.Module | None) -> dict[str, Any]:
    """Make the config.json of a model folder that holds a hub model. t5: its T5, with packed layers or without; or none."""
    config: dict[str, Any] = {"name": info.version.rpartition("/")[2]}
    config["mmdit"] = transformer_section(info.family.config)
    for part, padded in (("clip_l", True), ("clip_g", False)):
        found = orjson.loads(text_file(f"{part}_config").read_bytes())
        config[part] = {
            "num_layers": found["num_hidden_layers"],
            "model_dims": found["hidden_size"],
            "num_heads": found["num_attention_heads"],
            "max_length": found["max_position_embeddings"],
            "vocab_size": found["vocab_size"],
            "projection_dim": found["projection_dim"],
            "hidden_act": found.get("hidden_act", "quick_gelu"),
        }
        config[part.replace("clip", "tokenizer")] = {"pad_with_eos": padded}
    decoder, latents = VAEDecoderConfig(), info.family.latent_format()
    config["vae"] = {
        "block_out_channels": list(decoder.block_out_channels),
        "resnet_groups": decoder.resnet_groups,
        "decoder_layers_per_block": decoder.layers_per_block,
        "downscale": info.vae_downscale,
    }
    if t5 is not None:
        config["t5"] = t5_section(t5, vars(T5Config.from_pretrained(REPOSITORY)), MODELS[info.version].t5_tokens)
    return config | {
        "latent_format": {"scale_factor": latents.scale_factor, "shift_factor": latents.shift_factor},
        "latent_size": list(info.latent_size),
        "use_t5": t5 is not None,
        "sampler_shift": info.sampler_shift,
        "default_cfg_weight": info.cfg_weight,
        "default_num_steps": info.num_steps,
    }


def transformer_section(config: MMDiTConfig) -> dict[str, Any]:
    """Return the `mmdit` section of config.json for DiffusionKit's config.

    It holds the required entries, and those that are not DiffusionKit's defaults.
    """
    required = {
        "depth_multimodal", "num_heads", "max_latent_resolution", "pooled_text_embed_dim", "token_level_text_embed_dim",
        "patch_size", "vae_latent_dim",
    }  # fmt: skip
    section: dict[str, Any] = {"hidden_size": config.hidden_size}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain = isinstance(value, (bool, int, float, str)) and field.name not in (
            "low_memory_mode",
            "hidden_size_override",
        )
        if field.name in required or (plain and value != field.default):
            section[field.name] = value
    section["timestep_dtype"] = "float32"
    return section


def own_parts(info: ModelInfo) -> set[str]:
    """Return the parts beside the transformer that are not the hub's: a checkpoint's, and those that LoRAs change."""
    found = text_encoders_of(info.loras, info.family)
    if info.checkpoint is not None:
        contents = read_contents(info.checkpoint)
        found |= {name for name in info.family.clip if contents.clip(name)}
        found |= {"decoder"} if contents.vae else set()
    return found
