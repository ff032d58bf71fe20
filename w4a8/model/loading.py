"""Load the parts of a model that a stage asks for, each in a precision that it states."""

import dataclasses
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from calibration_store.model_folder import (
    BUNDLED_MODEL,
    LAYOUT,
    check_exported,
    check_weight_file,
    config_file,
    missing_files,
    read_model_config,
    read_tokenizer_files,
    weight_file,
)
from w4a8.model.catalog import ModelError, ModelInfo, describe_model
from w4a8.model.diffusionkit import (
    HUB_MMDIT_CONFIGS,
    HUB_TEXT_ENCODERS,
    MMDIT_CKPT,
    CLIPTextModel,
    CLIPTextModelConfig,
    DiffusionPipeline,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    MMDiT,
    MMDiTConfig,
    ModelSamplingDiscreteFlow,
    SD3LatentFormat,
    SD3T5Encoder,
    T5Tokenizer,
    Tokenizer,
    VAEDecoder,
    hub_constants,
    model_io,
)
from w4a8.quantized.native import adopt, get_ready

TRANSFORMER, TEXT, DECODER = "transformer", "text encoders", "VAE decoder"
Parts = Mapping[str, str]  # part -> "float16" or "float32"


def whole_model(dtype: str) -> Parts:
    """Every part in one precision."""
    return dict.fromkeys((TRANSFORMER, TEXT, DECODER), dtype)


class Pipeline(DiffusionPipeline):
    """DiffusionKit's pipeline with the parts that were asked for; what was not is no attribute.

    The transformer's precision, or without one the first part's, is that of the activations.
    """

    model_version: str
    activation_dtype: mx.Dtype
    use_t5: bool
    sampler: ModelSamplingDiscreteFlow
    latent_format: SD3LatentFormat
    mmdit: MMDiT
    tokenizer_l: Tokenizer
    tokenizer_g: Tokenizer
    clip_l: CLIPTextModel
    clip_g: CLIPTextModel
    t5_encoder: "_T5Encoder"
    t5_tokenizer: T5Tokenizer
    decoder: VAEDecoder

    def __init__(self, info: ModelInfo, parts: Parts, use_t5: bool):
        self.model_version = info.version
        self.float16_dtype = mx.float16
        self.dtype = self.activation_dtype = getattr(mx, parts.get(TRANSFORMER) or next(iter(parts.values())))
        self.use_t5, self.use_clip_g, self.low_memory_mode = use_t5, True, False
        self.sampler = ModelSamplingDiscreteFlow(shift=info.sampler_shift)
        self.latent_format = SD3LatentFormat()


class FolderPipeline(Pipeline):
    """A model folder in sd3-emoji's layout instead of the hub's files; packed weights stay packed."""

    def __init__(self, info: ModelInfo, parts: Parts):
        super().__init__(info, parts, use_t5=False)
        self.folder, self.model_config = info.folder, read_model_config(info.folder)
        vars(self.latent_format).update(self.model_config["latent_format"])
        if TRANSFORMER in parts:
            self.load_mmdit()
        if TEXT in parts:
            self.tokenizer_l = self._load_tokenizer("l", default=True)
            self.tokenizer_g = self._load_tokenizer("g", default=False)
            for name in ("clip_l", "clip_g"):
                encoder = CLIPTextModel(CLIPTextModelConfig(**self.model_config[name]))
                setattr(self, name, _load_weights(encoder, weight_file(self.folder, name), getattr(mx, parts[TEXT])))
        if DECODER in parts:
            vae = self.model_config["vae"]
            decoder = VAEDecoder(
                block_out_channels=vae["block_out_channels"],
                layers_per_block=vae["decoder_layers_per_block"],
                resnet_groups=vae["resnet_groups"],
            )
            self.decoder = _load_weights(decoder, weight_file(self.folder, "decoder"), getattr(mx, parts[DECODER]))

    def load_mmdit(self, only_modulation_dict: bool = False) -> list[tuple[str, mx.array]] | None:
        """Load the transformer; with `only_modulation_dict` return its adaLN weights, as DiffusionKit's does."""
        if only_modulation_dict:
            return folder_modulation_weights(self.folder, self.dtype)
        self.mmdit = load_folder_transformer(self.folder, self.dtype)
        return None

    def _load_tokenizer(self, encoder: str, default: bool) -> Tokenizer:
        """The tokenizer of text encoder l or g; default: whether DiffusionKit pads with the end token there."""
        text = self.model_config[f"clip_{encoder}"]
        vocabulary, ranks = read_tokenizer_files(self.folder, text["vocab_size"])
        padding = self.model_config.get(f"tokenizer_{encoder}", {"pad_with_eos": default})
        tokenizer = Tokenizer(ranks, vocabulary, padding["pad_with_eos"])
        tokenizer.max_length = text["max_length"]
        return tokenizer


