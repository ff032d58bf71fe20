"""Say from the header of a checkpoint what it holds: whose transformer, in which layout, and which other parts."""

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import orjson
from safetensors import SafetensorError, safe_open

from calibration_store.errors import UserError
from calibration_store.safetensors_header import weight_shapes
from w4a8.model.families import FAMILIES, MODELS, Family
from w4a8.model.gguf_weights import gguf_shapes, is_gguf
from w4a8.model.weight_files import refuse_other_kinds

ORIGINAL, DIFFUSERS = "original", "diffusers"
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
FIRST_OF_DIFFUSERS = "transformer_blocks.0."
BLOCK_KEY = re.compile(r"(?:joint_blocks|double_blocks|(?<!single_)transformer_blocks)\.(\d+)\.")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
CLIP = "text_encoders.{}.transformer."
OTHER_PARTS = {  # how keys of parts that are not read begin -> the part
    "text_encoders.t5xxl.": "T5", "text_encoders.": "text encoders", "model_ema.": "averaged weights",
    "conditioner.": "text encoders", "cond_stage_model.": "text encoders", "vae.": "VAE", "first_stage_model.": "VAE",
}  # fmt: skip
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
OURS = ", ".join(entry.title for entry in MODELS.values())
# A part of a key that only one model has -> the model, for checkpoints that are none of ours.
STRANGERS = (
    ("distilled_guidance_layer.", "Chroma"),
    ("double_stream_modulation", "FLUX.2"),
    ("noise_refiner.", "Z-Image or Lumina"),
    ("transformer_blocks.0.img_mod.", "Qwen-Image"),
    ("individual_token_refiner.", "HunyuanVideo"),
    ("double_stream_blocks.", "HiDream"),
    ("double_layers.", "AuraFlow"),
    ("joint_transformer_blocks.", "AuraFlow"),
    ("input_blocks.", "a U-Net (SDXL or SD1.5)"),
    ("down_blocks.0.attentions.", "a U-Net (SDXL or SD1.5)"),
    ("adaln_single.", "PixArt or LTX"),
    ("caption_projection.", "PixArt or Sana"),
    ("blocks.0.self_attn.", "Wan"),
    ("controlnet_", "a ControlNet"),
)
# A part of a key -> what a file without any transformer is.
LONE_PARTS = (
    ("lora_", "a LoRA; give it with --lora"),
    (".lora", "a LoRA; give it with --lora"),
    ("multimodal_transformer_blocks.", "the transformer of a model folder; give the folder"),
    ("transformer_blocks.", "a part of a transformer in the layout of diffusers"),
    ("encoder.block.0.", "T5, a text encoder"),
    ("text_model.", "CLIP, a text encoder"),
    ("decoder.conv_in.", "a VAE"),
)
FLUX_INPUTS = {384: "FLUX.1-Fill", 128: "FLUX.1-Canny or -Depth"}  # channels of img_in's input: 64 in the plain model
KONTEXT = re.compile(r"kontext", re.IGNORECASE)


