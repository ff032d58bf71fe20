"""The block cache (2W): inputs and outputs of the transformer's blocks in passes at stored latents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
from msgspec import Meta

from calibration_store.choices import Boundaries
from calibration_store.errors import StoreError
from calibration_store.files import write_json
from calibration_store.layout import BlockCachePaths
from calibration_store.manifest import refuse_other_run
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


ALL, ENDS = "all", "ends"  # every boundary between blocks; the first block's inputs and the transformer's output alone
PATCH = 4  # positions of a latent (2 x 2) in a token
VELOCITY = "velocity"


class BlockShapes(TypedDict):
    """Keys and shapes of a block's inputs and outputs."""

    input_keys: list[Key]
    input_shapes: list[Shape]
    output_keys: list[Key]
    output_shapes: list[Shape]


class SampleEntry(TypedDict):
    """A sample's file, relative to the cache's folder."""

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
    """metadata.json, written last. Files of earlier versions lack these entries."""

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
    """Return the first contradiction between entries of a cache's metadata, or None."""
    names, shapes = metadata["block_names"], metadata["block_shapes"]
    fault = distinct(names, "block_names: block") or distinct(metadata["selected_image_ids"], "image")
    fault = fault or distinct(metadata["key_timesteps"], "key_timesteps: step")
    if fault or set(names) != set(shapes):
        return fault or "block_shapes are not of block_names"
    for name, block in shapes.items():
        inputs, outputs = (block["input_keys"], block["input_shapes"]), (block["output_keys"], block["output_shapes"])
        for side, (keys, of_keys) in (("input", inputs), ("output", outputs)):
            if not 1 <= len(keys) == len(of_keys) <= 2:
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
            counts = " and ".join(map(str, tokens))
            return f"velocity_shape: {metadata['velocity_shape']}, with {counts} tokens in block_shapes"
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
    """Return whether a block's keys are those of its inputs (its arguments, if it is first) and of its outputs."""
    kind, number = block_kind(name)
    before, source = (f"{kind}{number - 1}", "out") if number else (name, "arg")
    sides = "01" if kind == MULTIMODAL else "0"
    inputs, outputs = (
        [f"{owner}__{kind_of_key}{side}" for side in sides] for owner, kind_of_key in ((before, source), (name, "out"))
    )
    return block["input_keys"] == inputs and block["output_keys"] in (outputs, outputs[:1])


