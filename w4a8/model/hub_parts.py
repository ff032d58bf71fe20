"""Read text encoders, tokenizers and autoencoder of a hub model: from its checkpoint where it holds them, else from the hub.

DiffusionKit's own loaders read tensors without looking at their dtypes; here they come through `load_arrays`, under the
names that DiffusionKit's functions give them.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import orjson
from mlx.utils import tree_flatten, tree_unflatten

from w4a8.model.catalog import ModelError, ModelInfo, cached_vae, model_files
from w4a8.model.checkpoint_contents import read_contents
from w4a8.model.clip_tokenizer import ClipTokenizer
from w4a8.model.diffusionkit import (
    HUB_TEXT_ENCODERS,
    HUB_TEXT_FILES,
    CLIPTextModel,
    CLIPTextModelConfig,
    SD3T5Encoder,
    model_io,
)
from w4a8.model.families import MODELS
from w4a8.model.hub_files import hub_file
from w4a8.model.model_source import sampling_of
from w4a8.model.original_checkpoint import some
from w4a8.model.t5 import REPOSITORY, T5Config
from w4a8.model.weight_files import load_arrays

TEXT_GROUP = 64  # weights of T5 that share a scale
MOST_MERGES = 49152 - 256 - 2  # of CLIP's published merges; the file lists more


ENCODER_WORDS = {"clip_l": "CLIP-L", "clip_g": "CLIP-G"}


def describe_checkpoint(info: ModelInfo, use_t5: bool) -> list[str]:
    """Return sentences about a checkpoint: what is read from it and what is not, and what comes from the hub."""
    if info.checkpoint is None:
        return []
    contents, title, family = read_contents(info.checkpoint), info.title, info.family
    inside = ["transformer", *(["VAE"] if contents.vae else [])]
    inside += [ENCODER_WORDS[name] for name in family.clip if contents.clip(name)]
    left = contents.left_out()
    sentences = [
        f"{title}: read as {info.hub_id} ({', '.join(inside)})" + (f"; not read: {', '.join(left)}" if left else "")
    ]
    hub = [ENCODER_WORDS[name] for name in family.clip if not contents.clip(name)] + (["T5"] if use_t5 else [])
    others = [f"{', '.join([*hub, 'tokenizers'])} of {HUB_TEXT_ENCODERS}"] + (
        [f"T5's config of {REPOSITORY}"] if use_t5 else []
    )
    vae = (model_files(info, use_t5) or {}).get("vae")
    if not contents.vae and not family.checkpoint.vae_inside:
        others.append(
            f"the VAE is {vae}"
            if vae and vae.parent == info.checkpoint.parent
            else "VAE of {} ({})".format(*(family.checkpoint.vae or MODELS[info.hub_id or ""].vae))
        )
    sentences.append(f"from the hub, nothing of it gated: {'; '.join(others)}")
    if not contents.vae and family.checkpoint.vae_inside and cached_vae(info):
        sentences.append(f"{title}: holds no VAE; images are decoded by that of {cached_vae(info)}")
    asked = sampling_of(contents, info.hub_id or "")
    if asked.num_steps:
        sentences.append(
            f"{title}: its name says {asked.num_steps} steps, without guidance; --num-steps and --cfg-weight say otherwise"
        )
    guided = any("guidance_in." in key for key in contents.transformer)
    if guided and info.guidance is None:
        sentences.append(
            f"{title}: has FLUX.1-dev's guidance embedding; {info.num_steps} steps are schnell's: see --num-steps"
        )
    return sentences


def text_file(name: str) -> Path:
    """Return a file of the text encoders' repository, fetched where the cache lacks it. Raises HubFileError."""
    return hub_file(HUB_TEXT_ENCODERS, HUB_TEXT_FILES[HUB_TEXT_ENCODERS][name], download=True)


def load_tokenizer(encoder: str) -> ClipTokenizer:
    """Load the tokenizer of clip_l, which pads with the end token, or of clip_g. Raises HubFileError."""
    name = encoder.replace("clip", "tokenizer")
    vocabulary = orjson.loads(text_file(f"{name}_vocab").read_bytes())
    lines = text_file(f"{name}_merges").read_text(encoding="utf-8").strip().split("\n")[1 : MOST_MERGES + 1]
    ranks = {(first, second): rank for rank, (first, second) in enumerate(line.split() for line in lines)}
    return ClipTokenizer(ranks, vocabulary, encoder == "clip_l")


