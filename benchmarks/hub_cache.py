"""A hub cache that holds models of random weights: what random_model.py writes."""

from w4a8 import blas  # noqa: F401  (before MLX)

# isort: split
import io
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from sentencepiece import SentencePieceTrainer

from w4a8.model.catalog import BUNDLED_FOLDER
from w4a8.model.diffusionkit import HUB_MMDIT_CONFIGS, HUB_MMDIT_FILES, MMDiT, MMDiTConfig, VAEDecoder, VAEEncoder
from w4a8.model.families import SD3, Family, family_of
from w4a8.model.original_checkpoint import checkpoint_slice

SD3_MEDIUM = "argmaxinc/mlx-stable-diffusion-3-medium"
TEXT_ENCODERS = "argmaxinc/stable-diffusion"
CLIP_LAYERS = 2  # enough for hidden_states[-2]; DiffusionKit reads the size from config.json


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
    """DiffusionKit's VAE parameter name -> its key in the checkpoint, below `prefix`."""
    for ours, theirs in (
        ("up_blocks", "up"),
        ("down_blocks", "down"),
        ("mid_blocks.0", "mid.block_1"),
        ("mid_blocks.1", "mid.attn_1"),
        ("mid_blocks.2", "mid.block_2"),
        ("resnets", "block"),
        ("conv_shortcut", "nin_shortcut"),
        ("group_norm", "norm"),
        ("conv_norm_out", "norm_out"),
        ("query_proj", "q"),
        ("key_proj", "k"),
        ("value_proj", "v"),
        ("out_proj", "proj_out"),
        ("upsample", "upsample.conv"),
        ("downsample", "downsample.conv"),
    ):
        name = name.replace(ours, theirs)
    return prefix + name


class Random:
    """Random weights of one precision, always the same."""

    def __init__(self, dtype: mx.Dtype, seed: int = 0):
        self._dtype, self._key = dtype, mx.random.key(seed)

    def draw(self, name: str, shape: Sequence[int]) -> mx.array:
        """Normal values of a layer's usual size; small biases, norms 1. Unevaluated."""
        self._key, now = mx.random.split(self._key)
        if name.endswith("bias"):
            return (0.02 * mx.random.normal(shape, key=now)).astype(self._dtype)
        if len(shape) == 1:  # of a norm
            return mx.ones(shape, dtype=self._dtype)
        fan_in = math.prod(shape[1:]) or shape[-1]
        return (mx.random.normal(shape, key=now) * fan_in**-0.5).astype(self._dtype)


def random_transformer_weights(config: MMDiTConfig, family: Family, guided: bool = False) -> dict[str, mx.array]:
    """Random 16-bit weights of a transformer of `config`, keyed and shaped as the original checkpoint has them.

    guided: with FLUX.1-dev's guidance embedding, which DiffusionKit does not know.
    """
    ends: dict[str, list[int]] = {}
    for name, array in tree_flatten(MMDiT(config).parameters()):
        place, shape = checkpoint_slice(family, name, config.hidden_size), list(array.shape)
        if name == "x_embedder.proj.weight":
            shape = [shape[0], shape[3], *shape[1:3]] if family is SD3 else [shape[0], shape[3]]
        if "pos_embed" in name:
            shape = [1, *shape]
        corner = [place.row + shape[0], *(place.column + side for side in shape[1:2]), *shape[2:]]
        known = ends.get(place.key, corner)
        ends[place.key] = [max(a, b) for a, b in zip(known, corner, strict=True)]
    if guided:
        ends |= {key.replace("time_in", "guidance_in"): shape for key, shape in ends.items() if "time_in" in key}
    random = Random(getattr(mx, family.half))
    return {family.prefix + key: random.draw(key, shape) for key, shape in ends.items()}


