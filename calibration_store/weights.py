"""Learned rounding (3W): codes, grids and ranges of every layer, losses, plan.json and metadata.json."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import orjson
from msgspec import Meta

from calibration_store.choices import (
    ActivationBits,
    GroupSize,
    InputRule,
    KnownUnit,
    ProductPrecision,
    RestBits,
    RestKind,
    RoundingMethodName,
    WeightBits,
)
from calibration_store.errors import StoreError
from calibration_store.files import file_digest, read_bytes, write_json
from calibration_store.layout import WeightPaths
from calibration_store.names import BlockName, LayerName, block_of, is_post_gelu, layer_key, split_key
from calibration_store.npz import LARGEST_NPZ, npz_arrays, write_npz
from calibration_store.rest_weights import read_migration, read_rest
from calibration_store.schema import (
    CALIBRATION_RUN,
    FINITE,
    FLOATS,
    INTEGERS,
    NOT_NEGATIVE,
    POSITIVE,
    TRAINING_RUN,
    Count,
    Digest,
    Index,
    Iterations,
    JsonFormat,
    Member,
    Name,
    NotNegative,
    Rate,
    Record,
    Relation,
    Rule,
    Seed,
    Share,
    below,
    distinct,
    of_run,
    run_fault,
    seed_fault,
)
from calibration_store.version import W4A8_VERSION

WEIGHTS_FORMAT = "adaround_weights_v1"
OPTIMIZE = "optimize_adaround.py"
Bits = Annotated[int, Meta(ge=2, le=8)]


class _Weights(TypedDict):
    format: Literal["adaround_weights_v1"]
    block_names: Annotated[list[BlockName], Meta(min_length=1)]
    weight_bits: WeightBits
    activation_bits: ActivationBits
    group_size: GroupSize


class _MadeFrom(TypedDict, total=False):
    model_version: Name | None
    calibration_run: Digest | None
    weights_fingerprint: Digest | None
    micro_batch: Count  # samples whose gradients were computed at once; absent in older files
    window: Index  # samples that an iteration drew from; 0, or absent in older files: all samples
    activation_rule: InputRule  # absent in older files: static ranges, the same at every step
    range_sigmas: list[NotNegative]  # noise levels of `act_scales`, the cached steps
    schedule: list[NotNegative]  # noise levels of the calibration run's steps
    block_inputs: Literal["original", "mixed"]
    end_to_end: Iterations  # iterations of the last phase
    unrolled: Iterations  # more iterations of it, against finished latents; absent: 0
    rest: RestKind  # which 16-bit parameters the last phase trains, too; absent: none
    rest_bits: RestBits  # of adaLN's matrices in the export that is trained for
    precision: ProductPrecision  # of products in training; absent: float32
    migrate: bool  # wide input channels were migrated into the weights (migration.npz); absent: they were not
    training_run: Digest  # digest of the plan (function `training_run`); absent in files of 0.8.0
    w4a8_version: Name  # of the toolkit that began the run; absent before 0.9.0
    layer_bits: dict[LayerName, Bits]  # bits of the layers whose codes do not have weight_bits
    excluded: list[LayerName]  # layers that are not quantized
    average_bits: float | None
    bit_choices: list[Bits] | None
    diverged: Name  # plan.json: the unit whose loss was not finite; --resume may then lower the learning rates


class _Training(TypedDict):
    unit: KnownUnit
    iters: Iterations
    batch_size: Count
    rounding: RoundingMethodName
    qdrop: Share
    lr_alpha: Rate
    lr_activation_scale: Rate
    regularizer_weight: Rate
    seed: Seed
    num_samples: Count
    selected_image_ids: list[Index]
    key_timesteps: list[Index]


class WeightsPlan(_Weights, _Training, _MadeFrom):
    """plan.json: the description of a run of stage 3W that is under way."""


class _StageLosses(TypedDict):
    nearest: float
    start: float
    hardened: float
    end: float
    end_activations: float | None
    end_training: float
    kept_nearest: bool
    layers: Count


class StageLosses(_StageLosses, total=False):
    """Errors of a unit in one stage of its training; 1 is the error of round-to-nearest on the training samples."""

    # mean training loss of stretches of iterations; absent in older files
    curve: Annotated[list[float], Meta(max_length=256)]
    # errors of finished latents with round-to-nearest, at the start and at the end of this stage, if it was trained on them
    finished_latents: list[NotNegative]
    kept_start: bool  # held-out samples did not gain, and the values before this stage were kept
    rest: Index  # number of arrays in rest.npz that this stage left; absent: it trained none


class BlockLosses(TypedDict):
    """The losses of one unit, stage after stage."""

    unit: Name
    stages: Annotated[list[StageLosses], Meta(min_length=1, max_length=64)]


class _BlockLossesFile(BlockLosses):
    format: Literal["adaround_losses_v1"]


class BlockLossesFile(_BlockLossesFile, total=False):
    """The losses of one unit in a file of their own, until metadata.json is written."""

    training_run: Digest


class WeightsMetadata(_Weights, _MadeFrom, total=False):
    """metadata.json, written last: bits and groups, and the whole plan of a run of stage 3W.

    Other tools write bits and groups alone.
    """

    unit: KnownUnit
    iters: Iterations
    num_samples: Count
    selected_image_ids: list[Index]
    key_timesteps: list[Index]
    seed: Seed
    losses: dict[BlockName, BlockLosses]
    end_to_end_losses: BlockLosses
    block_digests: dict[BlockName, Digest]  # SHA-256 of every block's file
    rest_parameters: list[Name]  # paths of the arrays in rest.npz; absent: there is no such file
    rest_digest: Digest  # its SHA-256
    migration_digest: Digest  # of migration.npz; absent: there is no such file


def weights_fault(content: WeightsPlan | WeightsMetadata) -> str | None:
    """Return the first contradiction between entries of plan.json or metadata.json, or None."""
    ids, steps = content.get("selected_image_ids", []), content.get("key_timesteps", [])
    names, by_block = content["block_names"], dict[str, Any](content)
    fault = distinct(names, "block_names: block") or distinct(ids, "image")
    if fault:
        return fault
    if content.get("num_samples", 0) != len(ids) * len(steps):
        return "num_samples is not that of selected_image_ids and key_timesteps"
    for key in ("losses", "block_digests"):
        if set(by_block.get(key, names)) != set(names):
            return f"{key} are not those of block_names"
    return seed_fault(content.get("seed", 0))


WEIGHTS_PLAN = JsonFormat(WEIGHTS_FORMAT, WeightsPlan, OPTIMIZE, weights_fault)
WEIGHTS_METADATA = JsonFormat(WEIGHTS_FORMAT, WeightsMetadata, OPTIMIZE, weights_fault)
LOSSES = JsonFormat("adaround_losses_v1", BlockLossesFile, OPTIMIZE)


def _fits_float16(array: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return bool((half > 0).all() and np.isfinite(half).all())


def _minima_fit_float16(scale: np.ndarray, zero_point: np.ndarray) -> bool:
    return bool((np.abs(scale.astype(np.float64) * zero_point) <= np.finfo(np.float16).max).all())


DEPLOYED = Rule("is no float16 value above 0", _fits_float16, lambda a: np.full_like(a, 1e-30))


def layer_record(bits: int) -> Record:
    """Return the declaration of one layer's arrays in a block file: W (out, in), in groups of in / groups inputs.

    Ŵ = scale·(q − zero_point), with codes q of `bits` bits. Scales and minima, −scale·zero_point, must fit float16, in
    which they are deployed.
    """
    grid, ranges = (FINITE, POSITIVE, DEPLOYED), (FINITE, POSITIVE)
    minima = Relation(
        "scale · zero_point does not fit float16", ("scale", "zero_point"), _minima_fit_float16,
        lambda scale, zero_point: {"zero_point": np.full_like(zero_point, 1e30)},
    )  # fmt: skip
    return Record(
        {
            "q": Member(INTEGERS, ("out", "in"), (NOT_NEGATIVE, below(2**bits))),
            "alpha": Member(FLOATS, ("out", "in"), (FINITE,), optional=True),
            "scale": Member(FLOATS, ("out", "groups"), grid),
            "zero_point": Member(FLOATS, ("out", "groups"), (FINITE,)),
            "bias": Member(FLOATS, ("out",), (FINITE,), optional=True),
            "act_scale": Member(FLOATS, (), ranges, optional=True),
            "act_scales": Member(FLOATS, ("steps",), ranges, optional=True),
            "act_shift": Member(FLOATS, ("in",), (FINITE,), optional=True),
            "scale_before": Member(FLOATS, ("out", "groups"), grid, optional=True),
            "zero_point_before": Member(FLOATS, ("out", "groups"), (FINITE,), optional=True),
            "bias_before": Member(FLOATS, ("out",), (FINITE,), optional=True),
            "act_scale_before": Member(FLOATS, (), ranges, optional=True),
            "act_scales_before": Member(FLOATS, ("steps",), ranges, optional=True),
        },
        (minima,),
    )


FIELDS = frozenset(layer_record(8).members)
FIELD_DTYPES = {"q": np.uint8, "alpha": None}  # dtypes that readers get; None: the file's own; of other fields: float32


def layer_fault(fields: Mapping[str, np.ndarray], bits: int) -> str | None:
    """Return what is wrong with one layer's arrays, or None."""
    return layer_record(bits).fault(fields)


