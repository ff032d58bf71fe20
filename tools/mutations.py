"""Derive damaged files from calibration_store's formats; tools/corruption_campaign.py runs the stages on them."""

import copy
import functools
import io
import json
import os
import re
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import orjson
from msgspec import Meta
from safetensors.numpy import load_file, save_file

from calibration_store.npz import write_npz
from calibration_store.rounding_checkpoint import Position
from calibration_store.schema import CALIBRATION_RUN, TRAINING_RUN, Record

RAW = {"@@NaN": "NaN", "@@1e999": "1e999"}  # placeholders for numbers that JSON cannot express


class Mutation(NamedTuple):
    """A change of a file: its name, and the function that makes it at a path."""

    name: str
    apply: Callable[[Path], None]


# --- JSON ---------------------------------------------------------------------------------------------------


def json_values(kind: Any, value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, changed value) of every way in which `value` can break its type."""
    bounds: list[Meta] = []
    if get_origin(kind) is Annotated:
        kind, *bounds = get_args(kind)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        choices = [choice for choice in get_args(kind) if choice is not type(None)]
        if value is not None:
            yield from json_values(choices[0], value, where)
        else:
            yield f"{where}: a list", [[]]
        return
    if is_typeddict(kind):
        yield from _object_values(kind, value, where)
    elif origin is dict:
        yield f"{where}: a list", []
        for key in list(value)[:1]:
            for name, changed in json_values(get_args(kind)[1], value[key], f"{where}.{key}"):
                yield name, value | {key: changed}
    elif origin in (list, tuple):
        yield f"{where}: an object", {"a": 1}
        inner = get_args(kind)[0]
        if any(bound.min_length for bound in bounds) or origin is tuple:
            yield f"{where}: empty", []
        if value:
            for name, changed in json_values(inner, value[-1], f"{where}[{len(value) - 1}]"):
                yield name, [*value[:-1], changed]
    else:
        yield from _plain_values(kind, bounds, where)


def _object_values(kind: Any, value: dict, where: str) -> Iterator[tuple[str, Any]]:
    yield f"{where}: a number", 7
    for key in sorted(kind.__required_keys__ & value.keys()):
        yield f"{where}.{key}: missing", {name: entry for name, entry in value.items() if name != key}
    for key, inner in get_type_hints(kind, include_extras=True).items():
        if key in value:
            for name, changed in json_values(inner, value[key], f"{where}.{key}"):
                yield name, value | {key: changed}


def _plain_values(kind: Any, bounds: list[Meta], where: str) -> Iterator[tuple[str, Any]]:
    if get_origin(kind) is Literal:
        yield f"{where}: not in its enum", 10**12 if isinstance(get_args(kind)[0], int) else "other"
    elif kind is bool:
        yield f"{where}: 1 for true", 1
    elif kind in (int, float):
        yield f"{where}: a string", "4"
        yield f"{where}: a boolean", True
        yield f"{where}: not finite", "@@NaN" if kind is int else "@@1e999"
        for bound in bounds:
            yield from _beyond(bound, where)
    elif kind is str:
        yield f"{where}: a number", 5
        for bound in bounds:
            if bound.pattern is not None and not re.search(bound.pattern, "../../x"):
                yield f"{where}: leaves its folder", "../../x"
            elif bound.pattern is not None:
                yield f"{where}: steers the terminal", "\x1b]0;x\x07"
            if bound.min_length:
                yield f"{where}: empty", ""


def _beyond(bound: Meta, where: str) -> Iterator[tuple[str, Any]]:
    if bound.ge is not None:
        yield f"{where}: below its range", bound.ge - 1
    if bound.gt is not None:
        yield f"{where}: not above {bound.gt}", bound.gt
    if bound.le is not None:
        yield f"{where}: above its range", bound.le * 2 + 1


def json_text(content: Any) -> bytes:
    """Return JSON, in which placeholders become NaN and infinity."""
    text = json.dumps(content)
    for placeholder, literal in RAW.items():
        text = text.replace(f'"{placeholder}"', literal)
    return text.encode()


def json_mutations(kind: Any, path: Path) -> Iterator[Mutation]:
    """Yield every way in which the JSON file at `path` can break its type."""
    for name, changed in json_values(kind, json.loads(path.read_bytes()), "$"):
        yield Mutation(name, functools.partial(replace, content=json_text(changed)))


def edited(name: str, edit: Callable[[Any], Any]) -> Mutation:
    """Return a change of decoded JSON: `edit` changes it in place, or returns another value."""

    def apply(path: Path) -> None:
        content = copy.deepcopy(json.loads(path.read_bytes()))
        result = edit(content)
        replace(path, json_text(content if result is None else result))

    return Mutation(name, apply)


# --- NPZ ----------------------------------------------------------------------------------------------------


def npz_mutations(record: Record, path: Path, prefix: str = "", kept: tuple[str, ...] = ()) -> Iterator[Mutation]:
    """Yield every way in which the arrays at `path` (of one layer: those with the prefix) can break their record.

    kept: members whose absence means nothing. The absence of a run's identity means nothing either, since older files lack it.
    """
    kept = (*kept, CALIBRATION_RUN, TRAINING_RUN)
    arrays = {key: value for key, value in np.load(path).items() if key.startswith(prefix)}
    own = {key.removeprefix(prefix): value for key, value in arrays.items()}
    for name, member in record.members.items():
        if name not in own:
            continue
        array = own[name]
        if name not in kept:
            yield _with_arrays(f"{prefix}{name}: missing", prefix, {name: None})
        other = np.float64 if "float64" not in member.dtypes else np.complex128
        yield _with_arrays(f"{prefix}{name}: {np.dtype(other)}", prefix, {name: _as(array, other)})
        yield _with_arrays(f"{prefix}{name}: a dimension more", prefix, {name: array[None]})
        if array.ndim:
            yield _with_arrays(f"{prefix}{name}: empty", prefix, {name: array[:0]})
            yield _with_arrays(f"{prefix}{name}: one longer", prefix, {name: np.concatenate([array, array[:1]])})
            yield _with_arrays(f"{prefix}{name}: one value", prefix, {name: array.reshape(-1)[:1]})
        for rule in member.rules:
            bad = rule.broken(array)
            if bad is not None and not rule.holds(bad):
                yield _with_arrays(f"{prefix}{name} {rule.says}", prefix, {name: bad})
    for relation in record.relations:
        given = [own.get(name) for name in relation.members]
        if all(array is not None for array in given):
            broken = relation.broken(*given)
            if not relation.holds(*(broken.get(name, own[name]) for name in relation.members)):
                yield _with_arrays(f"{prefix}{relation.says}", prefix, broken)


def _as(array: np.ndarray, dtype: Any) -> np.ndarray:
    return np.zeros(array.shape, dtype) if array.dtype.kind in "US" else array.astype(dtype)


def _with_arrays(name: str, prefix: str, changes: Mapping[str, np.ndarray | None]) -> Mutation:
    def apply(path: Path) -> None:
        arrays = dict(np.load(path))
        for key, value in changes.items():
            arrays.pop(prefix + key, None)
            if value is not None:
                arrays[prefix + key] = value
        path.unlink()
        write_npz(path, arrays)

    return Mutation(name, apply)


# --- any file -----------------------------------------------------------------------------------------------


def replace(path: Path, content: bytes) -> None:
    """Write over a file that others may share by hard links."""
    path.unlink()
    path.write_bytes(content)


def file_mutations(path: Path, kept_text: bool = False, flip_at: float = 2 / 3) -> Iterator[Mutation]:
    """Yield the damage that any file can take. kept_text: a flipped bit may leave a valid text, so none is flipped."""

    def half(target: Path) -> None:
        replace(target, target.read_bytes()[: max(1, target.stat().st_size // 2)])

    def flipped(target: Path) -> None:
        content = bytearray(target.read_bytes())
        content[int(len(content) * flip_at)] ^= 0x10
        replace(target, bytes(content))

    def folder(target: Path) -> None:
        target.unlink()
        target.mkdir()

    def loop(target: Path) -> None:
        target.unlink()
        target.symlink_to(target.name)

    def dangling(target: Path) -> None:
        target.unlink()
        target.symlink_to("nothing-there")

    def pipe(target: Path) -> None:
        target.unlink()
        os.mkfifo(target)

    def endless(target: Path) -> None:
        target.unlink()
        target.symlink_to("/dev/zero")

    def sparse(target: Path) -> None:
        replace(target, b"")
        os.truncate(target, 10**11)

    yield Mutation("truncated", half)
    yield Mutation("empty", lambda target: replace(target, b""))
    yield Mutation("garbage", lambda target: replace(target, bytes(range(256)) * 8))
    yield Mutation("missing", lambda target: target.unlink())
    yield Mutation("a folder", folder)
    yield Mutation("a link to itself", loop)
    yield Mutation("a dangling link", dangling)
    yield Mutation("a pipe", pipe)
    yield Mutation("a link to /dev/zero", endless)
    yield Mutation("100 GB of nothing", sparse)
    if not kept_text:
        yield Mutation("a flipped bit", flipped)
    if path.suffix == ".npz":
        yield Mutation("pickled", lambda target: replace(target, _pickled()))
        yield Mutation("no member", lambda target: replace(target, _npz_of()))


def _pickled() -> bytes:
    return _npz_of(x=np.array([{"a": 1}], dtype=object))


def _npz_of(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def copied(name: str, other: Path) -> Mutation:
    """Return a change that puts another file's content under this one's name."""
    return Mutation(name, functools.partial(replace, content=other.read_bytes()))


# --- damage that no declaration implies ---------------------------------------------------------------------------


def npz_bombs(known: str) -> Iterator[Mutation]:
    """Yield an array header that takes the parser's memory, and a known member that unpacks to 3.8 GB."""
    yield Mutation("a header of 9,000 minus signs", lambda target: _with_members(target, {known: _deep_header()}))
    yield Mutation("3.8 GB in a known member", lambda target: _with_bomb(target, known))