def random_vae(family: Family) -> dict[str, mx.array]:
    """Random weights of the VAE that all models share in size, keyed as the original checkpoint has them."""
    random, weights = Random(getattr(mx, family.half), seed=1), {}
    for part, model in (("decoder", VAEDecoder()), ("encoder", VAEEncoder())):
        for name, array in tree_flatten(model.parameters()):
            shape = array.shape
            if len(shape) == 4:
                shape = (shape[0], shape[3], shape[1], shape[2])
            elif len(shape) == 2:
                shape = (*shape, 1, 1)
            weights[vae_key(name, f"{family.vae_prefix}{part}.")] = random.draw(name, shape)
    return weights


def plant_outliers(weights: dict[str, mx.array], depth: int, seed: int = 0) -> None:
    """Widen a few inputs of every layer of a random checkpoint as SD3-Medium's are, powers of two that the layers take out again.

    Inputs of q, k, v and fc1: adaLN's shift and 1 + scale; of o_proj: the rows of v; of fc2: the rows of fc1 (GELU is linear
    far from 0). Blocks of the real model, spread evenly, lend their ratios (widest to median channel).
    """
    table = json.loads((Path(__file__).parent.parent / "tools" / "sd3_medium_extremes.json").read_text())
    column, rng = table["columns"].index("max_over_median_channel"), np.random.default_rng(seed)

    def change(key: str, rows: slice, factors: np.ndarray, axis: int = 0, more: float = 0.0) -> None:
        full = f"{SD3.prefix}joint_blocks.{key}"
        if full in weights:
            array = np.array(weights[full], np.float32)
            part = array[rows] if axis == 0 else array
            part *= factors.reshape(-1, *[1] * (array.ndim - 1)) if axis == 0 else factors
            part += more * (factors - 1) if more else 0
            weights[full] = mx.array(array.astype(np.float16))

    for block in range(depth):
        real = round(block * 23 / max(1, depth - 1))
        for stream, ours in (("x_block", "img"), ("context_block", "txt")):

            def factors(kind: str, channels: int, real: int = real, ours: str = ours) -> np.ndarray:
                ratio = table["layers"].get(f"mm{real}.{ours}.{kind}", [1.0] * len(table["columns"]))[column]
                chosen, scales = rng.choice(channels, max(2, channels // 48), replace=False), np.ones(channels)
                scales[chosen] = 2.0 ** np.round(np.log2(np.geomspace(max(1.0, ratio / 3), 1, len(chosen))))
                return scales.astype(np.float32)

            name = f"{block}.{stream}"
            width = weights[f"{SD3.prefix}joint_blocks.{name}.attn.qkv.weight"].shape[1]
            for part, reader, (shift, scale) in (("attn.q_proj", "attn.qkv", (0, 1)), ("mlp.fc1", "mlp.fc1", (3, 4))):
                if f"{SD3.prefix}joint_blocks.{name}.{reader}.weight" not in weights:
                    continue  # the last block's text
                wide = factors(part, width)
                for row in (shift, scale):
                    rows = slice(row * width, (row + 1) * width)
                    change(f"{name}.adaLN_modulation.1.weight", rows, wide)
                    change(f"{name}.adaLN_modulation.1.bias", rows, wide, more=float(row == scale))
                change(f"{name}.{reader}.weight", slice(None), 1 / wide, axis=1)
            hidden = factors("mlp.fc2", 4 * width)
            change(f"{name}.mlp.fc1.weight", slice(None), hidden)
            change(f"{name}.mlp.fc2.weight", slice(None), 1 / hidden, axis=1)
        values = factors("attn.o_proj", width)
        for stream in ("x_block", "context_block"):
            change(f"{block}.{stream}.attn.qkv.weight", slice(2 * width, 3 * width), values)
            change(f"{block}.{stream}.attn.proj.weight", slice(None), 1 / values, axis=1)


def random_clip(width: int, heads: int, vocabulary: int, seed: int) -> tuple[dict, dict]:
    """Config and random float16 weights of a small CLIP text encoder, keyed as transformers keys it."""
    key = mx.random.key(seed)

    def linear(name: str, rows: int, columns: int) -> dict:
        nonlocal key
        key, now = mx.random.split(key)
        weight = mx.random.normal((rows, columns), key=now) * columns**-0.5
        return {f"{name}.weight": weight.astype(mx.float16), f"{name}.bias": mx.zeros((rows,), dtype=mx.float16)}

    def norm(name: str) -> dict:
        return {
            f"{name}.weight": mx.ones((width,), dtype=mx.float16),
            f"{name}.bias": mx.zeros((width,), dtype=mx.float16),
        }

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
    """sd3-emoji's vocabulary with every printable ASCII character; the end token keeps the largest id."""
    tokens = [token for token in vocabulary if token != "<|endoftext|>"]
    characters = [chr(code) + end for code in range(33, 127) for end in ("", "</w>")]
    tokens += [token for token in characters if token not in vocabulary]
    return {token: index for index, token in enumerate([*tokens, "<|endoftext|>"])}


def write_checkpoint(hf_home: Path, repository: str, outliers: bool = False) -> Path:
    """Write a repository's transformer and VAE, with what DiffusionKit asks for beside them; returns the transformer's file."""
    snapshot, family, config = hub_folder(hf_home, repository), family_of(repository), HUB_MMDIT_CONFIGS[repository]
    (snapshot / "config.json").write_text("{}")
    files = HUB_MMDIT_FILES[repository]
    weights = random_transformer_weights(config, family, guided="dev" in repository)
    if outliers:
        plant_outliers(weights, config.depth_multimodal)
    if family.vae_inside:
        weights |= random_vae(family)
    else:
        mx.save_safetensors(str(snapshot / files["vae"]), random_vae(family))
    mx.save_safetensors(str(snapshot / files[repository]), weights)
    return snapshot / files[repository]


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


def write_hub_cache(hf_home: Path, repository: str = SD3_MEDIUM, outliers: bool = False) -> Path:
    """Write everything that loading a model without T5 asks the hub for; returns the transformer's file."""
    write_text_encoders(hf_home)
    return write_checkpoint(hf_home, repository, outliers)


TINY = {"num_heads": 2, "depth_multimodal": 2, "hidden_size_override": 128}
TINY_PARTS = {"sd3": {"max_latent_resolution": 64}, "flux": {"depth_unified": 2, "rope_axes_dim": (8, 28, 28)}}


def make_tiny() -> None:
    """In this process: DiffusionKit's configs of all hub models at two blocks a kind of 128 channels, in place, as its loaders keep them."""
    for key, config in HUB_MMDIT_CONFIGS.items():
        vars(config).update(TINY | TINY_PARTS[family_of(key).name])


T5_XXL = {"d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24, "vocab_size": 32128}
T5_WIDTH = 4096
T5_TINY = {"d_kv": 8, "num_heads": 2, "d_ff": 24, "num_layers": 1, "vocab_size": 40}


def train_t5_tokenizer(texts: Sequence[str], pieces: int) -> bytes:
    """Train a SentencePiece model with T5's settings on a few texts; return its file's content."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=pieces, model_type="unigram", hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_t5(hf_home: Path, size: dict[str, int] = T5_XXL) -> None:
    """What DiffusionKit asks the hub for when T5 is on: a config, a tokenizer of a few pieces, random float16 weights."""
    google, ours = (hub_folder(hf_home, name) for name in ("google/t5-v1_1-xxl", TEXT_ENCODERS))
    config = {"model_type": "t5", "d_model": T5_WIDTH, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    (google / "config.json").write_text(json.dumps(config | size))
    (google / "spiece.model").write_bytes(train_t5_tokenizer(["a red rocket", "a cat"], 24))
    width, inner, hidden = T5_WIDTH, size["d_kv"] * size["num_heads"], size["d_ff"]
    shapes = {"encoder.embed_tokens.weight": (size["vocab_size"], width), "encoder.final_layer_norm.weight": (width,)}
    shapes |= {"shared.weight": (size["vocab_size"], width)}
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
    weights = {}
    for name, shape in shapes.items():
        weights[name] = (mx.random.normal(shape, key=mx.random.key(len(weights))) * 0.02).astype(mx.float16)
        mx.eval(weights[name])
    (ours / "t5").mkdir(exist_ok=True)
    mx.save_safetensors(str(ours / "t5" / "t5xxl.safetensors"), weights)
