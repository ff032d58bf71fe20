"""Statistics of single passes (2A), from which --resume goes on."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, TypedDict

import numpy as np

from calibration_store.errors import StoreError
from calibration_store.histograms import histogram_grid
from calibration_store.layout import ActivationPaths
from calibration_store.names import LAYER
from calibration_store.npz import read_npz, write_npz
from calibration_store.schema import (
    CALIBRATION_RUN,
    FINITE,
    NOT_NEGATIVE,
    OF_RUN,
    POSITIVE,
    TEXT_DTYPES,
    Digest,
    Images,
    Index,
    JsonFormat,
    Member,
    Name,
    Record,
    Relation,
    Rule,
    Steps,
    distinct,
    of_run,
    run_fault,
)

PARTIAL_FORMAT = "activation_partials_v2"


class _Collection(TypedDict):
    format: Literal["activation_partials_v2"]
    calibration_run: Digest
    num_images: Images
    stride: Steps
    selected_image_ids: list[Index]
    key_timesteps: list[Index]


class Collection(_Collection, total=False):
    """Describe a run of stage 2A while it is under way: collection.json."""

    w4a8_version: Name


COLLECT = "collect_layer_activations.py"
COLLECTION = JsonFormat(
    PARTIAL_FORMAT, Collection, COLLECT, lambda plan: distinct(plan["selected_image_ids"], "selected_image_ids: image")
)
GRID = 256  # bins of a histogram; its row also has the grid's exponent, its first bin, and the values not finite
LAYERS = Rule(
    "is not a list of distinct layers",
    lambda a: len(set(a.tolist())) == a.size and all(LAYER.fullmatch(str(name)) for name in a),
    lambda a: np.array([a[0]] * a.size),
)


def _fits(limits: np.ndarray, channels: np.ndarray) -> bool:
    return limits.shape[1] == channels.sum(dtype=np.int64)


def _histograms_hold(histograms: np.ndarray, limits: np.ndarray, channels: np.ndarray) -> bool:
    """Return whether each histogram lies on its limits' grid, and counts the same number of values per channel."""
    for row, part in zip(histograms.tolist(), _parts(channels), strict=True):
        low, high = float(limits[0, part].min()), float(limits[1, part].max())
        total = sum(row[:GRID])
        if (
            tuple(row[GRID : GRID + 2]) != histogram_grid(low, high)
            or row[GRID + 2]
            or total % (part.stop - part.start)
        ):
            return False
        filled = [index for index, count in enumerate(row[:GRID]) if count]
        width = 2.0 ** row[GRID]
        if not filled or row[GRID + 1] + filled[0] != int(np.floor(low / width)):
            return False
        if row[GRID + 1] + filled[-1] != int(np.floor(high / width)):
            return False
    return True


def _parts(channels: np.ndarray) -> list[slice]:
    """Return the slice of each input's channels among the channels of all inputs."""
    ends = np.cumsum(channels, dtype=np.int64).tolist()
    return [slice(start, end) for start, end in pairwise([0, *ends])]


def _moments_hold(moments: np.ndarray, limits: np.ndarray) -> bool:
    return _moments_within(moments[0], moments[1], limits[0], limits[1])


def _moments_within(mean: np.ndarray, mean_square: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool:
    """Return whether means lie between the extremes, and mean squares between the squares of mean and extremes."""
    reach = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
    slack = 1e-3 * reach + 1e-30
    square = mean_square.astype(np.float64)
    inside = (mean >= low - slack) & (mean <= high + slack) & (square <= (reach + slack) ** 2)
    return bool((inside & (square >= mean.astype(np.float64) ** 2 - slack * (reach + slack))).all())


PARTIAL = Record(
    {
        "image_id": Member(("int32",), ()),
        "step_index": Member(("int32",), ()),
        CALIBRATION_RUN: OF_RUN,
        "layers": Member(TEXT_DTYPES, ("layers",), (LAYERS,)),
        "inputs": Member(("int32",), ("layers",), (NOT_NEGATIVE,)),
        "channels": Member(("int32",), ("inputs",), (POSITIVE,)),
        "limits": Member(("float32",), (2, "channels"), (FINITE,)),
        "moments": Member(("float32",), (2, "channels"), (FINITE,)),
        "histograms": Member(("int32",), ("inputs", GRID + 3)),
    },
    (
        Relation(
            "limits are not of the inputs' channels", ("limits", "channels"), _fits,
            lambda limits, channels: {"channels": channels + np.int32(1)},
        ),
        Relation(
            "inputs are not those of channels", ("inputs", "channels"),
            lambda inputs, channels: sorted(set(inputs.tolist())) == list(range(channels.size)),
            lambda inputs, channels: {"inputs": inputs * np.int32(2)},
        ),
        Relation(
            "minima are above maxima", ("limits",), lambda limits: bool((limits[0] <= limits[1]).all()),
            lambda limits: {"limits": limits[::-1] + np.array([[1], [0]], np.float32)},
        ),
        Relation(
            "moments lie outside the limits", ("moments", "limits"), _moments_hold,
            lambda moments, limits: {"moments": moments * np.float32(4) + np.float32(1)},
        ),
        Relation(
            "histograms do not fit the limits", ("histograms", "limits", "channels"), _histograms_hold,
            lambda histograms, limits, channels: {"histograms": histograms + np.int32(1)},
        ),
    ),
)  # fmt: skip


def write_partial(paths: ActivationPaths, arrays: Mapping[str, np.ndarray], run: str) -> None:
    """Write one pass's statistics (arrays: PARTIAL). run: `image_identity` of its image. Raises WriteError."""
    write_npz(paths.partial(int(arrays["image_id"]), int(arrays["step_index"])), {**arrays, **of_run(run)})


def read_partial(paths: ActivationPaths, run: str, image_id: int, step_index: int) -> dict[str, np.ndarray]:
    """Read the statistics of one pass (arrays: PARTIAL). Raises StoreError that names the file."""
    path = paths.partial(image_id, step_index)
    remedy = f"run {COLLECT} with --resume to make it anew"
    arrays = read_npz(path, remedy, PARTIAL.names)
    fault = PARTIAL.fault(arrays) or run_fault(arrays, run)
    if fault:
        raise StoreError(f"{path}: not a partial result ({fault}); {remedy}")
    if (int(arrays["image_id"]), int(arrays["step_index"])) != (image_id, step_index):
        raise StoreError(f"{path}: of image {arrays['image_id']}, step {arrays['step_index']}; {remedy}")
    return arrays


def is_partial_complete(
    paths: ActivationPaths, run: str, image_id: int, step_index: int, channels_of: Mapping[str, int]
) -> bool:
    """Return whether the statistics of one pass are on the disk, valid, and of this run and model.

    channels_of: {layer: number of channels of its input}.
    """
    try:
        arrays = read_partial(paths, run, image_id, step_index)
    except StoreError:
        return False
    found = {str(name): int(arrays["channels"][i]) for name, i in zip(arrays["layers"], arrays["inputs"], strict=True)}
    return found == dict(channels_of)
