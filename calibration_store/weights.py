"""Learned rounding (3W): codes, grids and ranges of every layer, losses, and the checkpoint of the unit under way."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
from msgspec import Meta

from calibration_store.errors import StoreError
from calibration_store.files import write_json
from calibration_store.layout import WeightPaths
from calibration_store.names import BlockName, LayerName, block_of, is_post_gelu, layer_key, split_key
from calibration_store.npz import read_npz, write_npz
from calibration_store.schema import (
    FINITE,
    POSITIVE,
    Count,
    Digest,
    Index,
    JsonFormat,
    Member,
    Name,
    NotNegative,
    Record,
    Share,
    below,
    distinct,
)

WEIGHTS_FORMAT = "adaround_weights_v1"
OPTIMIZE = "optimize_adaround.py"
Bits = Annotated[int, Meta(ge=2, le=8)]


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
    micro_batch: Count  # samples whose gradients were made at once; older files have none
    window: Index  # samples that an iteration drew from; 0, and in older files: all
    activation_rule: Literal["token", "static"]  # older files have static ones, the same at every step
    range_sigmas: list[NotNegative]  # noise levels of `act_scales`, the cached steps
    schedule: list[NotNegative]  # noise levels of the calibration run's steps
    block_inputs: Literal["original", "mixed"]
    end_to_end: Index  # iterations of the last phase
    layer_bits: dict[LayerName, Bits]  # of layers whose codes are not of weight_bits
    excluded: list[LayerName]  # layers that stay as they are
    average_bits: float | None
    bit_choices: list[Bits] | None
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
    curve: Annotated[
        list[float], Meta(max_length=256)
    ]  # mean training loss of stretches of iterations; not in older files


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
    end_to_end_losses: BlockLosses


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
            "act_scales": Member(("float32",), ("steps",), (FINITE, POSITIVE), optional=True),
            "act_shift": Member(("float32",), ("in",), (FINITE,), optional=True),
            "scale_before": Member(("float32",), ("out", "groups"), (FINITE, POSITIVE), optional=True),
            "zero_point_before": Member(("float32",), ("out", "groups"), (FINITE,), optional=True),
            "bias_before": Member(("float32",), ("out",), (FINITE,), optional=True),
            "act_scale_before": Member(("float32",), (), (FINITE, POSITIVE), optional=True),
            "act_scales_before": Member(("float32",), ("steps",), (FINITE, POSITIVE), optional=True),
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
    path, bits = paths.block(block), plan.get("layer_bits", {})
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, array in read_npz(path, remedy).items():
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
    return layers


def write_quantized_block(paths: WeightPaths, block: str, layers: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write one block's layers, {layer: {field: array}}: what `read_quantized_block` reads."""
    fields = {layer_key(name, field): array for name, found in layers.items() for field, array in found.items()}
    write_npz(paths.block(block), fields)


def write_losses(path: Path, unit: str, stages: Sequence[Mapping[str, Any]]) -> None:
    """Write the losses of a unit, a stage of it at a time; path: of a block that was trained in it."""
    write_json(path, {"format": LOSSES.name, "unit": unit, "stages": stages})


def write_weights_metadata(paths: WeightPaths, plan: Mapping[str, Any]) -> dict[str, BlockLosses]:
    """Write metadata.json, last; returns every block's losses, and those of the last phase by the name of its unit."""

    def read(path: Path) -> dict[str, Any]:
        found = LOSSES.read(path)
        return {"unit": found["unit"], "stages": found["stages"]}

    losses = {block: read(paths.losses(block)) for block in plan["block_names"]}
    last = {"end_to_end_losses": read(paths.end_to_end_losses)} if plan.get("end_to_end") else {}
    write_json(paths.metadata, {**plan, "format": WEIGHTS_FORMAT, "losses": losses, **last})
    return losses | {each["unit"]: each for each in last.values()}


def _groups_fit(fields: Mapping[str, np.ndarray], group_size: int) -> bool:
    width = fields["q"].shape[1]
    return fields["scale"].shape[1] * (group_size or width) == width
