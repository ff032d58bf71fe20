"""Pieces of file formats: JSON as msgspec types, NPZ as members with dtype, shape and rules, checked by every reader.

A format is declared once, from the pieces of this module, beside the code that reads and writes it. A rule can also
break an array: tools/corruption_campaign.py derives its damaged files from the same declarations.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec
import numpy as np
import orjson
from msgspec import Meta

from calibration_store.errors import OptionError, StoreError
from calibration_store.files import LARGEST, read_bytes
from calibration_store.limits import (
    LEAST_SHIFT,
    MOST,
    MOST_GUIDANCE,
    MOST_IMAGES,
    MOST_ITERATIONS,
    MOST_RATE,
    MOST_SEED,
    MOST_SHIFT,
    MOST_SIDE,
    MOST_STEPS,
    MOST_THRESHOLD,
)

# --- JSON ---------------------------------------------------------------------------------------------------
# msgspec decodes strictly: no booleans for numbers, no NaN or infinity, unknown keys are skipped.


Count = Annotated[int, Meta(ge=1, le=MOST)]
Index = Annotated[int, Meta(ge=0, le=MOST)]
Seed = Annotated[int, Meta(ge=0)]  # msgspec knows no bound above 63 bits: `seed_fault` checks it
Images = Annotated[int, Meta(ge=1, le=MOST_IMAGES)]
Steps = Annotated[int, Meta(ge=1, le=MOST_STEPS)]
Iterations = Annotated[int, Meta(ge=0, le=MOST_ITERATIONS)]
Side = Annotated[int, Meta(ge=1, le=MOST_SIDE)]
Shift = Annotated[float, Meta(ge=LEAST_SHIFT, le=MOST_SHIFT)]  # of a sampler's schedule
Guidance = Annotated[float, Meta(ge=0, le=MOST_GUIDANCE)]
Rate = Annotated[float, Meta(ge=0, le=MOST_RATE)]
NotNegative = Annotated[float, Meta(ge=0, le=MOST_THRESHOLD)]
Positive = Annotated[float, Meta(gt=0, le=MOST_THRESHOLD)]
Share = Annotated[float, Meta(ge=0, le=1)]
Bounded = Annotated[float, Meta(ge=-MOST_THRESHOLD, le=MOST_THRESHOLD)]
Name = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]  # printed as it is
Prompt = Annotated[str, Meta(min_length=1)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
StepKey = Annotated[str, Meta(pattern="^[0-9]{1,9}$")]
RelativePath = Annotated[str, Meta(pattern=r"^(?!/)(?!(.*/)?\.\.(/|$))[^\x00]+$")]  # never leads out of its folder


class _Head(TypedDict, total=False):
    format: str


@dataclass(frozen=True)
class JsonFormat:
    """A kind of JSON file: its `format` string (None: it has none), its type, and checks that a type cannot express."""

    name: str | None
    type: Any
    made_by: str
    fault: Callable[[Any], str | None] = lambda content: None  # decoded content -> what is wrong with it, or None
    limit: int = LARGEST  # bytes that a file may have
    flag: str = " with --force"  # the script needs this flag to write over a damaged file

    def read(self, path: Path, remedy: str | None = None) -> Any:
        """Return the checked content. Raises StoreError: one line with the file, the place in it, and what to run."""
        remedy = remedy or f"run {self.made_by}{self.flag} to make it anew"
        content = read_bytes(path, f"run {self.made_by} first" if self.made_by else remedy, limit=self.limit)
        try:
            if self.name is not None:
                found = _decoded(content, _Head).get("format")
                if found != self.name:
                    raise StoreError(
                        f"{path}: format {found!r} is not {self.name!r}; run {self.made_by} to make it anew"
                    )
            return self._checked(content)
        except ValueError as error:  # msgspec raises it, and `_checked` does for a fault
            raise StoreError(f"{path}: {error}; {remedy}") from None
        except (MemoryError, RecursionError):
            raise StoreError(f"{path}: not valid JSON (too deep, or too large for the memory); {remedy}") from None

    def encode(self, content: Mapping[str, Any]) -> bytes:
        """Return the bytes of a file. Raises OptionError for content that `read` would refuse."""
        try:
            encoded = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n"
            self._checked(encoded)
        except (TypeError, ValueError) as error:
            raise OptionError(f"this cannot be noted for the stages after it: {error}") from None
        return encoded

    def _checked(self, content: bytes) -> Any:
        """Decode content. Raises ValueError that says what is wrong with it."""
        decoded = _decoded(content, self.type)
        fault = self.fault(decoded)
        if fault:
            raise ValueError(fault)
        return decoded


def _decoded(content: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid JSON ({error})") from None


def seed_fault(seed: int) -> str | None:
    """Return the fault of a seed above 64 bits, or None."""
    return None if seed <= MOST_SEED else f"seed {seed} is above 2^64 - 1"


def distinct(values: list, what: str) -> str | None:
    """Return the fault of a list that names a value twice, or None. what: the word for a value in the message."""
    if len(set(values)) == len(values):
        return None
    repeated = next(value for position, value in enumerate(values) if value in values[:position])
    return f"{what} {repeated!r} twice"


# --- NPZ ----------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """A condition on an array. `broken` returns a copy that violates it, or None where no copy can."""

    says: str  # the fault in words, which follow the member's name
    holds: Callable[[np.ndarray], bool]
    broken: Callable[[np.ndarray], np.ndarray | None]


def _with(value: Any) -> Callable[[np.ndarray], np.ndarray | None]:
    def planted(array: np.ndarray) -> np.ndarray | None:
        if array.dtype.kind == "u" and value < 0:
            return None
        changed = np.array(array)
        changed.reshape(-1)[changed.size // 2] = value
        return changed

    return planted


FINITE = Rule("holds NaN or infinity", lambda a: bool(np.isfinite(a).all()), _with(np.nan))
POSITIVE = Rule("is not above 0 everywhere", lambda a: bool((a > 0).all()), _with(0))
NOT_NEGATIVE = Rule("holds negative values", lambda a: a.size == 0 or bool(a.min() >= 0), _with(-1))
ASCENDING = Rule(
    "has bins of zero width",
    lambda a: bool((a[1:] > a[:-1]).all()),
    lambda a: np.full_like(a, a[0]) if a.size > 1 else None,
)


def below(limit: int) -> Rule:
    """Return the rule for the codes of a grid with `limit` levels."""
    return Rule(f"holds codes above {limit - 1}", lambda a: a.size == 0 or int(a.max()) < limit, _with(limit))


class Relation(NamedTuple):
    """A condition on several members. `broken` returns changed copies of some of them, which violate it."""

    says: str
    members: tuple[str, ...]
    holds: Callable[..., bool]  # takes the members in that order, as `broken` does
    broken: Callable[..., dict[str, np.ndarray]]


FLOATS = ("float16", "float32", "float64")
INTEGERS = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
TEXT_DTYPES = tuple(f"str{32 * length}" for length in range(1, 129))


class Member(NamedTuple):
    """The declaration of an array: dtypes that are read, shape, rules.

    The shape has numbers, names (the same name stands for the same length), and pairs: ("bins", 1) is one more than
    "bins".
    """

    dtypes: tuple[str, ...]
    shape: tuple[int | str | tuple[str, int], ...]
    rules: tuple[Rule, ...] = ()
    optional: bool = False


CALIBRATION_RUN = "calibration_run"  # member of every NPZ that a later stage reads: the identity of the calibration run
TRAINING_RUN = "training_run"  # member of the files of stage 3W: the digest of the plan
OF_RUN = Member(TEXT_DTYPES, (), optional=True)  # files of 0.8.0 have none; their metadata are believed


def of_run(run: str | None, name: str = CALIBRATION_RUN) -> dict[str, np.ndarray]:
    """Return {name: run}, the member that says which run a file is of; {} where no run is known."""
    return {} if run is None else {name: np.array(run)}


def run_fault(arrays: Mapping[str, np.ndarray], run: str | None, name: str = CALIBRATION_RUN) -> str | None:
    """Return the fault of a file whose member `name` is of another run, or None."""
    if name not in arrays or run is None:
        return None
    own = arrays[name].dtype.name in TEXT_DTYPES and arrays[name].shape == () and arrays[name].item() == run
    return None if own else f"of another {name.replace('_', ' ')}"


@dataclass(frozen=True)
class Record:
    """The arrays of a file, or of one layer in it."""

    members: Mapping[str, Member]
    relations: tuple[Relation, ...] = ()

    def names(self, key: str) -> bool:
        """Return whether a key is declared here."""
        return key in self.members

    def fault(self, arrays: Mapping[str, np.ndarray], **sizes: int) -> str | None:
        """Return what is wrong with the arrays, or None. sizes: known lengths, by their names in the shapes."""
        for name, member in self.members.items():
            array = arrays.get(name)
            if array is None:
                if not member.optional:
                    return f"no {name}"
                continue
            if _dtype_name(array.dtype) not in member.dtypes:
                return f"{name} is {array.dtype}, not {' or '.join(member.dtypes)}"
            fault = _shape_fault(name, array.shape, member.shape, sizes)
            if fault:
                return fault
            for rule in member.rules:
                if not rule.holds(array):
                    return f"{name} {rule.says}"
        for relation in self.relations:
            given = [arrays.get(name) for name in relation.members]
            if all(array is not None for array in given) and not relation.holds(*given):
                return relation.says
        return None


@functools.cache
def _dtype_name(dtype: np.dtype) -> str:
    """Return `dtype.name`, which NumPy puts together anew at every call."""
    return dtype.name


def _shape_fault(name: str, found: tuple[int, ...], wanted: tuple, sizes: dict[str, int]) -> str | None:
    """Return the fault of a shape, or None. Lengths that the shape names for the first time are added to `sizes`."""
    if len(found) != len(wanted):
        return f"{name} has shape {found}, not of {len(wanted)} dimensions"
    for length, side in zip(found, wanted, strict=True):
        base, more = (side, 0) if isinstance(side, str) else side if isinstance(side, tuple) else (None, 0)
        if base is not None and base not in sizes:
            if length <= more:
                return f"{name} is empty"
            sizes[base] = length - more
        expected = side if isinstance(side, int) else sizes[side] if isinstance(side, str) else sizes[side[0]] + side[1]
        if length != expected:
            return f"{name} has shape {found}, expected {_sides(wanted, sizes)}"
    return None


def _sides(wanted: tuple, sizes: Mapping[str, int]) -> str:
    sides = [s if isinstance(s, int) else sizes.get(s, s) if isinstance(s, str) else sizes[s[0]] + s[1] for s in wanted]
    return f"({', '.join(map(str, sides))})"
