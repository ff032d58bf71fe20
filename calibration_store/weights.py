"""The weight track: block cache (2W) and learned rounding (3W)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import numpy as np
from msgspec import Meta

from calibration_store.files import StoreError, map_npz, matching, read_npz
from calibration_store.runs import CalibrationPaths, read_manifest, same_run
from calibration_store.schema import (
    FINITE,
    POSITIVE,
    BlockName,
    Count,
    Digest,
    Index,
    JsonFormat,
    Member,
    Name,
    NotNegative,
    Record,
    RelativePath,
    Share,
    Side,
    Steps,
    below,
    distinct,
)

CACHE_FORMAT = "adaround_cache_v2"
WEIGHTS_FORMAT = "adaround_weights_v1"


@dataclass(frozen=True)
class BlockCachePaths:
    """Where stage 2W keeps what; `calib_dir` is the folder that all stages share."""

    calib_dir: Path

    @property
    def root(self) -> Path:
        return self.calib_dir / "adaround_cache"

    @property
    def metadata(self) -> Path:
        return self.root / "metadata.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    def sample(self, image_id: int, step_index: int) -> Path:
        return self.samples / f"{image_id:04d}_{step_index:03d}.npz"

    def owned_files(self) -> list[Path]:
        """Every file that stage 2W wrote, its half-written temporary files included."""
        patterns = {self.root: r"(metadata|plan)\.json", self.samples: r"\d{4,}_\d{3,}\.npz"}
        return [path for folder, pattern in patterns.items() for path in matching(folder, pattern)]


CACHE_REMEDY = "run cache_adaround_data.py with --resume to make it anew"
CACHE_SCRIPT = "cache_adaround_data.py"
Key = Annotated[str, Meta(pattern=r"^(mm|uni)[0-9]{1,4}__(arg|out)[01]$")]
Shape = tuple[Annotated[int, Meta(ge=1, le=2)], Side, Literal[1], Side]  # rows, tokens, 1, hidden


class CachePlan(TypedDict):
    """plan.json: what a cache is, while it is under way."""

    format: Literal["adaround_cache_v2"]
    calibration_run: Digest
    num_images: Count
    stride: Steps
    blocks: str | None
    selected_image_ids: list[Index]
    key_timesteps: list[Index]


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
    cfg_weight: NotNegative
    num_steps: Steps
    dtype: Literal["float16"]


class CacheMetadata(_CacheMetadata, total=False):
    calibration_run: Digest
    num_images: Count
    blocks: str | None
    model_version: Name
    weights_fingerprint: Digest


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
    prefix, number = re.fullmatch(r"(mm|uni)(\d+)", name).groups()
    before, source = (f"{prefix}{int(number) - 1}", "out") if int(number) else (name, "arg")
    sides = "01" if prefix == "mm" else "0"
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


CACHE_PLAN = JsonFormat(CACHE_FORMAT, CachePlan, CACHE_SCRIPT)
CACHE_METADATA = JsonFormat(CACHE_FORMAT, CacheMetadata, CACHE_SCRIPT, cache_fault)


def cache_record(shapes: Mapping[str, Sequence[int]]) -> Record:
    """The arrays of a sample of the block cache, from the shapes of its boundaries and of modulation_input."""
    members = {key: Member(("float16",), tuple(shape), (FINITE,)) for key, shape in shapes.items()}
    return Record(members | {"image_id": Member(("int32",), ()), "step_index": Member(("int32",), ())})


def stored_shapes(metadata: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every array of a cache's sample files, by its key."""
    shapes = {key: found[0] for key, found in _shapes_of_keys(metadata).items()}
    rows, _, _, hidden = next(iter(shapes.values()))
    return shapes | {"modulation_input": (rows, 1, 1, hidden)}


def check_cached_sample(
    path: Path, image_id: int, step_index: int, shapes: Mapping[str, Sequence[int]], checked: bool
) -> dict[str, np.ndarray]:
    """The arrays of a sample of the cache, mapped. checked: verify checksums and that every value is finite.

    Raises StoreError when it is missing, damaged, or of another image, step or shape.
    """
    arrays = map_npz(path, [*shapes, "image_id", "step_index"], CACHE_REMEDY, checked)
    record = cache_record(shapes)
    if not checked:  # finiteness would read the data
        record = Record({key: member._replace(rules=()) for key, member in record.members.items()})
    fault = record.fault(arrays)
    if not fault and (arrays["image_id"], arrays["step_index"]) != (image_id, step_index):
        fault = f"image {arrays['image_id']}, step {arrays['step_index']}"
    if fault:
        raise StoreError(
            f"{path}: not the cached sample of image {image_id}, step {step_index} ({fault}); {CACHE_REMEDY}"
        )
    return arrays


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


