"""The rest of a model: what stays in 16 bits beside the codes, which the last phase of stage 3W trains, too.

It is adaLN, the norms' parameters and the final layer. Masters are float32; the loss sees them as they are deployed, and
their gradients pass that rounding straight through.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from calibration_store.choices import REST_KINDS, RestKind
from w4a8.backend.memory import device_memory
from w4a8.model.layers import model_blocks, model_layers
from w4a8.quantized.layer import deployed, deployed_grid
from w4a8.quantized.model import GROUPS_OF_THE_REST
from w4a8.rounding.settings import REST_BLOCKS, REST_INPUTS

EVERYTHING, VECTORS, NO_REST = REST_KINDS
FINAL_LAYER = "final_layer"
BYTES_PER_PARAMETER = 16  # master, two moments, slope
REST_SHARE = 0.25  # the share of the device's memory that these may take; above it adaLN's matrices stay
SMALLEST_SIZE = 0.01  # of a parameter, where its values are near 0
FLAT_STEP = 1.2e-38  # where all weights of a group are 0


class Place(NamedTuple):
    """A parameter: the module that owns it, and its key there."""

    owner: nn.Module
    key: str


def rest_places(mmdit: nn.Module, kind: RestKind) -> dict[str, dict[str, Place]]:
    """Return {block or "final_layer": {path of a parameter: its place}} of the rest of a model.

    kind: "all", or "vectors", which leaves the matrices of the blocks out, or "none".
    """
    quantized = {id(layer.module) for layer in model_layers(mmdit).values()}
    prefixes = {f"{block.attribute}.{block.index}.": name for name, block in model_blocks(mmdit).items()}
    found: dict[str, dict[str, Place]] = {name: {} for name in (*model_blocks(mmdit), FINAL_LAYER)}
    for path, module in mmdit.named_modules() if kind != NO_REST else ():
        owner = next((name for prefix, name in prefixes.items() if f"{path}.".startswith(prefix)), None)
        if path == FINAL_LAYER or path.startswith(f"{FINAL_LAYER}."):
            owner = FINAL_LAYER
        if owner is None or id(module) in quantized:
            continue
        for key, array in module.items():
            plain = isinstance(array, mx.array) and not key.startswith("_")
            if plain and (kind == EVERYTHING or owner == FINAL_LAYER or array.ndim == 1):
                found[owner][f"{path}.{key}"] = Place(module, key)
    return {owner: dict(sorted(places.items())) for owner, places in found.items()}


def choose_rest(mmdit: nn.Module, wanted: bool, before: Mapping[str, Any] | None) -> RestKind:
    """Return which rest is trained: what an earlier run of this folder noted (before), or by memory all, or vectors.

    wanted: the value of --tune-rest.
    """
    if not wanted or (before is not None and "rest" not in before):
        return NO_REST
    if before is not None:
        return before["rest"]
    return EVERYTHING if bytes_of_rest(mmdit, EVERYTHING) <= REST_SHARE * device_memory() else VECTORS


def bytes_of_rest(mmdit: nn.Module, kind: RestKind) -> int:
    """Return the number of bytes that the training of the rest holds."""
    places = [place for group in rest_places(mmdit, kind).values() for place in group.values()]
    return BYTES_PER_PARAMETER * sum(owner[key].size for owner, key in places)


def untrained_matrices(mmdit: nn.Module, kind: RestKind) -> list[Place]:
    """Return the matrices of the blocks that are neither quantized nor trained, such as adaLN's where vectors are."""
    trained, every = rest_places(mmdit, kind), rest_places(mmdit, EVERYTHING)
    return [
        place
        for owner, places in every.items()
        for path, place in places.items()
        if owner != FINAL_LAYER and path not in trained[owner] and place.owner[place.key].ndim == 2
    ]


def narrow_untrained(mmdit: nn.Module, kind: RestKind, half: mx.Dtype) -> nn.Module:
    """Return the model with its `untrained_matrices` in 16 bits, as they are deployed; products with them stay float32."""
    for place in untrained_matrices(mmdit, kind):
        place.owner[place.key] = place.owner[place.key].astype(half)
    return mmdit


@contextlib.contextmanager
def placed(places: Mapping[str, Place], arrays: Mapping[str, mx.array]) -> Iterator[None]:
    """Put arrays in the places of their paths until the block ends."""
    before = {path: places[path].owner[places[path].key] for path in arrays}
    try:
        for path, array in arrays.items():
            places[path].owner[places[path].key] = array
        yield
    finally:
        for path, array in before.items():
            places[path].owner[places[path].key] = array


def deployed_rest(path: str, master: mx.array, half: mx.Dtype, bits: int) -> mx.array:
    """Return a parameter as it is deployed, float32, with gradients as if it were the master.

    half: the model's 16-bit precision. bits: 16, or 8 where stage 5 rounds adaLN's matrices to nearest
    (`--rest-bits 8`).
    """
    value = master.astype(half).astype(mx.float16).astype(mx.float32)
    if bits == 8 and "adaLN" in path and master.ndim == 2:
        value = nearest_dense(value, 8, GROUPS_OF_THE_REST)
    return master + mx.stop_gradient(value - master)


def nearest_dense(weight: mx.array, bits: int, group_size: int) -> mx.array:
    """Return a weight (out, in) rounded to nearest as `QuantizedLayer.nearest` rounds, on a min-max grid; groups of 0: rows."""
    largest = 2.0**bits - 1
    grouped = weight.reshape(len(weight), -1, group_size or weight.shape[1])
    low, high = mx.minimum(grouped.min(axis=-1), 0), mx.maximum(grouped.max(axis=-1), 0)
    scale = mx.maximum((high - low) / largest, FLAT_STEP)
    scale, zero_point = deployed_grid(scale, mx.round(-low / scale))
    codes = mx.clip(mx.round(grouped / scale[..., None] + zero_point[..., None]), 0, largest)
    scale, minimum = deployed(scale, zero_point)
    return (codes * scale[..., None] + minimum[..., None]).reshape(weight.shape)


def size_of(array: mx.array, blocks: int) -> float:
    """Return what a parameter's learning rate is relative to: the root of its mean square, less for wide and deep models.

    Adam moves all inputs of a matrix at once, so that its output moves with the root of their number (Yang et al. 2022),
    and the blocks' movements add up.
    """
    share = min(1.0, (REST_BLOCKS / blocks) ** 0.5)
    share *= min(1.0, (REST_INPUTS / array.shape[1]) ** 0.5) if array.ndim == 2 else 1.0
    return share * max(float(mx.sqrt(mx.mean(mx.square(array)))), SMALLEST_SIZE)
