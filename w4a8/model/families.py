"""Read the declarations of models: one TOML file for each kind of transformer, with every model that has its shapes.

The files of this package lie in w4a8/model/declared; those of a folder that W4A8_MODELS names are read after them. A
file may start from another (`base`): its tables are merged entry by entry, and other entries replaced.
docs/adding-a-model.md adds one.
"""

import functools
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import mlx.core as mx
import msgspec

from calibration_store.errors import UserError
from w4a8.model.diffusionkit import (
    T5_MAX_LENGTH,
    DiffusionPipeline,
    FluxPipeline,
    FluxSampler,
    LatentFormat,
    ModelSamplingDiscreteFlow,
    PositionalEncoding,
)
from w4a8.model.dual_attention import TransformerSizes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DECLARED = Path(__file__).resolve().parent / "declared"
OWN_MODELS = "W4A8_MODELS"  # the environment variable that names a folder with more declarations
SAMPLERS = {"discrete flow": ModelSamplingDiscreteFlow, "flux": FluxSampler}
PIPELINES = {"clip and t5": DiffusionPipeline, "t5": FluxPipeline}  # whose encode_text is used


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """A table of a declaration, without other entries than the declared ones."""


class HubEntry(_Table, frozen=True, kw_only=True):
    """A model of the hub that has the shapes of its file: where its weights lie, and how it is sampled by default."""

    id: str  # a value of --model
    title: str  # for people
    file: str  # the transformer's, in the repository
    original: str  # the original repository, whose licence counts
    licence: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=3)]  # id, name, link
    latent_size: tuple[int, int]
    t5_tokens: int  # of a prompt
    shift: float  # of the sampler
    num_steps: int
    cfg_weight: float
    guidance: float | None = None  # that the transformer embeds
    repository: str = ""  # that holds the files; the id where it is not said
    vae_file: str = ""  # the transformer's file where it is not said
    other_names: tuple[str, ...] = ()  # that the file has elsewhere
    told_by_keys: tuple[str, ...] = ()  # parts of keys that only this model of the file has
    told_by_title: str = ""  # a word in a checkpoint's name or title that tells it from the first model of the file

    @property
    def vae(self) -> tuple[str, str]:
        """Return the repository and the file of the VAE."""
        return self.repository or self.id, self.vae_file or self.file


class Latents(_Table, frozen=True, kw_only=True):
    """The VAE's latents: DiffusionKit's LatentFormat, image pixels per latent, and the largest side, if any."""

    scale_factor: float
    shift_factor: float
    downscale: int = 8
    largest: int | None = None  # None: that of the table of positions


class OriginalFile(_Table, frozen=True, kw_only=True):
    """How the original checkpoint is laid out."""

    first_block: str  # how the keys of its first block begin
    only_in_diffusers: str  # a key of diffusers' layout that no other architecture has
    prefix: str = ""  # of the transformer's keys
    vae_prefix: str = ""
    vae_inside: bool = False
    vae: tuple[str, str] | None = None  # repository and file of a VAE for checkpoints without one
    ignored: tuple[str, ...] = ()  # how keys begin that not every model has


class JoinedPart(_Table, frozen=True, kw_only=True):
    """The place of a parameter in an original array of several, in the transformer's widths. name: a pattern."""

    name: str
    row: int = 0
    column: int = 0


class Names(_Table, frozen=True, kw_only=True):
    """The original names and diffusers', as replacements in DiffusionKit's, and what is joined or swapped there."""

    original: tuple[tuple[str, str], ...]
    diffusers: tuple[tuple[str, str], ...]
    joined: tuple[JoinedPart, ...]
    swapped: tuple[str, ...]


