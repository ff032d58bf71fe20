"""DiffusionKit's pipeline in parts: each in a precision that the stage states, in memory only while it is needed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from calibration_store.model_folder import check_weight_file
from w4a8.backend.parallel import streams_for
from w4a8.model.catalog import ModelError, ModelInfo
from w4a8.model.clip_tokenizer import ClipTokenizer
from w4a8.model.diffusionkit import (
    CLIPTextModel,
    DiffusionPipeline,
    FluxSampler,
    LatentFormat,
    MMDiT,
    MMDiTConfig,
    ModelSamplingDiscreteFlow,
    T5Tokenizer,
    VAEDecoder,
)
from w4a8.model.families import FOLDER_FAMILY, MODELS
from w4a8.model.location import Lora
from w4a8.model.lora import with_loras
from w4a8.model.packed import AUTO, adopt
from w4a8.model.t5 import T5Encoder
from w4a8.model.weight_files import load_arrays

TRANSFORMER, TEXT, DECODER = "transformer", "text encoders", "VAE decoder"
Parts = Mapping[str, str]  # part -> "float16" ("bfloat16" where that is the model's) or "float32"


def whole_model(dtype: str) -> Parts:
    """Return the request for every part, in one precision."""
    return dict.fromkeys((TRANSFORMER, TEXT, DECODER), dtype)


ATTRIBUTES = {TRANSFORMER: ("mmdit",), TEXT: ("clip_l", "clip_g", "t5_encoder"), DECODER: ("decoder",)}


class Pipeline(DiffusionPipeline, ABC):
    """DiffusionKit's pipeline with the parts that were asked for; other parts are no attributes.

    A part is read when it is first used, or by `load`, and stays until `drop`; its next use reads it again. The
    activations have the precision of the transformer, or without a transformer that of the first part.
    """

    model_version: str
    activation_dtype: mx.Dtype
    use_t5: bool
    sampler: ModelSamplingDiscreteFlow | FluxSampler
    latent_format: LatentFormat
    mmdit: MMDiT
    tokenizer_l: ClipTokenizer
    tokenizer_g: ClipTokenizer
    clip_l: CLIPTextModel
    clip_g: CLIPTextModel
    t5_encoder: T5Encoder
    t5_tokenizer: T5Tokenizer
    decoder: VAEDecoder

    mmdit_config: MMDiTConfig  # the transformer's, known before its weights are read

    def __init__(self, info: ModelInfo, parts: Parts, use_t5: bool, native: str = AUTO):
        self.info, self.parts, self.native = info, dict(parts), native
        self.model_version = info.version
        self.family = family = info.family
        self.float16_dtype = getattr(mx, family.half)
        self.dtype = self.activation_dtype = getattr(mx, parts.get(TRANSFORMER) or next(iter(parts.values())))
        self.use_t5, self.use_clip_g, self.low_memory_mode = use_t5, "clip_g" in family.clip, False
        self.t5_length = MODELS[info.hub_id].t5_tokens if info.hub_id is not None else 0  # tokens of a prompt
        self.sampler = family.new_sampler(info.sampler_shift)
        self.latent_format = family.latent_format()

    def encode_text(self, *arguments: Any) -> tuple[mx.array, mx.array]:
        """Encode a prompt as DiffusionKit's pipeline of the model's architecture does."""
        return self.family.pipeline.encode_text(self, *arguments)

    @property
    def tokenizers(self) -> list[ClipTokenizer]:
        """Return the tokenizers of the model's CLIP encoders."""
        return [getattr(self, name.replace("clip", "tokenizer")) for name in self.family.clip]

    @property
    def text_tokens(self) -> int:
        """Return the number of a prompt's tokens: CLIP's, then T5's; with FLUX T5's alone.

        Without T5 DiffusionKit appends zeros in the number of CLIP's tokens.
        """
        length = self.tokenizers[0].max_length
        if self.family.needs_t5:
            return self.t5_length
        return length + (self.t5_length if self.use_t5 else length)

    def __getattr__(self, name: str) -> Any:
        """Load the part that an absent attribute belongs to, and return the attribute."""
        for part, names in ATTRIBUTES.items():
            if name in names and part in vars(self).get("parts", ()) and not self.has(part):
                self.load(part)
                return getattr(self, name)
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def has(self, part: str) -> bool:
        """Return whether a part is in memory."""
        return any(name in vars(self) for name in ATTRIBUTES[part])

    def load(self, part: str) -> None:
        """Read a part that is not in memory, and check that its weights are finite. Raises ModelError."""
        if not self.has(part):
            with self.explained():
                self.read(part)

    def drop(self, *parts: str) -> None:
        """Drop parts, and the memory that MLX would cache of them."""
        for part in parts:
            for name in ATTRIBUTES[part]:
                self.__dict__.pop(name, None)
        mx.clear_cache()

    @abstractmethod
    def read(self, part: str) -> None:
        """Set the part's attributes from its files."""

    @abstractmethod
    def explained(self) -> AbstractContextManager[None]:
        """Turn an error of the block into a ModelError that names the file."""


