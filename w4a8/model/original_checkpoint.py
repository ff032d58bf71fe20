"""Read the original checkpoints of hub models lazily, and locate DiffusionKit's parameters in them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from calibration_store.errors import UserError
from w4a8.model.checkpoint_contents import DIFFUSERS, Contents, read_contents, refuse_relatives, refuse_stranger
from w4a8.model.diffusers_layout import original_arrays
from w4a8.model.diffusionkit import MMDiT
from w4a8.model.families import Family
from w4a8.model.gguf_weights import is_gguf
from w4a8.model.weight_files import load_arrays


@dataclass(frozen=True, order=True)
class CheckpointSlice:
    """The location of a DiffusionKit parameter in an original checkpoint: a tensor, and its first row and column."""

    key: str  # without the family's prefix
    row: int = 0
    column: int = 0


def checkpoint_slice(family: Family, name: str, hidden: int) -> CheckpointSlice:
    """Locate a parameter by its name in DiffusionKit. hidden: the transformer's width.

    The declaration says which parameters are parts of one tensor: q, k and v, and in FLUX's unified blocks fc1, too.
    """
    key = name
    for ours, theirs in family.names.original:
        key = key.replace(ours, theirs)
    place = next((each for each in family.names.joined if re.search(each.name, name)), None)
    return CheckpointSlice(key) if place is None else CheckpointSlice(key, place.row * hidden, place.column * hidden)


def read_original_checkpoint(
    path: Path, family: Family, model: MMDiT, headers_only: bool = False
) -> dict[str, mx.array]:
    """Open a checkpoint's transformer under the names of DiffusionKit's `model`; each array is read when it is used.

    Keys may have one of PREFIXES, and be the original ones or those of diffusers; keys of other parts of a model are
    left out. An index of several files reads all of them. A GGUF file is unpacked at once; headers_only: its arrays
    hold zeros. Raises UserError for a file of another model, or whose weights are packed otherwise.
    """
    contents, config = read_contents(path), model.config
    if contents.architecture is None:
        refuse_stranger(path, contents.shapes)
    if contents.architecture != family.architecture:
        raise UserError(f"{path}: a transformer of {contents.architecture.upper()}; --model names another family")
    refuse_relatives(path, contents.transformer, contents.title)
    original = transformer_arrays(contents, headers_only)
    if contents.layout == DIFFUSERS:
        original = original_arrays(original, family, originals_of(family, model))
    table = original.get("pos_embed")
    if table is not None and table.shape[1] != config.max_latent_resolution**2:
        side = round(table.shape[1] ** 0.5)
        raise UserError(
            f"{path}: its table of positions is {side} x {side}, and the model's {config.max_latent_resolution} x {config.max_latent_resolution}; --model names another model"
        )
    refuse_other_sizes(path, original, family, model)
    return {
        name: taken(original[place.key], place, parameter.shape)
        for name, parameter in dict(tree_flatten(model.parameters())).items()
        for place in [checkpoint_slice(family, name, config.hidden_size)]
    }


def taken(array: mx.array, place: CheckpointSlice, shape: tuple[int, ...]) -> mx.array:
    """Return a parameter of this shape from its place in an original array, lazily.

    A convolution's kernel is (out, in, height, width) there, and (out, height, width, in) in MLX.
    """
    if array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    array = array[place.row : place.row + shape[0]]
    if array.ndim == len(shape) == 2:
        array = array[:, place.column : place.column + shape[1]]
    return array.reshape(shape)


def transformer_arrays(contents: Contents, headers_only: bool) -> dict[str, mx.array]:
    """Return a checkpoint's transformer by its keys without a prefix. headers_only: zeros for the arrays of GGUF."""
    found: dict[str, mx.array] = {}
    for file in contents.files:
        if is_gguf(file) and headers_only:
            found |= {key: mx.zeros(shape, mx.float16) for key, shape in contents.shapes.items()}
        else:
            found |= load_arrays(file)
    return {key: found[contents.prefix + key] for key in contents.transformer if contents.prefix + key in found}


def originals_of(family: Family, model: MMDiT) -> dict[str, list[str]]:
    """Return {original key: the model's names of its parts, in their order}."""
    width, places = model.config.hidden_size, []
    for name in dict(tree_flatten(model.parameters())):
        place = checkpoint_slice(family, name, width)
        places.append((place.key, place.row, place.column, name))
    found: dict[str, list[str]] = {}
    for key, _, _, name in sorted(places):
        found.setdefault(key, []).append(name)
    return found


def refuse_other_sizes(path: Path, original: Mapping[str, mx.array], family: Family, model: MMDiT) -> None:
    """Raise UserError where a checkpoint has other arrays than the model, or of other sizes, before any is read."""
    width = model.config.hidden_size
    needed = {checkpoint_slice(family, name, width).key for name in dict(tree_flatten(model.parameters()))}
    given = {key for key in original if key in needed or not key.startswith(family.checkpoint.ignored)}
    lacking, unknown = sorted(needed - given), sorted(given - needed)
    if lacking or unknown:
        if not unknown:
            raise UserError(f"{path}: not complete, it lacks {some(lacking)}; copy or download it again")
        faults = [f"{word} {some(keys)}" for word, keys in (("lacks", lacking), ("also has", unknown)) if keys]
        raise UserError(
            f"{path}: not the transformer that --model names ({', '.join(faults)}); name the model that it is of, "
            "or download it again"
        )
    for key, extent in extents_of(family, model).items():
        given_shape = original[key].shape
        if original[key].size != math.prod(extent):
            shapes = [" x ".join(map(str, shape)) for shape in (given_shape, extent)]
            raise UserError(
                f"{path}: {key} is {shapes[0]}, and that of the model {shapes[1]}; --model names another model"
            )


def extents_of(family: Family, model: MMDiT) -> dict[str, tuple[int, ...]]:
    """Return {original key: its rows, and columns if it has any} that all parts of an original array need."""
    found: dict[str, tuple[int, ...]] = {}
    for name, parameter in dict(tree_flatten(model.parameters())).items():
        place, (rows, *rest) = checkpoint_slice(family, name, model.config.hidden_size), parameter.shape
        extent = (place.row + rows, *((place.column + math.prod(rest),) if rest else ()))
        found[place.key] = tuple(map(max, found.get(place.key, extent), extent))
    return found


def some(keys: Sequence[str]) -> str:
    """Return the number of keys and the first of them, for messages."""
    return f"{len(keys)} arrays, {keys[0]} …" if len(keys) > 1 else keys[0]
