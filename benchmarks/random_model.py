"""Write a random-weight model into a folder that huggingface_hub reads as its cache, under the real names.

It needs no network and no licence. Sizes, memory and speed are those of the real model, and the images are noise. The
checkpoint has the original keys, so DiffusionKit's own conversion runs on it.

    python benchmarks/random_model.py --hf-home /tmp/hf                  # SD3-Medium: 4.5 GB, about a minute
    HF_HOME=/tmp/hf HF_HUB_OFFLINE=1 python generate_calibration_data.py --no-t5 --num-images 1 --dry-run

    python benchmarks/random_model.py --hf-home /tmp/tiny --model flux-schnell --size tiny     # seconds
    HF_HOME=/tmp/tiny HF_HUB_OFFLINE=1 python benchmarks/run_stage.py --tiny generate_calibration_data.py \\
        --model argmaxinc/mlx-FLUX.1-schnell --num-images 1 --num-steps 2 --latent-size 8 8
"""

import functools
import io
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from sentencepiece import SentencePieceTrainer

from benchmarks.pass_timing import SD3_MEDIUM
from tools.plant_outliers import STREAMS, plant, real_ratios, weight
from w4a8.cli import format_bytes, stage_command
from w4a8.model.catalog import BUNDLED_FOLDER
from w4a8.model.diffusionkit import VAEDecoder, VAEEncoder, model_io
from w4a8.model.dual_attention import TransformerSizes, empty_transformer
from w4a8.model.families import FAMILIES, FOLDER_FAMILY, MODELS, Family, family_of
from w4a8.model.original_checkpoint import checkpoint_slice