@dataclass(frozen=True)
class Contents:
    """The parts of a checkpoint, by the prefixes of their keys."""

    path: Path
    files: tuple[Path, ...]  # the checkpoint's, or those that its index names
    shapes: Mapping[str, tuple[int, ...]]  # of every array, by its key
    prefix: str  # of the transformer
    layout: str | None  # ORIGINAL or DIFFUSERS; None: no transformer
    architecture: str | None
    title: str  # the file's name, and the title in its metadata

    @property
    def transformer(self) -> dict[str, tuple[int, ...]]:
        """Return {key without prefix: shape} of the transformer's arrays."""
        return {
            key.removeprefix(self.prefix): shape
            for key, shape in self.shapes.items()
            if key.startswith(self.prefix) and (self.prefix or not key.startswith(tuple(OTHER_PARTS)))
        }

    def shapes_of(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Return {key: shape} of the arrays whose keys begin so."""
        return {key: shape for key, shape in self.shapes.items() if key.startswith(prefix)}

    @property
    def vae(self) -> str | None:
        """Return the prefix of the VAE's keys; None where the checkpoint holds none."""
        return next((prefix for prefix in VAE_PREFIXES if f"{prefix}decoder.conv_in.weight" in self.shapes), None)

    def clip(self, encoder: str) -> str | None:
        """Return the prefix of a CLIP encoder's keys, clip_l or clip_g; None where the checkpoint holds it not whole."""
        prefix = CLIP.format(encoder)
        needed = ("embeddings.token_embedding", "encoder.layers.0.self_attn.q_proj", "final_layer_norm")
        whole = all(f"{prefix}text_model.{name}.weight" in self.shapes for name in needed)
        return prefix if whole else None

    def left_out(self) -> list[str]:
        """Return the names of the parts that are not read."""
        read = tuple(CLIP.format(name) for name in ("clip_l", "clip_g") if self.clip(name))
        read += (self.vae,) if self.vae else ()
        keys = [key for key in self.shapes if not key.startswith((*read, self.prefix or "\0"))]
        return sorted(
            {next((part for start, part in OTHER_PARTS.items() if key.startswith(start)), "") for key in keys} - {""}
        )

    def hub_id(self) -> str:
        """Return the hub's model that has this transformer's blocks, width and norms. Raises UserError for another."""
        if self.architecture is None:
            refuse_stranger(self.path, self.shapes)
        keys = self.transformer
        refuse_relatives(self.path, keys, self.title)
        families = [family for family in FAMILIES.values() if family.architecture == self.architecture]
        if len(families) > 1:
            families = [family for family in families if sizes_of(family) == sizes_in(keys)]
        if not families:
            depth, width, _, dual = sizes_in(keys)
            second = f", {dual} of them with a second attention" if dual else ""
            raise UserError(
                f"{self.path}: a transformer of {self.architecture.upper()}'s kind with {depth} blocks of {width} channels{second}, which this "
                f"toolkit does not know; it knows {OURS}"
            )
        first, *others = families[0].models
        for entry in others:
            words = re.split(r"[^a-z0-9]+", self.title.lower())
            titled = entry.told_by_title != "" and entry.told_by_title in words
            if titled or any(mark in key for mark in entry.told_by_keys for key in keys):
                return entry.id
        return first.id


def sizes_of(family: Family) -> tuple[int, int, bool, int]:
    """Return what tells transformers of one architecture apart: depth, width, whether q and k are normalized, dual blocks."""
    config = family.config
    return config.depth_multimodal, config.hidden_size, bool(config.use_qk_norm), config.dual_attention_blocks


def sizes_in(keys: Mapping[str, tuple[int, ...]]) -> tuple[int, int, bool, int]:
    """Return what `sizes_of` returns, from the keys and shapes of a checkpoint's transformer."""
    found = [(int(block[1]), key) for key in keys if (block := BLOCK_KEY.match(key))]
    width = next((keys[name][0] for name in ("context_embedder.weight", "txt_in.weight") if name in keys), 0)
    normed = any(mark in key for mark in (".ln_q.", ".norm_q.", ".query_norm.") for key in keys)
    return (
        1 + max((number for number, _ in found), default=-1),
        width,
        normed,
        len({n for n, key in found if ".attn2." in key}),
    )


def read_contents(path: Path) -> Contents:
    """Read the header of a checkpoint, of every file that an index names, or of a GGUF file, once. Raises UserError."""
    shard = SHARD.search(path.name)
    if shard:
        raise UserError(f"{path}: one of {int(shard[1])} files of a model; give its index, …safetensors.index.json")
    files, stamps = checkpoint_files(path), []
    with contextlib.suppress(OSError):  # the reader says what is wrong
        stamps = [(state.st_mtime_ns, state.st_size) for state in map(os.stat, files)]
    return _contents_of(path, files, tuple(stamps))


@functools.lru_cache(maxsize=4)
def _contents_of(path: Path, files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> Contents:
    """Read the headers of files. stamps: times of change and sizes, so that a changed file is read again."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        refuse_other_kinds(file)
        shapes |= gguf_shapes(file) if is_gguf(file) else weight_shapes(file)
    for prefix in PREFIXES:
        for family in FAMILIES.values():
            if any(key.startswith(prefix + family.checkpoint.first_block) for key in shapes):
                return Contents(path, files, shapes, prefix, ORIGINAL, family.architecture, title_of(files[0]))
        if any(key.startswith(prefix + FIRST_OF_DIFFUSERS) for key in shapes):
            families = (each for each in FAMILIES.values() if prefix + each.checkpoint.only_in_diffusers in shapes)
            known = next(families, None)
            layout, architecture = (DIFFUSERS, known.architecture) if known is not None else (None, None)
            return Contents(path, files, shapes, prefix, layout, architecture, title_of(files[0]))
    return Contents(path, files, shapes, "", None, None, title_of(files[0]))


def title_of(path: Path) -> str:
    """Return a file's name, and the title in the metadata of a safetensors file (modelspec.title)."""
    try:
        with safe_open(path, "numpy") as file:
            noted = file.metadata() or {}
    except (OSError, SafetensorError):  # GGUF
        noted = {}
    return " ".join([path.name, *(noted[key] for key in ("modelspec.title", "modelspec.architecture") if key in noted)])


def checkpoint_files(path: Path) -> tuple[Path, ...]:
    """Return a checkpoint's file, or the files that an index names, which lie beside it. Raises UserError."""
    if not path.name.endswith(".index.json"):
        return (path,)
    try:
        names = sorted(set(orjson.loads(path.read_bytes())["weight_map"].values()))
        files = tuple(path.parent / Path(name).name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not the index of a model in several files; give one, or the file itself") from None
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        raise UserError(
            f"{path}: {missing[0] if missing else 'a file'} is not beside it; download all {len(files)} files"
        )
    return files


def refuse_relatives(path: Path, keys: Mapping[str, tuple[int, ...]], title: str) -> None:
    """Raise UserError for a model that looks like one of ours, but is another: by its keys, its inputs or its name."""
    for mark, name in STRANGERS:
        if any(mark in key for key in keys):
            raise UserError(f"{path}: this is {name}, which this toolkit does not know; it knows {OURS}")
    inputs = keys.get("img_in.weight", keys.get("x_embedder.weight"))
    if inputs is not None and inputs[-1] in FLUX_INPUTS:
        raise UserError(f"{path}: this is {FLUX_INPUTS[inputs[-1]]}, not FLUX.1-schnell or -dev")
    if KONTEXT.search(title):
        raise UserError(f"{path}: this is FLUX.1-Kontext, which changes pictures; this toolkit knows {OURS}")


def refuse_stranger(path: Path, keys: Iterable[str]) -> NoReturn:
    """Raise UserError that says what a file is which holds no transformer of a known kind."""
    names = list(keys)
    for mark, name in STRANGERS:
        if any(mark in key for key in names):
            raise UserError(f"{path}: this is {name}, which this toolkit does not know; it knows {OURS}")
    what = next((what for mark, what in LONE_PARTS if any(mark in key for key in names)), None)
    hint = f"this is {what}" if what else "its keys begin with " + ", ".join(sorted(names)[:3])
    raise UserError(
        f"{path}: holds no transformer (joint_blocks. …, double_blocks. … or transformer_blocks. …); {hint}"
    )
