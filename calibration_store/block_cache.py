"""The block cache (2W): what every block saw and gave in one pass."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
from msgspec import Meta

from calibration_store.choices import Boundaries
from calibration_store.errors import StoreError
from calibration_store.files import write_json
from calibration_store.layout import BlockCachePaths, CalibrationPaths
from calibration_store.manifest import read_manifest, same_run
from calibration_store.names import MULTIMODAL, UNIFIED, BlockName, block_kind
from calibration_store.npz import map_npz, write_npz
from calibration_store.schema import (
    CALIBRATION_RUN,
    FINITE,
    INTEGERS,
    OF_RUN,
    Count,
    Digest,
    Guidance,
    Index,
    JsonFormat,
    Member,
    Name,
    Record,
    RelativePath,
    Side,
    Steps,
    distinct,
    of_run,
    run_fault,
)

CACHE_FORMAT = "adaround_cache_v2"
CACHE_REMEDY = "run cache_adaround_data.py with --resume to make it anew"
CACHE_SCRIPT = "cache_adaround_data.py"
Key = Annotated[str, Meta(pattern=r"^(mm|uni)[0-9]{1,4}__(arg|out)[01]$")]
Shape = tuple[Annotated[int, Meta(ge=1, le=2)], Side, Literal[1], Side]  # rows, tokens, 1, hidden


ALL, ENDS = "all", "ends"  # every boundary between blocks; only those of the whole stack, and what the model gives
PATCH = 4  # elements of a latent that make a token
VELOCITY = "velocity"


class BlockShapes(TypedDict):
    input_keys: list[Key]
    input_shapes: list[Shape]
    output_keys: list[Key]
    output_shapes: list[Shape]


class SampleEntry(TypedDict):
    image_id: Index
    step_index: Index
    file: RelativePath


class _CacheMetadata(TypedDict):
    format: Literal["adaround_cache_v2"]
    block_names: Annotated[list[BlockName], Meta(min_length=1)]
    block_shapes: dict[BlockName, BlockShapes]
    samples: Annotated[list[SampleEntry], Meta(min_length=1)]
    selected_image_ids: list[Index]
    key_timesteps: list[Index]
    stride: Steps
    cfg_weight: Guidance
    num_steps: Steps
    dtype: Literal["float16"]


class CacheMetadata(_CacheMetadata, total=False):
    calibration_run: Digest
    w4a8_version: Name  # of the toolkit that began the cache; absent before 0.9.0
    num_images: Count
    blocks: str | None
    model_version: Name
    weights_fingerprint: Digest
    boundaries: Boundaries  # absent: all
    velocity_shape: tuple[
        Annotated[int, Meta(ge=1, le=2)], Side, Side, Annotated[int, Meta(ge=1, le=256)]
    ]  # R, h, w, channels


def cache_fault(metadata: CacheMetadata) -> str | None:
    """What the entries of a cache's metadata say of each other that cannot be."""
    names, shapes = metadata["block_names"], metadata["block_shapes"]
    fault = distinct(names, "block_names: block") or distinct(metadata["selected_image_ids"], "image")
    fault = fault or distinct(metadata["key_timesteps"], "key_timesteps: step")
    if fault or set(names) != set(shapes):
        return fault or "block_shapes are not of block_names"
    for name, block in shapes.items():
        for side in ("input", "output"):
            if not 1 <= len(block[f"{side}_keys"]) == len(block[f"{side}_shapes"]) <= 2:
                return f"block_shapes: {name}: {side}_keys and {side}_shapes do not belong together"
    wrong = next((name for name in names if not _keys_fit(name, shapes[name])), None)
    if wrong is not None:
        return f"block_shapes: {wrong} has the keys {shapes[wrong]['input_keys']} and {shapes[wrong]['output_keys']}"
    of_key = list(_shapes_of_keys(metadata).items())
    rows = 2 if metadata["cfg_weight"] > 0 else 1
    for key, found in of_key:
        if len(found) > 1 or {shape[0] for shape in found} != {rows} or {s[3] for s in found} != {of_key[0][1][0][3]}:
            return f"block_shapes: {key} has shapes {found}"
    if holds_ends(metadata):
        if "velocity_shape" not in metadata or metadata["velocity_shape"][0] != rows:
            return f"velocity_shape: {metadata.get('velocity_shape')}, with {rows} rows in block_shapes"
        _, height, width, channels = metadata["velocity_shape"]
        tokens = [shape[1] for shape in shapes[names[0]]["input_shapes"]]
        if channels != 16 or height * width not in [PATCH * count for count in tokens]:
            return f"velocity_shape: {metadata['velocity_shape']}, with {' and '.join(map(str, tokens))} tokens in block_shapes"
        if block_kind(names[0])[1] or metadata.get("blocks") is not None:
            return "boundaries 'ends' of a part of the blocks"
    pairs = [(sample["image_id"], sample["step_index"]) for sample in metadata["samples"]]
    expected = [(image, step) for image in metadata["selected_image_ids"] for step in metadata["key_timesteps"]]
    if pairs != expected or max(metadata["key_timesteps"]) >= metadata["num_steps"]:
        return "samples are not those of selected_image_ids and key_timesteps"
    for sample in metadata["samples"]:
        if sample["file"] != f"samples/{sample['image_id']:04d}_{sample['step_index']:03d}.npz":
            return f"samples: file {sample['file']!r} is not of image {sample['image_id']}, step {sample['step_index']}"
    return None


