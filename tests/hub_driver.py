"""Run by test_hub.py in a process of its own: stage 1 over a hub cache whose SD3-Medium is tiny."""

import w4a8  # noqa: F401  (before MLX)

# isort: split
import dataclasses
import json
import runpy
import sys
from pathlib import Path

import mlx.core as mx
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.hub_cache import SD3_MEDIUM, TEXT_ENCODERS, hub_folder, write_hub_cache
from w4a8.model.diffusionkit import HUB_MMDIT_CONFIGS

TINY = dataclasses.replace(HUB_MMDIT_CONFIGS[SD3_MEDIUM], depth_multimodal=2, num_heads=2, max_latent_resolution=64)


def write_tiny_t5(hf_home):
    """What DiffusionKit asks the hub for when T5 is on: a config, a tokenizer and weights of one layer."""
    google, ours = (hub_folder(hf_home, name) for name in ("google/t5-v1_1-xxl", TEXT_ENCODERS))
    width, inner, hidden, tokens = 4096, 16, 24, 40
    config = {
        "model_type": "t5",
        "d_model": width,
        "d_kv": 8,
        "num_heads": 2,
        "d_ff": hidden,
        "num_layers": 1,
        "vocab_size": tokens,
    }
    config |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    (google / "config.json").write_text(json.dumps(config))
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "rocket"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(google / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (google / "tokenizer_config.json").write_text(json.dumps(names))
    block = "encoder.block.0.layer"
    shapes = {f"{block}.0.SelfAttention.{part}.weight": (inner, width) for part in "qkv"}
    shapes |= {f"{block}.1.DenseReluDense.{part}.weight": (hidden, width) for part in ("wi_0", "wi_1")}
    shapes |= {
        f"{block}.0.SelfAttention.o.weight": (width, inner),
        f"{block}.1.DenseReluDense.wo.weight": (width, hidden),
    }
    shapes |= {f"{block}.0.SelfAttention.relative_attention_bias.weight": (32, 2)}
    shapes |= {f"{block}.{i}.layer_norm.weight": (width,) for i in range(2)} | {
        "encoder.final_layer_norm.weight": (width,)
    }
    shapes |= {"encoder.embed_tokens.weight": (tokens, width), "shared.weight": (tokens, width)}
    weights = {name: mx.random.normal(shape, key=mx.random.key(len(name))) * 0.02 for name, shape in shapes.items()}
    (ours / "t5").mkdir(exist_ok=True)
    mx.save_safetensors(str(ours / "t5" / "t5xxl.safetensors"), weights)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_hub_cache(Path(sys.argv[2]), TINY)
        write_tiny_t5(Path(sys.argv[2]))
    else:
        HUB_MMDIT_CONFIGS[SD3_MEDIUM] = TINY
        runpy.run_module("generate_calibration_data", run_name="__main__")
