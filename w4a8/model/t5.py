"""Replace transformers for T5, and run T5's encoder without DiffusionKit's memory limits for Metal.

DiffusionKit asks transformers for T5's config and its tokenizer. Both come from files of google/t5-v1_1-xxl on the hub:
config.json, and spiece.model, which the package sentencepiece reads. The token ids equal those of transformers 4.46 and
5.24 (tests/references/t5_tokens.py). Special tokens that are spelled out in a prompt, such as `</s>`, are ordinary
text.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.model_folder import CONFIG_FILE
from w4a8.backend.lazy_imports import deferred
from w4a8.model.hub_files import hub_file

with deferred("sentencepiece"):
    from sentencepiece import SentencePieceProcessor


REPOSITORY = "google/t5-v1_1-xxl"  # of T5's config and its tokenizer


class T5Config(SimpleNamespace):
    """The entries of a T5 model's config.json as attributes; T5's defaults where the published files have no entry."""

    def __init__(self, **entries: object):
        defaults = {
            "layer_norm_epsilon": 1e-6,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "decoder_start_token_id": 0,
        }
        super().__init__(**defaults | entries)

    @classmethod
    def from_pretrained(cls, repository: str) -> "T5Config":
        """Read the config of a repository of the hub. Raises HubFileError."""
        return cls(**json.loads(Path(hub_file(repository, CONFIG_FILE, download=True)).read_text(encoding="utf-8")))


class AutoTokenizer:
    """T5's tokenizer with the interface that DiffusionKit calls."""

    eos_token_id = 1

    def __init__(self, model: bytes):
        """model: the content of spiece.model, a SentencePiece model."""
        self._pieces = SentencePieceProcessor(model_proto=model)

    @classmethod
    def from_pretrained(cls, repository: str, **options: object) -> "AutoTokenizer":
        """Read the tokenizer of a repository of the hub. Raises HubFileError."""
        return cls(Path(hub_file(repository, "spiece.model", download=True)).read_bytes())

    def __call__(self, text: str, max_length: int, **options: object) -> dict[str, np.ndarray]:
        """Tokenize a prompt.

        Returns {"input_ids": (1, tokens) int64} with at most `max_length` ids, the last of which is the end token.
        """
        ids = [*self._pieces.encode(text)[: max_length - 1], self.eos_token_id]
        return {"input_ids": np.array([ids])}


class T5Encoder:
    """DiffusionKit's T5 without its `mx.metal` memory limits, which raise KeyError off macOS.

    It runs the same layers in the same order as diffusionkit.mlx.t5.TransformerEncoder.__call__.
    """

    def __init__(self, model: nn.Module):
        """model: a diffusionkit.mlx.t5.SD3T5Encoder."""
        self.model = model

    def __call__(self, tokens: mx.array) -> mx.array:
        """Encode token ids (rows, tokens) to features (rows, tokens, channels) in the dtype of the embedding."""
        encoder = self.model.encoder
        x = self.model.wte(tokens)
        dtype, bias = x.dtype, encoder.relative_attention_bias(x.shape[1], x.shape[1])
        for layer in encoder.layers:
            x = layer(x, mask=bias)
            mx.eval(x)  # else CUDA holds every layer's arrays until the end, 12 GB a prompt
        return encoder.ln(x).astype(dtype)