def _keys_fit(name: str, block: BlockShapes) -> bool:
    """Whether a block's keys are its own: a block's input is its predecessor's output, the first one's its arguments."""
    kind, number = block_kind(name)
    before, source = (f"{kind}{number - 1}", "out") if number else (name, "arg")
    sides = "01" if kind == MULTIMODAL else "0"
    inputs, outputs = (
        [f"{block_name}__{what}{side}" for side in sides] for block_name, what in ((before, source), (name, "out"))
    )
    return block["input_keys"] == inputs and block["output_keys"] in (outputs, outputs[:1])


def _shapes_of_keys(metadata: Mapping[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    """Every stored boundary's shapes, as the blocks on both sides of it say: one, if they agree."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for block in metadata["block_shapes"].values():
        for side in ("input", "output"):
            for key, shape in zip(block[f"{side}_keys"], block[f"{side}_shapes"], strict=True):
                if tuple(shape) not in shapes.setdefault(key, []):
                    shapes[key].append(tuple(shape))
    return shapes


CACHE_METADATA = JsonFormat(CACHE_FORMAT, CacheMetadata, CACHE_SCRIPT, cache_fault)


def cache_record(shapes: Mapping[str, Sequence[int]], dtype: str = "float16") -> Record:
    """Return the arrays of a sample of the block cache, from the shapes of its boundaries and of modulation_input."""
    members = {key: Member((dtype,), tuple(shape), (FINITE,)) for key, shape in shapes.items()}
    where = {"image_id": Member(INTEGERS, ()), "step_index": Member(INTEGERS, ()), CALIBRATION_RUN: OF_RUN}
    return Record(members | where)


def holds_ends(metadata: Mapping[str, Any]) -> bool:
    """Whether a cache (or its plan) holds the ends of the stack of blocks alone."""
    return metadata.get("boundaries", ALL) == ENDS


def boundary_shapes(metadata: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every boundary between blocks and of modulation_input by its key, stored or not."""
    shapes = {key: found[0] for key, found in _shapes_of_keys(metadata).items()}
    rows, _, _, hidden = next(iter(shapes.values()))
    return shapes | {"modulation_input": (rows, 1, 1, hidden)}


def stored_shapes(metadata: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every array of a cache's sample files, by its key."""
    shapes = boundary_shapes(metadata)
    if not holds_ends(metadata):
        return shapes
    first = block_keys(metadata, metadata["block_names"][0])[0]
    return ends_of(shapes | {VELOCITY: tuple(metadata["velocity_shape"])}, first)


def ends_of(arrays: Mapping[str, Any], first: Sequence[str]) -> dict[str, Any]:
    """What `--boundaries ends` keeps; first: the keys of the first block's inputs."""
    return {key: arrays[key] for key in (*first, "modulation_input", VELOCITY)}


def check_cached_sample(
    path: Path, image_id: int, step_index: int, shapes: Mapping[str, Sequence[int]], checked: bool, run: str | None,
    remedy: str = CACHE_REMEDY, dtype: str = "float16",
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return the arrays of a sample of the cache, mapped. checked: verify checksums and that every value is finite.

    run: the calibration run of the cache, as its metadata says; None: not looked at. Raises StoreError when the file is missing, damaged, or of
    another run, image, step or shape.
    """
    arrays = map_npz(path, [*shapes, "image_id", "step_index"], remedy, checked, [] if run is None else [CALIBRATION_RUN])
    record = cache_record(shapes, dtype)
    if not checked:  # finiteness would read the data
        record = Record({key: member._replace(rules=()) for key, member in record.members.items()})
    fault = record.fault(arrays)
    if not fault and (arrays["image_id"], arrays["step_index"]) != (image_id, step_index):
        fault = f"image {arrays['image_id']}, step {arrays['step_index']}"
    fault = fault or run_fault(arrays, run)
    if fault:
        raise StoreError(f"{path}: not the cached sample of image {image_id}, step {step_index} ({fault}); {remedy}")
    return arrays


def boundary_keys(names: Sequence[str]) -> dict[str, tuple[list[str], list[str]]]:
    """The NPZ keys of each block's (inputs, outputs): a block's input is its predecessor's output, stored once.

    names: all blocks of the model in order. mm0 and uni0 take what no block gives: their arguments are stored.
    """
    unified = any(block_kind(name)[0] == UNIFIED for name in names)
    last_multimodal = [name for name in names if block_kind(name)[0] == MULTIMODAL][-1]
    keys, previous = {}, None
    for name in names:
        kind, number = block_kind(name)
        if kind == MULTIMODAL:
            inputs = previous or [f"{name}__arg0", f"{name}__arg1"]
            gives_text = unified or name != last_multimodal
            outputs = [f"{name}__out0", f"{name}__out1"] if gives_text else [f"{name}__out0"]
        else:
            inputs = previous if number else [f"{name}__arg0"]
            outputs = [f"{name}__out0"]
        keys[name] = (inputs, outputs)
        previous = outputs
    return keys


def cached_sample_arrays(
    image_id: int, step_index: int, boundaries: Mapping[str, np.ndarray], run: str | None
) -> dict[str, np.ndarray]:
    """Return what a sample file holds: the boundaries and modulation_input by key, and of which image, step and run they are."""
    where = {"image_id": np.int32(image_id), "step_index": np.int32(step_index)}
    return {key: np.asarray(array) for key, array in boundaries.items()} | where | of_run(run)


def write_cached_sample(
    paths: BlockCachePaths, run: str, image_id: int, step_index: int, boundaries: Mapping[str, np.ndarray]
) -> None:
    """Write one sample; runs on the writer's thread while the next pass computes."""
    write_npz(paths.sample(image_id, step_index), cached_sample_arrays(image_id, step_index, boundaries, run))


def write_cache_metadata(
    paths: BlockCachePaths, manifest: Mapping[str, Any], plan: Mapping[str, Any], blocks: Sequence[str],
    keys: Mapping[str, tuple[list[str], list[str]]], of_key: Mapping[str, Sequence[int]],
) -> None:  # fmt: skip
    """Describe the finished cache; written last, so a cache with metadata.json is complete.

    blocks are the cached ones, keys `boundary_keys` of the whole model, of_key the shape of every stored array.
    """
    samples = [
        {"image_id": image_id, "step_index": step, "file": str(paths.sample(image_id, step).relative_to(paths.root))}
        for image_id in plan["selected_image_ids"]
        for step in plan["key_timesteps"]
    ]

    def shapes(names: list[str]) -> list[list[int]]:
        return [list(of_key[name]) for name in names]

    block_shapes = {
        block: {
            "input_keys": keys[block][0],
            "input_shapes": shapes(keys[block][0]),
            "output_keys": keys[block][1],
            "output_shapes": shapes(keys[block][1]),
        }
        for block in blocks
    }
    velocity = {"velocity_shape": list(of_key[VELOCITY])} if holds_ends(plan) else {}
    metadata = {
        **plan,
        **velocity,
        "block_names": list(blocks),
        "block_shapes": block_shapes,
        "samples": samples,
        "cfg_weight": manifest["cfg_scale"],
        "num_steps": manifest["num_steps"],
        "model_version": manifest["model_version"],
        "weights_fingerprint": manifest["weights_fingerprint"],
        "dtype": "float16",
    }
    write_json(paths.metadata, metadata)


@dataclass(frozen=True)
class CachedBlock:
    """What one block saw and gave in one pass: tokens (R, tokens, 1, hidden) float16, mapped from the file."""

    image_id: int
    step_index: int
    inputs: tuple[np.ndarray, ...]  # (image, text) for mm blocks, (tokens,) for uni blocks
    outputs: tuple[np.ndarray, ...]  # (image, text), (image,) for the last mm block, (tokens,) for uni blocks
    modulation_input: np.ndarray  # (R, 1, 1, hidden)


def read_cache_metadata(calib_dir: Path) -> dict[str, Any]:
    """The block cache's metadata. Raises StoreError when there is none or it is of another calibration run."""
    path = BlockCachePaths(calib_dir).metadata
    metadata = CACHE_METADATA.read(path)
    manifest = CalibrationPaths(calib_dir).manifest
    if manifest.exists() and not same_run(read_manifest(calib_dir), metadata):
        raise StoreError(
            f"{path}: made from another calibration run than {manifest}; run cache_adaround_data.py --force"
        )
    return metadata


def block_keys(metadata: Mapping[str, Any], block: str, last: str | None = None) -> tuple[list[str], list[str]]:
    """NPZ keys of (the inputs of `block`, the outputs of `last`, by default the same block)."""
    return metadata["block_shapes"][block]["input_keys"], metadata["block_shapes"][last or block]["output_keys"]


def read_cached_block(
    calib_dir: Path, block: str, last: str | None = None, metadata: Mapping[str, Any] | None = None
) -> Iterator[CachedBlock]:
    """One block's inputs and outputs over all samples of the cache, without loading any other block's.

    With `last`, the inputs of `block` and the outputs of `last`: a stretch of blocks. metadata: the cache's, where it is
    known already. Raises StoreError (also after the
    first samples) when a file is missing, damaged or of another run.
    """
    paths, metadata = BlockCachePaths(calib_dir), metadata or read_cache_metadata(calib_dir)
    if holds_ends(metadata):
        raise StoreError(
            f"{paths.metadata}: holds only the ends of the stack of blocks (--boundaries ends), not the boundaries of {block}; "
            f"run {CACHE_SCRIPT} --boundaries all --force for them"
        )
    for name in (block, last or block):
        if name not in metadata["block_names"]:
            cached = ", ".join(metadata["block_names"])
            raise StoreError(f"{paths.metadata}: block {name} is not cached (it has {cached})")
    input_keys, output_keys = block_keys(metadata, block, last)
    stored = stored_shapes(metadata)
    shapes = {key: stored[key] for key in (*input_keys, *output_keys, "modulation_input")}
    for sample in metadata["samples"]:
        where = (sample["image_id"], sample["step_index"])
        path, run = paths.root / sample["file"], metadata.get(CALIBRATION_RUN)
        arrays = check_cached_sample(path, *where, shapes, checked=False, run=run)
        yield CachedBlock(
            *where,
            tuple(arrays[key] for key in input_keys),
            tuple(arrays[key] for key in output_keys),
            arrays["modulation_input"],
        )


@dataclass(frozen=True)
class CachedEnds:
    """The ends of one pass, float16, mapped from the file."""

    image_id: int
    step_index: int
    inputs: tuple[np.ndarray, ...]  # of the first block: tokens (R, tokens, 1, hidden)
    velocity: np.ndarray  # (R, h, w, channels): what the transformer gives
    modulation_input: np.ndarray  # (R, 1, 1, hidden)


def read_cached_ends(calib_dir: Path, metadata: Mapping[str, Any] | None = None) -> Iterator[CachedEnds]:
    """A cache of `--boundaries ends`, sample by sample. Raises StoreError as `read_cached_block` does."""
    paths, metadata = BlockCachePaths(calib_dir), metadata or read_cache_metadata(calib_dir)
    if not holds_ends(metadata):
        raise StoreError(f"{paths.metadata}: a cache of --boundaries all; `read_cached_block` reads it")
    shapes, first = stored_shapes(metadata), block_keys(metadata, metadata["block_names"][0])[0]
    for sample in metadata["samples"]:
        where = (sample["image_id"], sample["step_index"])
        path, run = paths.root / sample["file"], metadata.get(CALIBRATION_RUN)
        arrays = check_cached_sample(path, *where, shapes, checked=False, run=run)
        yield CachedEnds(*where, tuple(arrays[key] for key in first), arrays[VELOCITY], arrays["modulation_input"])


def is_cached(
    paths: BlockCachePaths, run: str, image_id: int, step_index: int, shapes: Mapping[str, Sequence[int]]
) -> bool:
    """Return whether a sample of this run's cache is on the disk, whole (checksums included), with arrays of these shapes."""
    try:
        check_cached_sample(paths.sample(image_id, step_index), image_id, step_index, shapes, checked=True, run=run)
    except StoreError:
        return False
    return True