def empty_clip(encoder: str) -> CLIPTextModel:
    """Make clip_l or clip_g without weights, from its config on the hub. Raises HubFileError."""
    config = orjson.loads(text_file(f"{encoder}_config").read_bytes())
    return CLIPTextModel(
        CLIPTextModelConfig(
            num_layers=config["num_hidden_layers"],
            model_dims=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            max_length=config["max_position_embeddings"],
            vocab_size=config["vocab_size"],
            projection_dim=config["projection_dim"] if "WithProjection" in config["architectures"][0] else None,
            hidden_act=config.get("hidden_act", "quick_gelu"),
        )
    )


def load_clip(info: ModelInfo, encoder: str) -> CLIPTextModel:
    """Open clip_l or clip_g as it is, from the checkpoint where it holds the encoder whole, else from the hub.

    Raises HubFileError, or ModelError for arrays that are not the encoder's.
    """
    model = empty_clip(encoder)
    contents = read_contents(info.checkpoint) if info.checkpoint is not None else None
    prefix = (contents.clip(encoder) if contents is not None else None) or ""
    files = contents.files if contents is not None and prefix else (text_file(encoder),)
    path, arrays = files[0], {key: array for file in files for key, array in load_arrays(file).items()}
    named = [(key.removeprefix(prefix), array) for key, array in arrays.items() if key.startswith(prefix)]
    load_exactly(model, [pair for item in named for pair in model_io.map_clip_text_encoder_weights(*item)], path)
    return model


def load_t5(dtype: mx.Dtype) -> SD3T5Encoder:
    """Load the hub's T5, lazily. Raises HubFileError, or ModelError for arrays that are not T5's."""
    model = SD3T5Encoder(T5Config.from_pretrained(REPOSITORY), low_memory_mode=False)
    path = text_file("t5")
    try:
        found = model_io.t5_encoder_state_dict_adjustments(load_arrays(path))
    except KeyError as error:
        raise ModelError(f"{path}: lacks {error.args[0]}; download it again") from None
    load_exactly(model, [(name, array.astype(dtype)) for name, array in found.items()], path)
    return model


def pack_t5(model: SD3T5Encoder, bits: int) -> None:
    """Round T5's linear layers to the nearest code of `bits` bits in groups of 64, a layer at a time.

    A layer whose inputs are no multiple of 64 stays, and so do the embedding and the norms.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.weight.shape[1] % TEXT_GROUP == 0:
            packed = nn.QuantizedLinear.from_linear(module, TEXT_GROUP, bits)
            mx.eval(packed.parameters())
            model.update_modules(tree_unflatten([(path, packed)]))
            module.clear()


def load_exactly(model: nn.Module, named: list[tuple[str, mx.array]], path: Path) -> None:
    """Give a module its parameters; arrays that it does not have are left. Raises ModelError where one lacks."""
    wanted = dict(tree_flatten(model.parameters()))
    found = {name: array for name, array in named if name in wanted}
    lacking = sorted(wanted.keys() - found.keys())
    if lacking:
        raise ModelError(f"{path}: lacks {some(lacking)}; download it again")
    model.load_weights(list(found.items()))


def vae_arrays(info: ModelInfo, half: str) -> dict[str, mx.array]:
    """Return the arrays of the autoencoder's `half`, decoder or encoder, by the original keys without a prefix, lazily.

    They come from the checkpoint where it holds them, else from the hub's file. Raises ModelError where neither does.
    """
    contents = read_contents(info.checkpoint) if info.checkpoint is not None else None
    if contents is not None and contents.vae is not None:
        prefix, files = contents.vae, list(contents.files)
    else:
        found = cached_vae(info)
        files = [found if found is not None else (model_files(info, use_t5=False, download=True) or {})["vae"]]
        prefix = read_contents(files[0]).vae or ""
    start = f"{prefix}{half}."
    arrays = {
        key.removeprefix(prefix): array
        for file in files
        for key, array in load_arrays(file).items()
        if key.startswith(start)
    }
    if arrays.get(f"{half}.conv_in.weight", mx.zeros(())).ndim != 4:
        raise ModelError(f"{files[0]}: holds no VAE {half} in the original keys ({half}.conv_in.weight …)")
    return arrays