def training_run(plan: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a plan, without the entries that may differ within one run.

    Learning rates may change after a fault. Noise levels follow from the calibration run, and devices round them
    differently.
    """
    return _plan_digest(plan, (*LEARNING_RATES, *NOISE_LEVELS))


LEARNING_RATES = ("lr_alpha", "lr_activation_scale")
NOISE_LEVELS = ("schedule", "range_sigmas")


def training_run_of_0_8_0(plan: Mapping[str, Any]) -> str:
    """Return the digest that checkpoints of 0.8.0 have in place of `training_run`; it includes the noise levels."""
    return _plan_digest(plan, LEARNING_RATES)


def _plan_digest(plan: Mapping[str, Any], without: Sequence[str]) -> str:
    same = {key: value for key, value in plan.items() if key not in (*without, TRAINING_RUN, W4A8_VERSION)}
    return hashlib.sha256(orjson.dumps(same, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _is_known(key: str) -> bool:
    """Return whether a member of a block's file is declared; other members are not unpacked."""
    return key in (CALIBRATION_RUN, TRAINING_RUN) or key.rpartition("__")[2] in FIELDS


def read_quantized_block(
    paths: WeightPaths, block: str, plan: Mapping[str, Any] | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Read the learned quantization of one block, {layer: {field: array}}; `layer_record` has fields and shapes.

    Codes `q` are uint8, `alpha` has the dtype of the file, and all other fields are float32. plan: bits, group size and
    run, with the digests of the files where they are known; by default metadata.json. Raises StoreError that names the
    file.
    """
    plan = plan or WEIGHTS_METADATA.read(paths.metadata)
    remedy = f"run {OPTIMIZE} with --resume to make it anew"
    path, bits = paths.block(block), plan.get("layer_bits", {})
    content = read_bytes(path, remedy, "missing", LARGEST_NPZ)
    arrays = npz_arrays(path, content, remedy, _is_known, LARGEST_NPZ // 4)
    noted = plan.get("block_digests", {}).get(block)
    fault = run_fault(arrays, plan.get(CALIBRATION_RUN)) or run_fault(arrays, plan.get(TRAINING_RUN), TRAINING_RUN)
    if fault is None and noted is not None and hashlib.sha256(content).hexdigest() != noted:
        fault = f"not the file that {paths.metadata.name} was written for (exchanged, or changed)"
    if fault:
        raise StoreError(f"{path}: {fault}; {remedy}")
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        if key not in (CALIBRATION_RUN, TRAINING_RUN):
            name, field = split_key(key)
            layers.setdefault(name, {})[field] = array
    for name, fields in layers.items():
        fault = layer_fault(fields, bits.get(name, plan["weight_bits"])) or (
            None if block_of(name) == block else f"not a layer of {block}"
        )
        if not fault and not _groups_fit(fields, plan["group_size"]):
            fault = f"scale has shape {fields['scale'].shape} for groups of {plan['group_size']}"
        if not fault and ("act_scale" in fields) != bool(plan["activation_bits"]):
            fault = f"{'a' if 'act_scale' in fields else 'no'} range for {plan['activation_bits']} activation bits"
        if not fault and ("act_shift" in fields) != ("act_scale" in fields and is_post_gelu(name)):
            fault = f"{'a' if 'act_shift' in fields else 'no'} shift of its input"
        if fault:
            raise StoreError(f"{path}: {name}: {fault}; {remedy}")
    if not layers:
        raise StoreError(f"{path}: holds no layer; {remedy}")
    return {name: {field: _given(field, array) for field, array in fields.items()} for name, fields in layers.items()}


def _given(field: str, array: np.ndarray) -> np.ndarray:
    """Return a field in the dtype that readers get, whatever dtype another writer chose."""
    dtype = FIELD_DTYPES.get(field, np.float32)
    return array if dtype is None else array.astype(dtype, copy=False)


def write_quantized_block(
    paths: WeightPaths, block: str, layers: Mapping[str, Mapping[str, np.ndarray]], plan: Mapping[str, Any]
) -> None:
    """Write one block's layers, {layer: {field: array}}, with the identity of their run. Raises WriteError."""
    fields = {layer_key(name, field): array for name, found in layers.items() for field, array in found.items()}
    whose = of_run(plan.get(CALIBRATION_RUN)) | of_run(plan.get(TRAINING_RUN), TRAINING_RUN)
    write_npz(paths.block(block), fields | whose)


def write_losses(path: Path, unit: str, stages: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> None:
    """Write the losses of a unit, one entry for each stage of its training. path: of one of the unit's blocks."""
    whose = {TRAINING_RUN: plan[TRAINING_RUN]} if TRAINING_RUN in plan else {}
    write_json(path, {"format": LOSSES.name, "unit": unit, "stages": stages, **whose})


def read_losses(path: Path, plan: Mapping[str, Any]) -> BlockLosses:
    """Read the losses of a unit of this run. Raises StoreError that names the file."""
    found = LOSSES.read(path)
    if found.get(TRAINING_RUN, plan.get(TRAINING_RUN)) != plan.get(TRAINING_RUN):
        raise StoreError(f"{path}: of another {TRAINING_RUN}; run {OPTIMIZE} with --resume to make it anew")
    return {"unit": found["unit"], "stages": found["stages"]}


def write_weights_metadata(paths: WeightPaths, plan: Mapping[str, Any]) -> dict[str, BlockLosses]:
    """Write metadata.json, after all blocks; return {block: losses}, and the losses of the last phase by its unit.

    Raises StoreError for a block or losses that cannot be read, and WriteError.
    """
    losses = {block: read_losses(paths.losses(block), plan) for block in plan["block_names"]}
    last = {"end_to_end_losses": read_losses(paths.end_to_end_losses, plan)} if plan.get("end_to_end") else {}
    digests = {block: file_digest(paths.block(block)) for block in plan["block_names"]}
    rest: dict[str, Any] = {}
    if plan.get("migrate"):
        read_migration(paths, plan)
        rest["migration_digest"] = file_digest(paths.migration)
    if plan.get("migrate") or any(stage.get("rest") for each in last.values() for stage in each["stages"]):
        rest |= {"rest_parameters": list(read_rest(paths, plan)), "rest_digest": file_digest(paths.rest)}
    content = {**plan, "format": WEIGHTS_FORMAT, "losses": losses, **last, "block_digests": digests, **rest}
    write_json(paths.metadata, content)
    return losses | {each["unit"]: each for each in last.values()}


def _groups_fit(fields: Mapping[str, np.ndarray], group_size: int) -> bool:
    width = fields["q"].shape[1]
    return fields["scale"].shape[1] * (group_size or width) == width


def weight_paths(calib_dir: Path, group_size: int | None = None, resume: bool = False) -> WeightPaths:
    """Return the folder of the learned weights with groups of this size; None: adaround_weights/, whatever it holds.

    The first run is in adaround_weights/. A run with groups of another size than that one's is in adaround_weights_gN/,
    so that weights for MLX (64) and for GGUF (32) stand side by side. resume: a run that does not exist cannot go on;
    then the first run's folder is returned, whose plan says what is different.
    """
    first = WeightPaths(calib_dir)
    if group_size is None:
        return first
    other, noted = WeightPaths(calib_dir, group_size), group_size_of(first)
    if resume and not other.root.exists():
        return first
    return other if noted not in (None, group_size) or (noted is None and other.root.exists()) else first


def group_size_of(paths: WeightPaths) -> int | None:
    """Return the size of the groups of the run in a folder, from its plan or its metadata; None where there is none."""
    for path in (paths.plan, paths.metadata):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # the stages say what is damaged
            return int(orjson.loads(path.read_bytes())["group_size"])
    return None
