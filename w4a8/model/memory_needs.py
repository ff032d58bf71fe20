"""Estimate the memory that a pass of a model needs from file headers and shapes, before anything is loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from calibration_store.errors import OptionError
from calibration_store.safetensors_header import weight_sizes
from calibration_store.sizes import format_bytes
from w4a8.backend.memory import device_memory
from w4a8.model.catalog import model_files
from w4a8.model.checkpoint_contents import read_contents
from w4a8.model.decoding import decoding_elements
from w4a8.model.diffusionkit import MMDiTConfig, VAEDecoderConfig
from w4a8.model.parts import DECODER, TEXT, TRANSFORMER, Pipeline

# The numbers of arrays that a pass holds at its peak: arrays of (rows, tokens, hidden), and attention scores (a GPU
# never holds them). They were measured on a CPU with benchmarks/peak_memory.py --fit.
TOKEN_ARRAYS, SCORE_ARRAYS = 16.2, 1.31
DUAL_TOKEN_ARRAYS = 27.5  # where image tokens attend a second time (SD3.5-Medium)


SCALE_BITS = 0.5  # bits of scale and bias for a packed weight, in groups of 64


@dataclass(frozen=True)
class Needs:
    """Bytes of each part's weights, of a batch's passes, and of one image's decoding; 0 for parts that are not used."""

    text: int
    transformer: int
    decoder: int
    passes: int
    decoding: int

    @property
    def apart(self) -> int:
        """Return the peak when no two parts are in memory together."""
        return max(self.text, self.transformer + self.passes, self.decoder + self.decoding)

    @property
    def together(self) -> int:
        """Return the peak with transformer and decoder in memory together."""
        return max(self.text, self.transformer + self.decoder + max(self.passes, self.decoding))


def needs_of(pipeline: Pipeline, latent_size: tuple[int, int], images: int, guidance: bool, timesteps: int) -> Needs:
    """Estimate the memory that a batch of `images` images needs. Guidance doubles the rows.

    timesteps: the number of them in the modulation cache. Only headers of the files are read.
    """
    info, parts = pipeline.info, pipeline.parts
    files = model_files(info, pipeline.use_t5) or {}
    weights = dict.fromkeys((TEXT, TRANSFORMER, DECODER), 0)
    for part, roles, prefix in (
        (TEXT, ("clip_l", "clip_g", "t5"), ""),
        (TRANSFORMER, ("mmdit",), info.family.checkpoint.prefix if info.folder is None else ""),
        (DECODER, ("vae", "decoder"), f"{info.family.checkpoint.vae_prefix}decoder." if "decoder" not in files else ""),
    ):
        if part in parts:
            size = getattr(mx, parts[part]).size
            packed = {"t5": (info.text_bits + SCALE_BITS) / 16} if info.text_bits != 16 else {}
            found = [bytes_of(files[role], prefix, size) * packed.get(role, 1) for role in roles if role in files]
            weights[part] = round(sum(found))
    if info.checkpoint is not None:
        contents = read_contents(info.checkpoint)
        clip = [prefix for prefix in map(contents.clip, info.family.clip) if prefix]
        inside = {
            TRANSFORMER: contents.transformer.values(),
            TEXT: [shape for prefix in clip for shape in contents.shapes_of(prefix).values()],
            DECODER: contents.shapes_of(f"{contents.vae or ''}decoder.").values(),
        }
        for part, shapes in inside.items():
            if part in parts:
                weights[part] += sum(map(math.prod, shapes)) * getattr(mx, parts[part]).size
    rows, itemsize = images * (2 if guidance else 1), pipeline.activation_dtype.size
    return Needs(
        weights[TEXT], weights[TRANSFORMER], weights[DECODER],
        pass_bytes(pipeline.mmdit_config, latent_size, rows, timesteps, itemsize, pipeline.text_tokens),
        decoding_bytes(pipeline, latent_size, itemsize) if DECODER in parts else 0,
    )  # fmt: skip


def bytes_of(path: Path, prefix: str, size: int) -> int:
    """Return the bytes of a file's weights under a prefix, at `size` bytes an element; packed codes stay packed."""
    chosen = [found for name, found in weight_sizes(path).items() if name.startswith(prefix)]
    return sum(elements * (4 if dtype == "U32" else size) for dtype, elements in chosen)


def pass_bytes(
    config: MMDiTConfig, latent_size: tuple[int, int], rows: int, timesteps: int, itemsize: int, text: int
) -> int:
    """Estimate the bytes of one forward pass beside the weights.

    They are the activations at their peak, and the modulation cache of all timesteps. text: the number of text tokens.
    """
    tokens = latent_size[0] * latent_size[1] // config.patch_size**2 + text
    dual = getattr(config, "dual_attention_blocks", 0)
    arrays = (DUAL_TOKEN_ARRAYS if dual else TOKEN_ARRAYS) * rows * tokens * config.hidden_size
    if mx.default_device() == mx.Device(mx.cpu):
        arrays += SCORE_ARRAYS * rows * config.num_heads * tokens**2
    modulation = (
        (12 * config.depth_multimodal + 3 * (dual + config.depth_unified) + 2) * config.hidden_size * rows * timesteps
    )
    return int((arrays + modulation) * itemsize)


def decoding_bytes(pipeline: Pipeline, latent_size: tuple[int, int], itemsize: int) -> int:
    """Return the bytes of one image's decoding beside the decoder's weights; on a GPU it takes less."""
    vae, hub = getattr(pipeline, "model_config", {}).get("vae"), VAEDecoderConfig()
    channels = vae["block_out_channels"] if vae else hub.block_out_channels
    resnets = vae["decoder_layers_per_block"] if vae else hub.layers_per_block
    return decoding_elements(channels, resnets, *latent_size) * itemsize


def refuse_too_large(pipeline: Pipeline, needs: Needs, images: int, options: Sequence[str]) -> bool:
    """Raise OptionError when the parts do not fit into memory one after the other.

    Returns whether transformer and decoder fit together. images: the number of them in a batch. options: those that
    the user can still choose, such as --batch-size.
    """
    memory = device_memory()
    if needs.apart <= memory:
        return needs.together <= memory
    if needs.text > memory:
        found = ["--no-t5", "--dtype float16"]
    elif needs.transformer + needs.passes > memory:
        fits = int((memory - needs.transformer) * images / needs.passes)
        found = [f"--batch-size {fits}"] if fits >= 1 and images > 1 else ["--dtype float16", "--latent-size"]
    else:
        found = ["--no-images", "--latent-size"]
    found = [option for option in found if option.split()[0] in options]
    way = " or ".join(found) or "a run of stage 1 with --no-t5, --dtype float16 or a smaller --latent-size"
    raise OptionError(
        f"{pipeline.info.version} takes about {format_bytes(needs.apart)} of memory, and {format_bytes(memory)} are "
        f"there: {way} takes less"
    )