def _shapes_of_keys(metadata: Mapping[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    """Return {key: distinct shapes of a boundary}, from the blocks on both its sides; one shape where they agree."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for block in metadata["block_shapes"].values():
        for side in ("input", "output"):
            for key, shape in zip(block[f"{side}_keys"], block[f"{side}_shapes"], strict=True):
                if tuple(shape) not in shapes.setdefault(key, []):
                    shapes[key].append(tuple(shape))
    return shapes


CACHE_METADATA = JsonFormat(CACHE_FORMAT, CacheMetadata, CACHE_SCRIPT, cache_fault)


def cache_record(shapes: Mapping[str, Sequence[int]], dtype: str = "float16") -> Record:
    """Return the declaration of a sample's arrays, from the shapes of its boundaries and of modulation_input."""
    members = {key: Member((dtype,), tuple(shape), (FINITE,)) for key, shape in shapes.items()}
    where = {"image_id": Member(INTEGERS, ()), "step_index": Member(INTEGERS, ()), CALIBRATION_RUN: OF_RUN}
    return Record(members | where)


def holds_ends(metadata: Mapping[str, Any]) -> bool:
    """Return whether a cache, or its plan, holds the ends of the stack of blocks alone."""
    return metadata.get("boundaries", ALL) == ENDS


def boundary_shapes(metadata: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of every boundary between blocks, stored or not, and of modulation_input."""
    shapes = {key: found[0] for key, found in _shapes_of_keys(metadata).items()}
    rows, _, _, hidden = next(iter(shapes.values()))
    return shapes | {"modulation_input": (rows, 1, 1, hidden)}


def stored_shapes(metadata: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of the arrays in a cache's sample files, but for those that say whose sample it is."""
    shapes = boundary_shapes(metadata)
    if not holds_ends(metadata):
        return shapes
    first = block_keys(metadata, metadata["block_names"][0])[0]
    return ends_of(shapes | {VELOCITY: tuple(metadata["velocity_shape"])}, first)


def ends_of(arrays: Mapping[str, Any], first: Sequence[str]) -> dict[str, Any]:
    """Return the entries that a cache of `--boundaries ends` stores. first: keys of the first block's inputs."""
    return {key: arrays[key] for key in (*first, "modulation_input", VELOCITY)}


def check_cached_sample(
    path: Path, image_id: int, step_index: int, shapes: Mapping[str, Sequence[int]], checked: bool, run: str | None,
    remedy: str = CACHE_REMEDY, dtype: str = "float16",
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return the arrays of a sample of the cache as read-only maps of the file.

    shapes: of the arrays that are wanted. checked: verify checksums, and that every value is finite. run: the
    calibration run of the cache, from its metadata; None: not compared. Raises StoreError when the file is missing,
    damaged, or of another run, image, step or shape.
    """
    arrays = map_npz(
        path, [*shapes, "image_id", "step_index"], remedy, checked, [] if run is None else [CALIBRATION_RUN]
    )
    record = cache_record(shapes, dtype)
    if not checked:  # finiteness would read the data
        record = Record({key: member._replace(rules=()) for key, member in record.members.items()})
    fault = record.fault(arrays)
    if not fault and (int(arrays["image_id"]), int(arrays["step_index"])) != (image_id, step_index):
        fault = f"image {arrays['image_id']}, step {arrays['step_index']}"
    fault = fault or run_fault(arrays, run)
    if fault:
        raise StoreError(f"{path}: not the cached sample of image {image_id}, step {step_index} ({fault}); {remedy}")
    return arrays


def boundary_keys(names: Sequence[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Return {block: (keys of its inputs, keys of its outputs)}.

    A boundary is stored once, under the block that outputs it. names: all blocks of the model in order. mm0 and uni0
    take inputs that are no block's output: their arguments are stored.
    """
    unified = any(block_kind(name)[0] == UNIFIED for name in names)
    last_multimodal = [name for name in names if block_kind(name)[0] == MULTIMODAL][-1]
    keys: dict[str, tuple[list[str], list[str]]] = {}
    previous: list[str] = []
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
    """Return the arrays of a sample file: boundaries and modulation_input by key, and its image, step and run."""
    where = {"image_id": np.array(image_id, np.int32), "step_index": np.array(step_index, np.int32)}
    return {key: np.asarray(array) for key, array in boundaries.items()} | where | of_run(run)


def write_cached_sample(
    paths: BlockCachePaths, run: str, image_id: int, step_index: int, boundaries: Mapping[str, np.ndarray]
) -> None:
    """Write one sample, on the writer's thread while the next pass computes. Raises WriteError."""
    write_npz(paths.sample(image_id, step_index), cached_sample_arrays(image_id, step_index, boundaries, run))


def write_cache_metadata(
    paths: BlockCachePaths, manifest: Mapping[str, Any], plan: Mapping[str, Any], blocks: Sequence[str],
    keys: Mapping[str, tuple[list[str], list[str]]], of_key: Mapping[str, Sequence[int]],
) -> None:  # fmt: skip
    """Write metadata.json, which describes the finished cache. It is written last, so a cache that has one is complete.

    blocks: the cached blocks. keys: `boundary_keys` of the whole model. of_key: {key: shape} of every stored array.
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
    """Inputs and outputs of one block in one pass: tokens (R, tokens, 1, hidden) float16, read-only maps of the file.

    R rows: 2 with guidance (conditional, then unconditional), else 1.
    """

    image_id: int
    step_index: int
    inputs: tuple[np.ndarray, ...]  # (image, text) for mm blocks, (tokens,) for uni blocks
    outputs: tuple[np.ndarray, ...]  # (image, text), (image,) for the last mm block, (tokens,) for uni blocks
    modulation_input: np.ndarray  # (R, 1, 1, hidden)


def read_cache_metadata(calib_dir: Path) -> dict[str, Any]:
    """Read the block cache's metadata. Raises StoreError when there is none, or it is of another calibration run."""
    path = BlockCachePaths(calib_dir).metadata
    metadata = CACHE_METADATA.read(path)
    refuse_other_run(calib_dir, path, metadata, "run cache_adaround_data.py --force")
    return metadata


def block_keys(metadata: Mapping[str, Any], block: str, last: str | None = None) -> tuple[list[str], list[str]]:
    """Return the NPZ keys of (the inputs of `block`, the outputs of `last`, by default the same block)."""
    return metadata["block_shapes"][block]["input_keys"], metadata["block_shapes"][last or block]["output_keys"]


def read_cached_block(
    calib_dir: Path, block: str, last: str | None = None, metadata: Mapping[str, Any] | None = None
) -> Iterator[CachedBlock]:
    """Yield one block's inputs and outputs for every sample of the cache; no other block's arrays are read.

    last: the block whose outputs are wanted, for a stretch of blocks from `block` on; by default `block` itself.
    metadata: the cache's, where it has been read. Raises StoreError, also after the first samples, when a file is
    missing, damaged or of another run, or when the cache lacks the block.
    """
    paths, metadata = BlockCachePaths(calib_dir), metadata or read_cache_metadata(calib_dir)
    if holds_ends(metadata):
        raise StoreError(
            f"{paths.metadata}: holds only the ends of the stack of blocks (--boundaries ends), not the boundaries of "
            f"{block}; run {CACHE_SCRIPT} --boundaries all --force for them"
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
    """Both ends of the stack of blocks in one pass, float16, read-only maps of the file. R rows as in `CachedBlock`."""

    image_id: int
    step_index: int
    inputs: tuple[np.ndarray, ...]  # of the first block, as `CachedBlock` has them
    velocity: np.ndarray  # (R, h, w, channels): the transformer's output
    modulation_input: np.ndarray  # (R, 1, 1, hidden)


def read_cached_ends(calib_dir: Path, metadata: Mapping[str, Any] | None = None) -> Iterator[CachedEnds]:
    """Yield every sample of a cache of `--boundaries ends`. Raises StoreError as `read_cached_block` does."""
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
    """Return whether a sample of this run is on the disk, whole (checksums included), with arrays of these shapes."""
    try:
        check_cached_sample(paths.sample(image_id, step_index), image_id, step_index, shapes, checked=True, run=run)
    except StoreError:
        return False
    return True