def npz_oddities() -> Iterator[Mutation]:
    """Yield changes that a reader must accept: a bomb in a member that it does not know, and numbers of another byte order."""

    def swapped(target: Path) -> None:
        arrays: dict[str, Any] = {key: _big_endian(value) for key, value in np.load(target).items()}
        target.unlink()
        np.savez(target, **arrays)

    yield Mutation("3.8 GB in an unknown member", lambda target: _with_bomb(target, "zzz"))
    yield Mutation("big-endian numbers", swapped)


def _big_endian(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder(">")) if array.dtype.kind in "iuf" else array


def _deep_header() -> bytes:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"-" * 9000 + b"1,)}\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def _with_members(path: Path, changes: dict[str, bytes]) -> None:
    """Write an NPZ again, some of its members with other bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= {f"{key}.npy": content for key, content in changes.items()}
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@functools.cache
def _deflated_zeros() -> tuple[bytes, int]:
    """Return a deflate stream and the number of zeros that it unpacks to, below the 4 GiB that a ZIP notes in 32 bits."""
    packer, part, count = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(2**26), 57
    packer.compress(part[:1])
    packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(part) + packer.flush(zlib.Z_FULL_FLUSH)  # ends at a byte, and refers to nothing before it
    return block * count + zlib.compressobj(9, zlib.DEFLATED, -15).flush(), count * len(part)


def _with_bomb(path: Path, key: str) -> None:
    """Put the zeros under a key: write the stream as a stored member, then change method and size in both headers."""
    stream, size = _deflated_zeros()
    _with_members(path, {key: stream})
    content, name = bytearray(path.read_bytes()), f"{key}.npy".encode()
    for signature, method_at, size_at, name_at in ((b"PK\3\4", 8, 22, 30), (b"PK\1\2", 10, 24, 46)):
        start = content.rindex(name)
        while content[start - name_at : start - name_at + 4] != signature:
            start = content.rindex(name, 0, start)
        start -= name_at
        content[start + method_at : start + method_at + 2] = (8).to_bytes(2, "little")
        content[start + size_at : start + size_at + 4] = size.to_bytes(4, "little")
    path.write_bytes(content)


# --- checkpoints and weights --------------------------------------------------------------------------------


def checkpoint_mutations(path: Path) -> Iterator[Mutation]:
    """Yield every way in which the position can break its type or be another job's, and NaN in the state."""

    def position(name: str, changed: Any) -> Mutation:
        return _with_arrays(name, "", {"position": np.frombuffer(json_text(changed), np.uint8)})

    def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Mutation:
        key = min(key for key in arrays if key.startswith("training."))
        return _with_arrays(name, "", {key: change(arrays[key])})

    arrays = dict(np.load(path))
    own = orjson.loads(arrays["position"].tobytes())
    for name, changed in json_values(Position, own, "position"):
        yield position(name, changed)
    for changes in (
        {"job": "mm1"}, {"plan": "0" * 64}, {"stage": 5}, {"iteration": 10**6}, {"losses": [1]}, {"losses": None},
    ):  # fmt: skip
        yield position(f"position {changes}", own | changes)
    yield array("NaN", lambda a: a * np.float32("nan"))
    yield array("another shape", lambda a: a.reshape(-1)[:1])


def weight_mutations() -> Iterator[Mutation]:
    """Yield NaN, infinity, a weight less, a weight more, and a weight of another shape."""

    def change(name: str, edit: Any) -> Mutation:
        def apply(path: Path) -> None:
            weights = load_file(path)
            key = sorted(weights)[len(weights) // 2]
            edit(weights, key)
            path.unlink()
            save_file(weights, path)

        return Mutation(name, apply)

    def filled(value: float) -> Any:
        def edit(weights: dict, key: str) -> None:
            weights[key] = weights[key].copy()
            weights[key].reshape(-1)[0] = value

        return edit

    yield change("NaN", filled(np.nan))
    yield change("infinity", filled(np.inf))
    yield change("a weight less", lambda weights, key: weights.pop(key))
    yield change("a weight more", lambda weights, key: weights.update(other=weights[key]))
    yield change("another shape", lambda weights, key: weights.update({key: weights[key][:1]}))