def transformer_config(folder: Path, config: Mapping[str, Any], dtype: mx.Dtype) -> MMDiTConfig:
    """DiffusionKit's config of a model folder's transformer, config: its config.json."""
    if "base_model" in config:
        return dataclasses.replace(HUB_MMDIT_CONFIGS[config["base_model"]], low_memory_mode=False, dtype=dtype)
    own = dict(config["mmdit"])
    own["hidden_size_override"] = own.pop("hidden_size")
    return MMDiTConfig(**own, low_memory_mode=False, dtype=dtype)


def load_folder_transformer(folder: Path, dtype: mx.Dtype) -> MMDiT:
    """The transformer of a model folder; packed layers stay packed and compute natively. Raises a UserError."""
    config = read_model_config(folder)
    check_exported(folder, config)
    model = MMDiT(transformer_config(folder, config, dtype))
    _load_weights(model, weight_file(folder, "mmdit"), dtype, config.get("quantization"))
    get_ready(model)
    return model


def folder_modulation_weights(folder: Path, dtype: mx.Dtype) -> list[tuple[str, mx.array]]:
    """(name, adaLN weight) of a model folder's transformer."""
    weights = mx.load(str(weight_file(folder, "mmdit")))
    return [(key, _cast(value, dtype)) for key, value in weights.items() if "adaLN" in key]


def _cast(value: mx.array, dtype: mx.Dtype) -> mx.array:
    return value if value.dtype == mx.uint32 else value.astype(dtype)  # packed codes


def _load_weights(
    model: nn.Module, path: Path, dtype: mx.Dtype, quantization: Mapping[str, Any] | None = None
) -> nn.Module:
    """quantization: as MLX's own tools write it to config.json (bits, group_size, exceptions by layer path)."""
    check_weight_file(path)
    try:
        weights = mx.load(str(path))
        if quantization is not None:
            nn.quantize(
                model, quantization["group_size"], quantization["bits"],
                class_predicate=lambda name, module: quantization.get(name, f"{name}.scales" in weights),
            )  # fmt: skip
            adopt(model)
        model.load_weights([(key, _cast(value, dtype)) for key, value in weights.items()])
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"cannot load {path}: {' '.join(str(error).split())[:200]}") from None
    _check_finite(model, path)
    return model


class HubPipeline(Pipeline):
    """A model of the Hugging Face hub, or of its local cache; local_checkpoint: its transformer and VAE come from there."""

    def __init__(self, info: ModelInfo, parts: Parts, use_t5: bool, local_checkpoint: Path | None):
        super().__init__(info, parts, use_t5)
        model_io.LOCAl_SD3_CKPT = str(local_checkpoint) if local_checkpoint else None
        model_io._FLOAT16 = self.float16_dtype
        self.mmdit_ckpt, self.model = MMDIT_CKPT[info.hub_id], HUB_TEXT_ENCODERS
        if info.hub_id != info.version:
            self.model_version = info.hub_id  # what DiffusionKit looks files up by
        if TRANSFORMER in parts:
            self.load_mmdit()
            _check_finite(self.mmdit, local_checkpoint or f"{info.version}, transformer")
        if DECODER in parts:
            self.load_decoder(parts[DECODER])
            _check_finite(self.decoder, local_checkpoint or f"{info.version}, VAE decoder")
        if TEXT in parts:
            self._load_text(info.version, parts[TEXT] == "float16")

    def load_decoder(self, dtype: str) -> None:
        self.decoder = model_io.load_vae_decoder(float16=dtype == "float16", key=self.mmdit_ckpt)

    def _load_text(self, version: str, half: bool) -> None:
        for encoder, padded in (("l", True), ("g", False)):
            clip = model_io.load_text_encoder(self.model, float16=half, model_key=f"clip_{encoder}")
            _check_finite(clip, f"{version}, CLIP-{encoder.upper()}")
            tokenizer = model_io.load_tokenizer(
                self.model, merges_key=f"tokenizer_{encoder}_merges", vocab_key=f"tokenizer_{encoder}_vocab",
                pad_with_eos=padded,
            )  # fmt: skip
            setattr(self, f"clip_{encoder}", clip)
            setattr(self, f"tokenizer_{encoder}", tokenizer)
        if self.use_t5:
            t5_encoder = model_io.load_t5_encoder(float16=half, low_memory_mode=False)
            _check_finite(t5_encoder, f"{version}, T5")
            self.t5_encoder = _T5Encoder(t5_encoder)
            self.set_up_t5()  # its tokenizer


class ExportedPipeline(HubPipeline):
    """A hub model whose transformer comes from an exported folder, and its decoder where the folder has one."""

    def __init__(self, info: ModelInfo, parts: Parts, use_t5: bool):
        self.folder = info.folder
        super().__init__(info, parts, use_t5, None)
        self.model_version = info.version

    load_mmdit = FolderPipeline.load_mmdit

    def load_decoder(self, dtype: str) -> None:
        path = weight_file(self.folder, "decoder")
        if path.exists():
            self.decoder = _load_weights(VAEDecoder(), path, getattr(mx, dtype))
        else:
            super().load_decoder(dtype)