def cast(value: mx.array, dtype: mx.Dtype, stream: mx.Stream | None = None) -> mx.array:
    """Cast an array to a precision; packed codes (uint32) stay as they are."""
    return value if value.dtype == mx.uint32 else value.astype(dtype, stream=stream)


def to_numpy(array: mx.array) -> np.ndarray:
    """Convert an MLX array to NumPy, bfloat16 (which NumPy lacks) to float32."""
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def load_weights(
    model: nn.Module, path: Path, dtype: mx.Dtype, quantization: Mapping[str, Any] | None = None,
    loras: Sequence[Lora] = (), native: str = AUTO,
) -> nn.Module:  # fmt: skip
    """Load a file's weights into a model in a precision, and check that they are finite. Returns the model.

    quantization: the entry that MLX's own tools write to config.json (bits, group_size, exceptions by layer path); its
    layers stay packed, and multiply as `native` says. Raises ModelError for weights that do not fit, or are not finite.
    """
    check_weight_file(path)
    try:
        weights = load_arrays(path, packed=quantization is not None)
        if quantization is not None:
            scales = {key for key in weights if key.endswith(".scales")}
            nn.quantize(
                model, quantization["group_size"], quantization["bits"],
                class_predicate=lambda name, module: quantization.get(name, f"{name}.scales" in scales),
            )  # fmt: skip
            adopt(model, native)
        weights = with_loras(weights, FOLDER_FAMILY, loras)
        model.load_weights([(key, weights.pop(key)) for key in list(weights)])
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"cannot load {path}: {' '.join(str(error).split())[:200]}") from None
    check_finite(model, path, dtype)
    return model


READ_AT_ONCE = 10**8  # elements of the weights that are read before they are evaluated


def check_finite(model: nn.Module, source: Path | str, dtype: mx.Dtype | None = None) -> None:
    """Read a model's weights, a few at a time, and check that they are finite, because NaN would reach every image.

    dtype: the precision that weights are cast to while they are read; None: they stay as they are. The cores of a CPU
    share the work. Raises ModelError that names the source and a weight that is not finite.
    """
    bad: list[str] = []
    named = dict(tree_flatten(model.parameters()))
    with streams_for(len(named)) as streams:
        turns = _shared_out(named, streams)
        del named  # the casts alone hold what is read, until they are done
        if dtype is not None:
            model.update(tree_map_with_path(lambda name, array: cast(array, dtype, turns[name]), model.parameters()))
        for some in _groups(list(dict(tree_flatten(model.parameters())).items())):
            # On a CPU a sum takes a third of the time of isfinite; only a weight whose sum overflows is looked at closely.
            sums = [array.sum(stream=turns[name]).astype(mx.float32, stream=turns[name]) for name, array in some]
            mx.eval([array for _, array in some], sums)
            unclear = [pair for pair, total in zip(some, sums, strict=True) if not np.isfinite(np.array(total))]
            bad += [name for name, array in unclear if not mx.isfinite(array).all().item()]
    if bad:
        raise ModelError(
            f"{source}: {bad[0]} holds NaN or infinity ({len(bad)} such weights); copy or download it again"
        )


def _shared_out(named: Mapping[str, mx.array], streams: Sequence[mx.Stream]) -> dict[str, mx.Stream]:
    """Return {name: the stream that has the fewest elements when its turn comes}."""
    given, turns = [0] * len(streams), {}
    for name, array in named.items():
        turn = given.index(min(given))
        given[turn] += array.size
        turns[name] = streams[turn]
    return turns


def _groups(named: Sequence[tuple[str, mx.array]]) -> Iterator[list[tuple[str, mx.array]]]:
    """Yield weights in groups of at most READ_AT_ONCE elements, or of one weight that is larger."""
    some: list[tuple[str, mx.array]] = []
    size = 0
    for name, array in named:
        if some and size + array.size > READ_AT_ONCE:
            yield some
            some, size = [], 0
        some.append((name, array))
        size += array.size
    if some:
        yield some