HUB_IDS = {
    "sd3-medium": SD3_MEDIUM,
    "sd3.5-large": "argmaxinc/mlx-stable-diffusion-3.5-large",
    "sd3.5-large-turbo": "stabilityai/stable-diffusion-3.5-large-turbo",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "flux-schnell": "argmaxinc/mlx-FLUX.1-schnell",
    "flux-dev": "argmaxinc/mlx-FLUX.1-dev",
}
TEXT_ENCODERS = "argmaxinc/stable-diffusion"
CLIP_LAYERS = 2  # enough for hidden_states[-2]; DiffusionKit reads the size from config.json
TINY = {"num_heads": 2, "depth_multimodal": 2, "hidden_size_override": 128}
TINY_PARTS: dict[str, dict[str, Any]] = {
    "sd3": {"max_latent_resolution": 64},
    "flux": {"depth_unified": 2, "rope_axes_dim": (8, 28, 28)},
}
VAE_PARTS = (  # of DiffusionKit's names -> of the original checkpoints
    ("up_blocks", "up"), ("down_blocks", "down"), ("mid_blocks.0", "mid.block_1"), ("mid_blocks.1", "mid.attn_1"),
    ("mid_blocks.2", "mid.block_2"), ("resnets", "block"), ("conv_shortcut", "nin_shortcut"), ("group_norm", "norm"),
    ("conv_norm_out", "norm_out"), ("query_proj", "q"), ("key_proj", "k"), ("value_proj", "v"),
    ("out_proj", "proj_out"), ("upsample", "upsample.conv"), ("downsample", "downsample.conv"),
)  # fmt: skip
T5_XXL = {"d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24, "vocab_size": 32128}
T5_WIDTH = 4096
T5_TINY = {"d_kv": 8, "num_heads": 2, "d_ff": 24, "num_layers": 1, "vocab_size": 40}


@stage_command
@click.option(
    "--hf-home", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write, for HF_HOME."
)
@click.option("--model", type=click.Choice(list(HUB_IDS)), default="sd3-medium", help="Which model's names and sizes.")
@click.option("--size", type=click.Choice(["real", "tiny"]), default="real", help="tiny: two blocks of 128 channels.")
@click.option("--t5", is_flag=True, help="With a random T5-XXL, 9.5 GB more; FLUX always has it.")
@click.option("--outliers", is_flag=True, help="SD3-Medium: with channels as wide as the real model's.")
@click.option("--depth", type=click.IntRange(2), help="Blocks of SD3's kind, instead of the model's own number.")
def main(hf_home: Path, model: str, size: str, t5: bool, outliers: bool, depth: int | None) -> None:
    """Write a random-weight model into a hub cache."""
    family = family_of(HUB_IDS[model])
    if outliers and family is not FOLDER_FAMILY:
        raise click.UsageError("--outliers: known of SD3-Medium alone")
    if size == "tiny":
        make_tiny()
    if depth is not None:
        make_depth(depth)
    write_text_encoders(hf_home)
    checkpoint = write_checkpoint(hf_home, HUB_IDS[model], outliers)
    if t5 or family.needs_t5:
        write_t5(hf_home, T5_TINY if size == "tiny" else T5_XXL)
    click.echo(
        f"wrote {checkpoint} ({format_bytes(checkpoint.stat().st_size)}); use it with HF_HOME={hf_home} HF_HUB_OFFLINE=1"
    )


def hub_folder(hf_home: Path, repository: str) -> Path:
    """Make an empty snapshot of `repository` in the hub cache's layout and return its folder."""
    folder = hf_home / "hub" / ("models--" + repository.replace("/", "--"))
    revision = "0" * 40
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def vae_key(name: str, prefix: str) -> str:
    """Return the checkpoint's key, below `prefix`, of a parameter of DiffusionKit's VAE."""
    for ours, theirs in VAE_PARTS:
        name = name.replace(ours, theirs)
    return prefix + name


class Random:
    """A source of random weights of one precision, always the same."""

    def __init__(self, dtype: mx.Dtype, seed: int = 0):
        self._dtype, self._key = dtype, mx.random.key(seed)

    def draw(self, name: str, shape: Sequence[int]) -> mx.array:
        """Return normal values of a layer's usual size, small biases, or ones for a norm; nothing is evaluated."""
        self._key, now = mx.random.split(self._key)
        if name.endswith("bias"):
            return (0.02 * mx.random.normal(shape, key=now)).astype(self._dtype)
        if len(shape) == 1:  # of a norm
            return mx.ones(shape, dtype=self._dtype)
        fan_in = math.prod(shape[1:]) or shape[-1]
        return (mx.random.normal(shape, key=now) * fan_in**-0.5).astype(self._dtype)


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a module."""
    return {name: array.shape for name, array in dict(tree_flatten(module.parameters())).items()}


def random_transformer_weights(config: TransformerSizes, family: Family, guided: bool = False) -> dict[str, mx.array]:
    """Return random 16-bit weights of a transformer of `config`, keyed and shaped as the original checkpoint has them.

    guided: with FLUX.1-dev's guidance embedding, which DiffusionKit does not know.
    """
    ends: dict[str, list[int]] = {}
    for name, sides in parameter_shapes(empty_transformer(config)).items():
        place, shape = checkpoint_slice(family, name, config.hidden_size), list(sides)
        if name == "x_embedder.proj.weight":
            shape = [shape[0], shape[3], *([] if config.patchify_via_reshape else shape[1:3])]
        if "pos_embed" in name:
            shape = [1, *shape]
        corner = [place.row + shape[0], *(place.column + side for side in shape[1:2]), *shape[2:]]
        known = ends.get(place.key, corner)
        ends[place.key] = [max(a, b) for a, b in zip(known, corner, strict=True)]
    if guided:
        ends |= {key.replace("time_in", "guidance_in"): shape for key, shape in ends.items() if "time_in" in key}
    random = Random(getattr(mx, family.half))
    return {family.checkpoint.prefix + key: random.draw(key, shape) for key, shape in ends.items()}


@functools.cache
def random_vae_arrays(dtype: mx.Dtype) -> dict[tuple[str, str], mx.array]:
    """Return {(part, name of DiffusionKit): random array as the original checkpoint shapes it}, drawn once for all models."""
    random, arrays = Random(dtype, seed=1), {}
    for part, model in (("decoder", VAEDecoder()), ("encoder", VAEEncoder())):
        for name, shape in parameter_shapes(model).items():
            if len(shape) == 4:
                shape = (shape[0], shape[3], shape[1], shape[2])
            elif len(shape) == 2:
                shape = (*shape, 1, 1)
            arrays[part, name] = random.draw(name, shape)
    return arrays


def random_vae(family: Family) -> dict[str, mx.array]:
    """Return random weights of the VAE, whose size all models share, keyed as the original checkpoint has them."""
    arrays, prefix = random_vae_arrays(getattr(mx, family.half)), family.checkpoint.vae_prefix
    return {vae_key(name, f"{prefix}{part}."): array for (part, name), array in arrays.items()}


def widen_channels(weights: dict[str, mx.array], config: TransformerSizes) -> None:
    """Give a random checkpoint of SD3 outlier channels as wide as SD3-Medium's, planted a block at a time."""
    shapes = parameter_shapes(empty_transformer(config))
    for block in range(config.depth_multimodal):
        places = {}
        for name in (name for name in shapes if name.startswith(f"multimodal_transformer_blocks.{block}.")):
            place = checkpoint_slice(FOLDER_FAMILY, name, config.hidden_size)
            places[name] = FOLDER_FAMILY.checkpoint.prefix + place.key, slice(place.row, place.row + shapes[name][0])
        arrays = {key: np.array(weights[key]) for key, _ in places.values()}
        parts = {name: arrays[key][rows] for name, (key, rows) in places.items()}
        kinds = itertools.product(STREAMS, ("attn.q_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2"))
        layers = [layer for stream, kind in kinds if weight(layer := f"mm{block}.{stream}.{kind}") in parts]
        flat = {layer: np.ones((1, 1, parts[weight(layer)].shape[1])) for layer in layers}  # no channel is wide yet
        ratios = real_ratios(layers, config.depth_multimodal, 1.0)
        for name, part in plant(parts, flat, ratios, seed=block, exact=False).items():
            key, rows = places[name]
            arrays[key][rows] = part
        weights.update({key: mx.array(array) for key, array in arrays.items()})


def random_clip(width: int, heads: int, vocabulary: int, seed: int) -> tuple[dict, dict]:
    """Return config and random float16 weights of a small CLIP text encoder, keyed as transformers keys it."""
    key = mx.random.key(seed)

    def linear(name: str, rows: int, columns: int) -> dict:
        nonlocal key
        key, now = mx.random.split(key)
        drawn = mx.random.normal((rows, columns), key=now) * columns**-0.5
        return {f"{name}.weight": drawn.astype(mx.float16), f"{name}.bias": mx.zeros((rows,), dtype=mx.float16)}

    def norm(name: str) -> dict:
        ones, zeros = mx.ones((width,), dtype=mx.float16), mx.zeros((width,), dtype=mx.float16)
        return {f"{name}.weight": ones, f"{name}.bias": zeros}

    weights = {
        "text_model.embeddings.token_embedding.weight": linear("w", vocabulary, width)["w.weight"],
        "text_model.embeddings.position_embedding.weight": linear("w", 77, width)["w.weight"],
        "text_projection.weight": linear("w", width, width)["w.weight"],
        **norm("text_model.final_layer_norm"),
    }
    for index in range(CLIP_LAYERS):
        layer = f"text_model.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights |= linear(f"{layer}.self_attn.{part}", width, width)
        weights |= linear(f"{layer}.mlp.fc1", 4 * width, width) | linear(f"{layer}.mlp.fc2", width, 4 * width)
        weights |= norm(f"{layer}.layer_norm1") | norm(f"{layer}.layer_norm2")
    config = {
        "architectures": ["CLIPTextModelWithProjection"],
        "num_hidden_layers": CLIP_LAYERS,
        "hidden_size": width,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "vocab_size": vocabulary,
        "projection_dim": width,
        "hidden_act": "quick_gelu",
    }
    return config, weights


def whole_vocabulary(vocabulary: dict[str, int]) -> dict[str, int]:
    """Add every printable ASCII character to sd3-emoji's vocabulary; the end token keeps the largest id."""
    tokens = [token for token in vocabulary if token != "<|endoftext|>"]
    characters = [chr(code) + end for code in range(33, 127) for end in ("", "</w>")]
    tokens += [token for token in characters if token not in vocabulary]
    return {token: index for index, token in enumerate([*tokens, "<|endoftext|>"])}


def write_checkpoint(hf_home: Path, repository: str, outliers: bool = False) -> Path:
    """Write a repository's transformer and VAE, and the config that DiffusionKit asks for; return the transformer's file."""
    snapshot, family, entry = hub_folder(hf_home, repository), family_of(repository), MODELS[repository]
    (snapshot / "config.json").write_text("{}")
    weights = random_transformer_weights(family.config, family, guided=entry.guidance is not None)
    if outliers:
        widen_channels(weights, family.config)
    if family.checkpoint.vae_inside:
        weights |= random_vae(family)
    else:
        mx.save_safetensors(str(snapshot / entry.vae[1]), random_vae(family))
    mx.save_safetensors(str(snapshot / entry.file), weights)
    return snapshot / entry.file


def write_text_encoders(hf_home: Path, clip_widths: tuple[int, int] = (768, 1280)) -> None:
    """Write both CLIP encoders and their tokenizers, which all models share."""
    encoders = hub_folder(hf_home, TEXT_ENCODERS)
    vocabulary = whole_vocabulary(json.loads((BUNDLED_FOLDER / "vocab.json").read_text(encoding="utf-8")))
    for seed, (part, width) in enumerate(zip(("clip_l", "clip_g"), clip_widths, strict=True)):
        (encoders / part).mkdir(exist_ok=True)
        clip_config, weights = random_clip(width, width // 64, len(vocabulary), seed)
        (encoders / part / "config.json").write_text(json.dumps(clip_config))
        mx.save_safetensors(str(encoders / part / "model.fp16.safetensors"), weights)
        tokenizer = encoders / part.replace("clip", "tokenizer")
        tokenizer.mkdir(exist_ok=True)
        (tokenizer / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        shutil.copy(BUNDLED_FOLDER / "merges.txt", tokenizer / "merges.txt")


def make_tiny() -> None:
    """Give every hub model two blocks a kind of 128 channels in this process: change its sizes, and DiffusionKit's, in place."""
    for family in FAMILIES.values():
        vars(family.config).update(TINY, **TINY_PARTS[family.architecture])
        if family.config.dual_attention_blocks:
            family.config.dual_attention_blocks = 1
    for name, config in model_io._CONFIG.items():
        vars(config).update(TINY, **TINY_PARTS["flux" if "FLUX" in name else "sd3"])


def make_depth(depth: int) -> None:
    """Give every hub model this number of blocks of SD3's kind in this process, each as wide as before."""
    for config in [*(family.config for family in FAMILIES.values()), *model_io._CONFIG.values()]:
        sizes = {"num_heads": config.num_heads, "hidden_size_override": config.hidden_size}
        vars(config).update(sizes, depth_multimodal=depth)


def train_t5_tokenizer(texts: Sequence[str], pieces: int) -> bytes:
    """Train a SentencePiece model with T5's settings on a few texts; return its file's content."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=pieces, model_type="unigram", hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_t5(hf_home: Path, size: dict[str, int] = T5_XXL) -> None:
    """Write the files that DiffusionKit asks the hub for when T5 is on: a config, a tokenizer of a few pieces, random weights."""
    google, ours = (hub_folder(hf_home, name) for name in ("google/t5-v1_1-xxl", TEXT_ENCODERS))
    config = {"model_type": "t5", "d_model": T5_WIDTH, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    (google / "config.json").write_text(json.dumps({**config, **size}))
    (google / "spiece.model").write_bytes(train_t5_tokenizer(["a red rocket", "a cat"], 24))
    width, inner, hidden = T5_WIDTH, size["d_kv"] * size["num_heads"], size["d_ff"]
    shapes: dict[str, tuple[int, ...]] = {"encoder.final_layer_norm.weight": (width,)}
    shapes |= dict.fromkeys(("encoder.embed_tokens.weight", "shared.weight"), (size["vocab_size"], width))
    for index in range(size["num_layers"]):
        block = f"encoder.block.{index}.layer"
        shapes |= {f"{block}.0.SelfAttention.{part}.weight": (inner, width) for part in "qkv"}
        shapes |= {f"{block}.1.DenseReluDense.{part}.weight": (hidden, width) for part in ("wi_0", "wi_1")}
        shapes |= {
            f"{block}.0.SelfAttention.o.weight": (width, inner),
            f"{block}.1.DenseReluDense.wo.weight": (width, hidden),
        }
        shapes |= {f"{block}.{i}.layer_norm.weight": (width,) for i in range(2)}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, size["num_heads"])
    weights: dict[str, mx.array] = {}
    for name, shape in shapes.items():
        weights[name] = (mx.random.normal(shape, key=mx.random.key(len(weights))) * 0.02).astype(mx.float16)
        mx.eval(weights[name])
    (ours / "t5").mkdir(exist_ok=True)
    mx.save_safetensors(str(ours / "t5" / "t5xxl.safetensors"), weights)


if __name__ == "__main__":
    main()
