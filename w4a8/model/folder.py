"""Load models from a folder: in sd3-emoji's layout, or with the exported transformer of a hub model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from calibration_store.model_folder import (
    LAYOUT,
    check_exported,
    config_file,
    read_model_config,
    read_tokenizer_files,
    weight_file,
)
from calibration_store.safetensors_header import weight_shapes
from w4a8.model.catalog import FolderModel, ModelError
from w4a8.model.clip_tokenizer import ClipTokenizer
from w4a8.model.diffusionkit import (
    CLIPTextModel,
    CLIPTextModelConfig,
    MMDiT,
    VAEDecoder,
)
from w4a8.model.dual_attention import TransformerSizes
from w4a8.model.families import family_of
from w4a8.model.folder_t5 import load_folder_pieces, load_folder_t5
from w4a8.model.location import Lora
from w4a8.model.lora import fuse_text_encoder
from w4a8.model.original_model import K_BIAS, original_transformer
from w4a8.model.packed import AUTO, get_ready
from w4a8.model.parts import TEXT, TRANSFORMER, Parts, Pipeline, cast, load_weights
from w4a8.model.t5 import T5Encoder
from w4a8.model.weight_files import load_arrays


class FolderPipeline(Pipeline):
    """DiffusionKit's pipeline over a model folder in sd3-emoji's layout; packed weights stay packed."""

    def __init__(self, info: FolderModel, parts: Parts, use_t5: bool, native: str = AUTO):
        super().__init__(info, parts, use_t5, native)
        self.folder = info.folder
        with self.explained():
            self.model_config = read_model_config(info.folder)
            self.mmdit_config = transformer_config(info.folder, self.model_config, self.activation_dtype)
            vars(self.latent_format).update(self.model_config["latent_format"])
            if TEXT in parts:
                self.tokenizer_l = self._load_tokenizer("l", default=True)
                self.tokenizer_g = self._load_tokenizer("g", default=False)
            if use_t5:
                self.t5_length = self.model_config["t5"]["max_length"]
                if TEXT in parts:
                    self.t5_tokenizer = load_folder_pieces(self.folder, self.t5_length)

    def read(self, part: str) -> None:
        """Set the part's attributes from its files in the folder."""
        dtype = getattr(mx, self.parts[part])
        if part == TRANSFORMER:
            self.load_mmdit()
        elif part == TEXT:
            for name in ("clip_l", "clip_g"):
                encoder = CLIPTextModel(CLIPTextModelConfig(**self.model_config[name]))
                load_weights(encoder, weight_file(self.folder, name), dtype)
                fuse_text_encoder(encoder, name, self.family, self.info.loras)
                setattr(self, name, encoder)
            if self.use_t5:
                t5_encoder = load_folder_t5(self.folder, self.model_config["t5"], dtype)
                fuse_text_encoder(t5_encoder, "t5", self.family, self.info.loras)
                self.t5_encoder = T5Encoder(t5_encoder)
        else:
            vae = self.model_config["vae"]
            decoder = VAEDecoder(
                block_out_channels=vae["block_out_channels"],
                layers_per_block=vae["decoder_layers_per_block"],
                resnet_groups=vae["resnet_groups"],
            )
            self.decoder = load_weights(decoder, weight_file(self.folder, "decoder"), dtype)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an error of the block into a ModelError that names config.json."""
        try:
            yield
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{config_file(self.folder)}: {error}; {LAYOUT}") from None

    def load_mmdit(self, only_modulation_dict: bool = False) -> list[tuple[str, mx.array]] | None:
        """Load the transformer. With `only_modulation_dict` return its adaLN weights instead, as DiffusionKit does."""
        if only_modulation_dict:
            return folder_modulation_weights(self.folder, self.dtype)
        self.mmdit = load_folder_transformer(self.folder, self.dtype, self.info.loras, self.native, self.info.guidance)
        return None

    def _load_tokenizer(self, encoder: str, default: bool) -> ClipTokenizer:
        """Load the tokenizer of text encoder l or g. default: whether DiffusionKit pads with the end token there."""
        text = self.model_config[f"clip_{encoder}"]
        vocabulary, ranks = read_tokenizer_files(self.folder, text["vocab_size"])
        padding = self.model_config.get(f"tokenizer_{encoder}", {"pad_with_eos": default})
        tokenizer = ClipTokenizer(ranks, vocabulary, padding["pad_with_eos"])
        tokenizer.max_length = text["max_length"]
        return tokenizer


def transformer_config(folder: Path, config: Mapping[str, Any], dtype: mx.Dtype) -> TransformerSizes:
    """Make DiffusionKit's config of a model folder's transformer. config: the content of its config.json.

    dtype: what timesteps are embedded in where config.json says nothing; a hub model's config has its own.
    """
    if "base_model" in config:
        return family_of(config["base_model"]).config
    own = dict(config["mmdit"])
    own["hidden_size_override"] = own.pop("hidden_size")
    embedded = own.pop("timestep_dtype", None)
    return TransformerSizes(**own, low_memory_mode=False, dtype=getattr(mx, embedded) if embedded else dtype)


def load_folder_transformer(
    folder: Path, dtype: mx.Dtype, loras: Sequence[Lora] = (), native: str = AUTO, guidance: float | None = None
) -> MMDiT:
    """Load the transformer of a model folder; packed layers stay packed and compute natively.

    Raises a UserError for files that are missing, damaged or not those of the export, and for LoRAs on packed weights.
    """
    config = read_model_config(folder)
    check_exported(folder, config)
    names = weight_shapes(weight_file(folder, "mmdit"))
    if "base_model" in config and not any(name.endswith(K_BIAS) for name in names):
        raise ModelError(f"{folder}: exported by 0.8.0, which left k's bias out; export the model again")
    model = original_transformer(transformer_config(folder, config, dtype), names, guidance)
    if loras and "quantization" in config:
        raise ModelError(f"--lora: the weights of {folder} are packed already; fuse it before they are quantized")
    load_weights(model, weight_file(folder, "mmdit"), dtype, config.get("quantization"), loras, native)
    get_ready(model)
    return model


def folder_modulation_weights(folder: Path, dtype: mx.Dtype) -> list[tuple[str, mx.array]]:
    """Read (name, adaLN weight) of a model folder's transformer."""
    weights = load_arrays(weight_file(folder, "mmdit"), packed=True)
    return [(key, cast(value, dtype)) for key, value in weights.items() if "adaLN" in key]