def read_cached_block(calib_dir: Path, block: str, last: str | None = None) -> Iterator[CachedBlock]:
    """One block's inputs and outputs over all samples of the cache, without loading any other block's.

    With `last`, the inputs of `block` and the outputs of `last`: a stretch of blocks. Raises StoreError (also after the
    first samples) when a file is missing, damaged or of another run.
    """
    paths, metadata = BlockCachePaths(calib_dir), read_cache_metadata(calib_dir)
    for name in (block, last or block):
        if name not in metadata["block_names"]:
            cached = ", ".join(metadata["block_names"])
            raise StoreError(f"{paths.metadata}: block {name} is not cached (it has {cached})")
    input_keys, output_keys = block_keys(metadata, block, last)
    stored = stored_shapes(metadata)
    shapes = {key: stored[key] for key in (*input_keys, *output_keys, "modulation_input")}
    for sample in metadata["samples"]:
        where = (sample["image_id"], sample["step_index"])
        arrays = check_cached_sample(paths.root / sample["file"], *where, shapes, checked=False)
        yield CachedBlock(
            *where,
            tuple(arrays[key] for key in input_keys),
            tuple(arrays[key] for key in output_keys),
            arrays["modulation_input"],
        )


def is_cached(paths: BlockCachePaths, image_id: int, step_index: int, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a sample of the block cache is on disk, whole (checksums included), with arrays of these shapes."""
    try:
        check_cached_sample(paths.sample(image_id, step_index), image_id, step_index, shapes, checked=True)
    except StoreError:
        return False
    return True


@dataclass(frozen=True)
class WeightPaths:
    """Where stage 3W keeps what; `calib_dir` is the folder that all stages share."""

    calib_dir: Path

    @property
    def root(self) -> Path:
        return self.calib_dir / "adaround_weights"

    @property
    def metadata(self) -> Path:
        return self.root / "metadata.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint.npz"

    def block(self, block: str) -> Path:
        return self.root / f"{block}.npz"

    def losses(self, block: str) -> Path:
        return self.root / f"{block}_losses.json"

    def owned_files(self) -> list[Path]:
        """Every file that stage 3W wrote, its half-written temporary files included."""
        return matching(self.root, r"(metadata|plan)\.json|checkpoint\.npz|(mm|uni)\d+(\.npz|_losses\.json)")


OPTIMIZE = "optimize_adaround.py"
Bits = Annotated[int, Meta(ge=2, le=8)]
GROUP_SIZES = (0, 32, 64, 128)  # 0: per output channel; the others are those of MLX's quantized kernels
WEIGHT_BITS = (2, 3, 4, 5, 6, 8)


class _Weights(TypedDict):
    format: Literal["adaround_weights_v1"]
    block_names: Annotated[list[BlockName], Meta(min_length=1)]
    weight_bits: Literal[2, 3, 4, 5, 6, 8]
    activation_bits: Literal[0, 2, 3, 4, 5, 6, 7, 8]
    group_size: Literal[0, 32, 64, 128]


class _MadeFrom(TypedDict, total=False):
    model_version: Name | None
    calibration_run: Digest | None
    weights_fingerprint: Digest | None
    diverged: Name  # plan.json: the unit whose loss was not finite; --resume may then lower the learning rates


class _Training(TypedDict):
    unit: Literal["model", "block", "sublayer", "layer"]
    iters: Count
    batch_size: Count
    rounding: Literal["ste", "sigmoid"]
    qdrop: Share
    lr_alpha: NotNegative
    lr_activation_scale: NotNegative
    regularizer_weight: NotNegative
    seed: Index
    num_samples: Count
    selected_image_ids: list[Index]
    key_timesteps: list[Index]


class WeightsPlan(_Weights, _Training, _MadeFrom):
    """plan.json: what a run of stage 3W is, while it is under way."""


class StageLosses(TypedDict):
    nearest: float
    start: float
    hardened: float
    end: float
    end_activations: float | None
    end_training: float
    kept_nearest: bool
    layers: Count


class BlockLosses(TypedDict):
    unit: Name
    stages: Annotated[list[StageLosses], Meta(min_length=1, max_length=64)]


class BlockLossesFile(BlockLosses):
    format: Literal["adaround_losses_v1"]


class WeightsMetadata(_Weights, _MadeFrom, total=False):
    """metadata.json, written last: bits and groups; other tools' (benchmarks/gptq.py) say no more, ours the whole plan."""

    unit: Literal["model", "block", "sublayer", "layer"]
    iters: Count
    num_samples: Count
    selected_image_ids: list[Index]
    key_timesteps: list[Index]
    seed: Index
    losses: dict[BlockName, BlockLosses]


def weights_fault(content: WeightsPlan | WeightsMetadata) -> str | None:
    """What the entries of plan.json and metadata.json say of each other that cannot be."""
    ids, steps = content.get("selected_image_ids", []), content.get("key_timesteps", [])
    fault = distinct(content["block_names"], "block_names: block") or distinct(ids, "image")
    if fault:
        return fault
    if content.get("num_samples", 0) != len(ids) * len(steps):
        return "num_samples is not that of selected_image_ids and key_timesteps"
    if set(content.get("losses", content["block_names"])) != set(content["block_names"]):
        return "losses are not those of block_names"
    return None


WEIGHTS_PLAN = JsonFormat(WEIGHTS_FORMAT, WeightsPlan, OPTIMIZE, weights_fault)
WEIGHTS_METADATA = JsonFormat(WEIGHTS_FORMAT, WeightsMetadata, OPTIMIZE, weights_fault)
LOSSES = JsonFormat("adaround_losses_v1", BlockLossesFile, OPTIMIZE)


def layer_record(bits: int) -> Record:
    """The arrays of one layer in a block file: W (out, in) in groups of in / groups inputs."""
    return Record(
        {
            "q": Member(("uint8",), ("out", "in"), (below(2**bits),)),
            "alpha": Member(("float16", "float32"), ("out", "in"), (FINITE,), optional=True),
            "scale": Member(("float32",), ("out", "groups"), (FINITE, POSITIVE)),
            "zero_point": Member(("float32",), ("out", "groups"), (FINITE,)),
            "bias": Member(("float32",), ("out",), (FINITE,), optional=True),
            "act_scale": Member(("float32",), (), (FINITE, POSITIVE), optional=True),
            "act_shift": Member(("float32",), ("in",), (FINITE,), optional=True),
        }
    )


def layer_fault(fields: Mapping[str, np.ndarray], bits: int) -> str | None:
    """What is wrong with one layer's arrays, or None."""
    return layer_record(bits).fault(fields)


def read_quantized_block(
    paths: WeightPaths, block: str, plan: Mapping[str, Any] | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """The learned quantization of one block: {layer: {field: array}}, fields as in FORMATS.

    plan: bits and group size that it must have; by default those of metadata.json. Raises StoreError that names the file.
    """
    plan = plan or WEIGHTS_METADATA.read(paths.metadata)
    remedy = f"run {OPTIMIZE} with --resume to make it anew"
    path, record = paths.block(block), layer_record(plan["weight_bits"])
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, array in read_npz(path, remedy).items():
        name, _, field = key.rpartition("__")
        layers.setdefault(layer_name(name), {})[field] = array
    for name, fields in layers.items():
        fault = record.fault(fields) or (None if name.startswith(f"{block}.") else f"not a layer of {block}")
        if not fault and not _groups_fit(fields, plan["group_size"]):
            fault = f"scale has shape {fields['scale'].shape} for groups of {plan['group_size']}"
        if not fault and ("act_scale" in fields) != bool(plan["activation_bits"]):
            fault = f"{'a' if 'act_scale' in fields else 'no'} range for {plan['activation_bits']} activation bits"
        if not fault and ("act_shift" in fields) != ("act_scale" in fields and name.endswith(".mlp.fc2")):
            fault = f"{'a' if 'act_shift' in fields else 'no'} shift of its input"
        if fault:
            raise StoreError(f"{path}: {name}: {fault}; {remedy}")
    if not layers:
        raise StoreError(f"{path}: holds no layer; {remedy}")
    return layers


def _groups_fit(fields: Mapping[str, np.ndarray], group_size: int) -> bool:
    width = fields["q"].shape[1]
    return fields["scale"].shape[1] * (group_size or width) == width


class Position(TypedDict):
    """Where a checkpoint stands: in which job of which run, at which iteration of which of its stages."""

    plan: Digest
    job: Name
    stage: Index
    iteration: Index
    losses: list[StageLosses]


def read_position(arrays: Mapping[str, np.ndarray]) -> Position:
    """The position of a checkpoint. Raises ValueError for one that cannot be."""
    position = arrays.get("position")
    if position is None or position.dtype != np.uint8 or position.ndim != 1:
        raise ValueError("no position")
    return msgspec.json.decode(position.tobytes(), type=Position)  # ValidationError is a ValueError


def layer_name(prefix: str) -> str:
    """mm0_img_mlp_fc2 -> mm0.img.mlp.fc2 (q_proj and its like keep their underscore)."""
    return re.sub(r"_(?!proj)", ".", prefix)