class Family(_Table, frozen=True, kw_only=True):
    """One declaration: a kind of transformer and its models."""

    name: str  # of the file
    architecture: Literal["sd3", "flux"]  # what manifest.json and GGUF name
    half: Literal["float16", "bfloat16"]  # the 16-bit precision that it is run in
    sampler: Literal["discrete flow", "flux"]
    text: Literal["clip and t5", "t5"]  # what token-level conditioning comes from
    clip: tuple[str, ...]  # CLIP text encoders
    guided: bool  # whether a pass may have rows of a negative prompt
    transformer: dict[str, bool | int | float | list[int]]
    latents: Latents
    checkpoint: OriginalFile
    names: Names
    models: Annotated[tuple[HubEntry, ...], msgspec.Meta(min_length=1)]

    @functools.cached_property
    def config(self) -> TransformerSizes:
        """Return the transformer's sizes as DiffusionKit takes them."""
        sizes: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in self.transformer.items()}
        if "rope_axes_dim" in sizes:
            sizes["pos_embed_type"] = PositionalEncoding.PreSDPARope
        half = getattr(mx, self.half)
        return TransformerSizes(**sizes, low_memory_mode=False, dtype=half, float16_dtype=half)

    @property
    def needs_t5(self) -> bool:
        """Return whether prompts cannot be read without T5."""
        return self.text == "t5"

    @property
    def pipeline(self) -> type[DiffusionPipeline]:
        """Return DiffusionKit's pipeline whose encode_text is used."""
        return PIPELINES[self.text]

    def new_sampler(self, shift: float) -> ModelSamplingDiscreteFlow | FluxSampler:
        """Return DiffusionKit's sampler."""
        return SAMPLERS[self.sampler](shift=shift)

    def latent_format(self) -> LatentFormat:
        """Return DiffusionKit's format of the latents."""
        found = LatentFormat()
        found.scale_factor, found.shift_factor = self.latents.scale_factor, self.latents.shift_factor
        return found


def read_declarations(folder: Path, known: Mapping[str, Family]) -> dict[str, Family]:
    """Return the declarations of a folder by their names, in the order of base and file name. Raises UserError.

    known: those that are read already; a file may start from one of them.
    """
    tables: dict[str, dict[str, Any]] = {name: msgspec.to_builtins(family) for name, family in known.items()}
    found: dict[str, Family] = {}
    waiting = {path.stem: (path, _parsed(path)) for path in sorted(folder.glob("*.toml"))}
    while waiting:
        ready = [
            name for name, (_, table) in waiting.items() if str(table.get("base", name)) not in waiting.keys() - {name}
        ]
        if not ready:
            raise UserError(f"{folder}: {', '.join(waiting)} start from each other")
        for name in ready:
            path, table = waiting.pop(name)
            base = table.pop("base", None)
            if base is not None and (not isinstance(base, str) or base not in tables):
                raise UserError(f"{path}: base {base!r} is none of {', '.join(tables)}")
            if name in known:
                raise UserError(f"{path}: {name} is declared already; give the file another name")
            try:
                tables[name] = _merged(tables[base] | {"models": None}, table) if base is not None else table
                found[name] = family = msgspec.convert(tables[name] | {"name": name}, Family)
                family.config  # an entry that DiffusionKit does not know raises TypeError
                [re.compile(joined.name) for joined in family.names.joined]
            except (msgspec.ValidationError, TypeError, ValueError, re.error) as error:
                raise UserError(f"{path}: {' '.join(str(error).split())}") from None
            ids = [entry.id for each in (*known.values(), *found.values()) for entry in each.models]
            twice = next((one for one in ids if ids.count(one) > 1), None)
            if twice is not None:
                raise UserError(f"{path}: {twice} is declared twice")
    return found


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def _merged(base: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a base's entries with those of a table: tables within are merged, all else is replaced."""
    found = dict(base)
    for key, value in table.items():
        if isinstance(value, dict) != isinstance(found.get(key, value), dict):
            raise ValueError(f"{key} is {'no' if isinstance(value, dict) else 'a'} table in the base")
        found[key] = _merged(found[key], value) if isinstance(value, dict) and key in found else value
    return found


def _every_family() -> dict[str, Family]:
    found = read_declarations(DECLARED, {})
    found = dict(sorted(found.items(), key=lambda pair: pair[1].architecture, reverse=True))  # SD3's first
    own = os.environ.get(OWN_MODELS)
    if own and not os.path.isdir(own):
        raise UserError(f"{OWN_MODELS}={own}: no such folder")
    return found | (read_declarations(Path(own), found) if own else {})


FAMILIES = _every_family()
MODELS = {entry.id: entry for family in FAMILIES.values() for entry in family.models}
HUB_MODELS = tuple(MODELS)
_OF_MODEL = {entry.id: family for family in FAMILIES.values() for entry in family.models}
for _entry in MODELS.values():  # DiffusionKit's FLUX pipeline looks the length of a prompt up by the model's name
    T5_MAX_LENGTH.setdefault(_entry.id, _entry.t5_tokens)
FOLDER_FAMILY = FAMILIES["sd3-medium"]  # of a model folder, which has SD3's layout


def family_of(hub_id: str | None) -> Family:
    """Return the declaration of a hub id, or for None that of a model folder without one, which has SD3's layout."""
    return FOLDER_FAMILY if hub_id is None else _OF_MODEL[hub_id]


def family_of_architecture(architecture: str) -> Family:
    """Return the first declaration of an architecture, for what all of them share: samplers, names."""
    return next(family for family in FAMILIES.values() if family.architecture == architecture)