def _check_finite(model: nn.Module, source: Path | str) -> None:
    """Read a model's weights. Raises ModelError that names a weight which is not finite: NaN would reach every image."""
    named = tree_flatten(model.parameters())
    finite = mx.stack([mx.isfinite(array).all() for _, array in named])
    mx.eval([array for _, array in named], finite)
    bad = [name for (name, _), fine in zip(named, finite.tolist(), strict=True) if not fine]
    if bad:
        raise ModelError(
            f"{source}: {bad[0]} holds NaN or infinity ({len(bad)} such weights); copy or download it again"
        )


class _T5Encoder:
    """DiffusionKit's T5 without its `mx.metal` memory limits, which raise KeyError off macOS.

    The same layers in the same order as diffusionkit.mlx.t5.TransformerEncoder.__call__.
    """

    def __init__(self, model: SD3T5Encoder):
        self.model = model

    def __call__(self, tokens: mx.array) -> mx.array:
        encoder = self.model.encoder
        x = self.model.wte(tokens)
        dtype, bias = x.dtype, encoder.relative_attention_bias(x.shape[1], x.shape[1])
        for layer in encoder.layers:
            x = layer(x, mask=bias)
        return encoder.ln(x).astype(dtype)


def _reach_hub() -> str | None:
    """Look the hub up once; without it use its local cache only, and say why.

    huggingface_hub by itself would retry for half a minute per file, with a warning for each try. Behind a proxy
    the name need not resolve here, so nothing is concluded.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    host = urllib.parse.urlsplit(hub_constants.ENDPOINT).hostname
    if hub_constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and it is not in the local cache"
    if urllib.request.getproxies():
        return None
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        hub_constants.HF_HUB_OFFLINE = True
        return f"no network: {host} cannot be found, and it is not in the local cache"
    return None


INSTEAD = f", or run now with --model {BUNDLED_MODEL}"


def load_pipeline(
    info: ModelInfo, parts: Parts, use_t5: bool = False, local_checkpoint: Path | None = None, instead: str = INSTEAD
) -> Pipeline:
    """Load the asked parts of a model, weights and activations of each as stated: {TRANSFORMER: "float16", …}.

    local_checkpoint replaces the hub's transformer and VAE file, as DiffusionKit's `--local-ckpt` does. instead: what
    else to do when the hub cannot be reached. Raises ModelError when the files cannot be had.
    """
    check_folder(info, use_t5, local_checkpoint)
    if info.hub_id is None:
        return _load_folder(info, parts)
    if local_checkpoint is not None:
        check_weight_file(local_checkpoint)
    unreachable = _reach_hub()
    try:
        if info.folder is not None:
            return ExportedPipeline(info, parts, use_t5)
        return HubPipeline(info, parts, use_t5, local_checkpoint)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = unreachable or str(error).strip().split("\n")[0][:160]
        raise ModelError(
            f"cannot get {info.hub_id} from the Hugging Face hub ({reason}): accept the licence on the model's page and "
            f"log in with `hf auth login`{instead}"
        ) from None
    except (RuntimeError, ValueError, KeyError) as error:
        source = local_checkpoint or info.version
        raise ModelError(f"cannot load {source}: {' '.join(str(error).split())[:200]}") from None


def check_folder(info: ModelInfo, use_t5: bool, local_checkpoint: Path | None) -> None:
    """Whether a model folder has its files, and options that go with it. Raises ModelError."""
    if info.folder is None:
        return
    if local_checkpoint is not None:
        raise ModelError("--local-checkpoint goes with a hub model; a model folder brings its own weights")
    if use_t5 and info.base is None:
        raise ModelError(f"--t5: {info.version} has no T5 text encoder; use --no-t5")
    missing = missing_files(info.folder, info.base is not None)
    if missing:
        raise ModelError(f"{info.folder}: no {', '.join(missing)}; {LAYOUT}")


def _load_folder(info: ModelInfo, parts: Parts) -> FolderPipeline:
    try:
        return FolderPipeline(info, parts)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{config_file(info.folder)}: {error}; {LAYOUT}") from None


def diffusionkit_pipeline(folder: str | Path, **options: Any) -> DiffusionPipeline:
    """DiffusionKit's own DiffusionPipeline whose transformer is that of an exported folder of a hub model.

    options: DiffusionPipeline's (w16, a16, shift, use_t5, low_memory_mode). Raises a UserError for a folder that is none.
    """
    info = describe_model(str(folder))
    if info.base is None:
        raise ModelError(f"{folder}: names no base_model, where DiffusionKit would find text encoders and VAE")

    class Exported(DiffusionPipeline):
        folder, load_mmdit = info.folder, FolderPipeline.load_mmdit

    pipeline = Exported(model_version=info.base, **options)
    decoder = weight_file(info.folder, "decoder")
    if decoder.exists():
        pipeline.decoder = _load_weights(VAEDecoder(), decoder, pipeline.dtype)
    return pipeline
