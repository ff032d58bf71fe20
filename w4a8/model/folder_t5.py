"""T5 in a model folder: its section of config.json, its weights (packed or not), its tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from calibration_store.errors import StoreError
from calibration_store.files import read_bytes
from calibration_store.model_config import T5Section
from calibration_store.model_folder import LAYOUT, T5_PART, T5_PIECES, weight_file
from w4a8.model.diffusionkit import SD3T5Encoder, T5Tokenizer
from w4a8.model.parts import load_weights
from w4a8.model.t5 import AutoTokenizer, T5Config

NOT_OF_THE_NETWORK = ("max_length", "quantization")


def t5_section(model: nn.Module, published: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """Return the `t5` section of config.json.

    model: T5 as it is written; its packed layers are listed. published: the entries of T5's config on the hub.
    max_length: tokens of a prompt.
    """
    known = [key for key in T5Section.__annotations__ if key not in NOT_OF_THE_NETWORK]
    section = {key: published[key] for key in known if key in published}
    section["max_length"] = max_length
    packed = {
        path: {"group_size": module.group_size, "bits": module.bits}
        for path, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear)
    }
    return section | ({"quantization": next(iter(packed.values())) | packed} if packed else {})


def load_folder_t5(folder: Path, section: Mapping[str, Any], dtype: mx.Dtype) -> SD3T5Encoder:
    """Load a folder's T5 in a precision; packed layers stay packed. Raises ModelError for weights that do not fit."""
    config = {key: value for key, value in section.items() if key not in NOT_OF_THE_NETWORK}
    model = SD3T5Encoder(T5Config(**config), low_memory_mode=False)
    load_weights(model, weight_file(folder, T5_PART), dtype, section.get("quantization"))
    return model


class FolderT5Tokenizer(T5Tokenizer):
    """DiffusionKit's T5 tokenizer over a SentencePiece model that lies in a folder."""

    def __init__(self, pieces: Path, max_length: int):
        """Read the tokenizer. Raises StoreError for a file that is no SentencePiece model."""
        try:
            self._tokenizer = AutoTokenizer(read_bytes(pieces, LAYOUT))
        except RuntimeError as error:
            raise StoreError(f"{pieces}: no SentencePiece model ({' '.join(str(error).split())[:80]})") from None
        self.max_length, self._decoder_start_id = max_length, 0
        self.pad_to_max_length, self.pad_with_eos = True, False


def load_folder_pieces(folder: Path, max_length: int) -> FolderT5Tokenizer:
    """Load the T5 tokenizer of a folder, for prompts of at most `max_length` tokens. Raises StoreError."""
    return FolderT5Tokenizer(folder / T5_PIECES, max_length)
