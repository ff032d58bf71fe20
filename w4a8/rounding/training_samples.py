"""The cached samples that units are trained on."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.block_cache import (
    CACHE_REMEDY,
    VELOCITY,
    block_keys,
    check_cached_sample,
    holds_ends,
    stored_shapes,
)
from calibration_store.errors import StoreError
from calibration_store.layout import BlockCachePaths, BoundaryPaths
from w4a8.backend.memory import device_memory
from w4a8.backend.parallel import on_every_core
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.model.diffusionkit import MMDiTConfig
from w4a8.passes import SampleId, places_of

HELD_OUT, MOST_HELD_OUT = 0.1, 32  # share of the images, and how many at most: never trained on, they judge


class SampleBatch(NamedTuple):
    """Rows of some samples, one below the other, float32: what enters a stretch of blocks, and what it gives."""

    tokens: list[mx.array]  # image and text, of FLUX's unified blocks joined
    modulation: mx.array
    outputs: list[mx.array]


class TrainingSamples(Protocol):
    """What a unit is trained on: indices of samples, and batches of them in float32."""

    training: Sequence[int]
    held_out: Sequence[int]
    all_steps: Sequence[int]
    holds_velocity: bool  # whether the output is the model's velocity, not the last block's tokens

    def steps(self, indices: Sequence[int]) -> np.ndarray:
        """For each sample, which of the cached steps it is of: positions in key_timesteps."""

    def batch(self, indices: Sequence[int]) -> SampleBatch:
        """Inputs, modulation input and outputs of these samples.

        """

    def keep(self, indices: Sequence[int]) -> None:
        """Have these samples, which are drawn from next, in memory, and no others; called while a GPU computes."""


# Of the device's memory that samples may take, and in all; more stay in their files.
SAMPLES_SHARE, MOST_SAMPLES = 0.25, 4e9


def fit_in_memory(num_bytes: int) -> bool:
    """Whether samples of so many bytes are all held there."""
    return num_bytes <= min(SAMPLES_SHARE * device_memory(), MOST_SAMPLES)


class Samples:
    """Cached samples as their files have them: in memory (the GPU's, where there is one), or read from their files when they are many."""

    def __init__(
        self, places: Sequence[SampleId], read: Callable[[SampleId], list[np.ndarray]], key_timesteps: Sequence[int],
        inputs: int = 2,
    ):  # fmt: skip
        """read: a sample's arrays, inputs (so many) first, then modulation input and outputs.

        No file stays open: an operating system allows a few hundred.
        """
        self.places, self.holds_velocity = places, False
        self._steps, self.all_steps = (
            np.array([list(key_timesteps).index(step) for _, step in places]),
            range(len(key_timesteps)),
        )
        self._read = read
        self._inputs = inputs
        first = self._read(places[0])
        self.num_bytes = len(places) * sum(member.nbytes for member in first)
        self._arrays: list = []
        self._near: dict[int, list[mx.array]] = {}  # the few that are kept
        if fit_in_memory(self.num_bytes):
            self._arrays = [np.empty((len(places), *member.shape), member.dtype) for member in first]
            for index, place in enumerate(places):
                for array, member in zip(self._arrays, self._read(place), strict=True):
                    array[index] = member
            if mx.default_device() != mx.Device(mx.cpu):
                self._arrays = [mx.array(array) for array in self._arrays]
        self.training, self.held_out = split_samples([image_id for image_id, _ in places])

    @classmethod
    def of_stretch(cls, calib_dir: Path, cache: Mapping[str, Any], blocks: Sequence[str]) -> "Samples":
        """What a cache of all boundaries says of a stretch of blocks: what enters the first, what the last gives."""
        inputs, outputs = block_keys(cache, blocks[0], blocks[-1])
        read = cache_reader(calib_dir, cache, [*inputs, "modulation_input", *outputs])
        return cls(places_of(cache), read, cache["key_timesteps"], inputs=len(inputs))

    @classmethod
    def of_ends(cls, calib_dir: Path, cache: Mapping[str, Any], mmdit: nn.Module) -> "Samples":
        """What a cache of the ends says of the whole model; the output is its velocity, a patch a token."""
        inputs, _ = block_keys(cache, cache["block_names"][0])
        read = cache_reader(calib_dir, cache, [*inputs, "modulation_input", VELOCITY])

        def patched(place: SampleId) -> list[np.ndarray]:
            *found, velocity = read(place)
            return [*found, patches(velocity, mmdit.config)]

        samples = cls(places_of(cache), patched, cache["key_timesteps"], inputs=len(inputs))
        samples.holds_velocity = True
        return samples

    @property
    def held_bytes(self) -> int:
        """What they take of the memory that MLX does not count."""
        return sum(array.nbytes for array in self._arrays if isinstance(array, np.ndarray))

    def steps(self, indices: Sequence[int]) -> np.ndarray:
        """As TrainingSamples.steps."""
        return self._steps[np.asarray(indices)]

    def batch(self, indices: Sequence[int]) -> SampleBatch:
        """As TrainingSamples.batch."""
        if self._arrays:
            picks = mx.array(indices) if isinstance(self._arrays[0], mx.array) else np.asarray(indices)
            picked = (array[picks] for array in self._arrays)
            found = [mx.array(array.reshape(-1, *array.shape[2:])).astype(mx.float32) for array in picked]
        else:
            if all(index in self._near for index in indices):
                rows = map(mx.concatenate, zip(*(self._near[index] for index in indices), strict=True))
            else:
                rows = map(mx.array, self._stacked(indices))
            found = [array.astype(mx.float32) for array in rows]
        *tokens, modulation = found[: self._inputs + 1]
        return SampleBatch(tokens, modulation, found[self._inputs + 1 :])

    def keep(self, indices: Sequence[int]) -> None:
        """As TrainingSamples.keep."""
        if self._arrays or not len(indices):
            return
        kept = {index: self._near.get(index) for index in indices}
        new = [index for index, arrays in kept.items() if arrays is None]
        if new:
            parts = [np.split(rows, len(new)) for rows in self._stacked(new)]
            kept |= {index: list(map(mx.array, arrays)) for index, *arrays in zip(new, *parts, strict=True)}
        self._near = kept

    def _stacked(self, indices: Sequence[int]) -> list[np.ndarray]:
        return stacked(self._read, [self.places[index] for index in indices])


def stacked(read: Callable[[SampleId], list[np.ndarray]], places: Sequence[SampleId]) -> list[np.ndarray]:
    """The arrays of some samples, rows one below the other; read on every core, since mapped pages come one by one."""
    arrays = [np.empty((len(places), *member.shape), member.dtype) for member in read(places[0])]

    def copy(at: int) -> None:
        for array, member in zip(arrays, read(places[at]), strict=True):
            array[at] = member

    for _ in on_every_core(copy, range(len(places))):
        pass
    return [array.reshape(-1, *array.shape[2:]) for array in arrays]


def reader(
    paths: BlockCachePaths | BoundaryPaths,
    shapes: Mapping[str, Sequence[int]],
    remedy: str = CACHE_REMEDY,
    dtype: str = "float16",
) -> Callable[[SampleId], list[np.ndarray]]:
    """(image_id, step_index) -> the arrays of these shapes of a sample, mapped. Raises StoreError that names a missing or damaged file."""

    def read(place: SampleId) -> list[np.ndarray]:
        arrays = check_cached_sample(paths.sample(*place), *place, shapes, False, None, remedy, dtype)
        return [arrays[key] for key in shapes]

    return read


def cache_reader(calib_dir: Path, cache: Mapping[str, Any], keys: Sequence[str]) -> Callable[[SampleId], list[np.ndarray]]:
    """`reader` of these arrays of a block cache. Raises StoreError when it does not hold them."""
    paths, stored = BlockCachePaths(calib_dir), stored_shapes(cache)
    missing = [key for key in keys if key not in stored]
    if missing:
        raise StoreError(
            f"{paths.metadata}: has no {missing[0]}; run cache_adaround_data.py --boundaries all --force for it"
        )
    return reader(paths, {key: stored[key] for key in keys})


def patches(velocity: np.ndarray, config: MMDiTConfig) -> np.ndarray:
    """(R, h, w, channels) -> (R, tokens, 1, size² · channels): as the final layer gives it, before it is put together."""
    size, (rows, height, width, channels) = config.patch_size, velocity.shape
    order = (0, 1, 3, 5, 2, 4) if config.patchify_via_reshape else (0, 1, 3, 2, 4, 5)  # FLUX: channels before pixels
    split = velocity.reshape(rows, height // size, size, width // size, size, channels).transpose(order)
    return split.reshape(rows, -1, 1, size * size * channels)


def verified(
    calib_dir: Path, cache: Mapping[str, Any], stretches: Iterable[Sequence[str]], ranks: SingleProcess = SINGLE_PROCESS
) -> Iterator[None]:
    """Check what will be trained on, checksums and every value, a sample at a time. Raises StoreError that names the file.

    stretches: blocks whose first inputs and last outputs are used. Once a run, before any work: later the data are
    mapped, and a flipped bit would be trained on. Every rank checks its own share.
    """
    root, shapes = BlockCachePaths(calib_dir).root, stored_shapes(cache)
    if not holds_ends(cache):
        keys = {key for blocks in stretches for part in block_keys(cache, blocks[0], blocks[-1]) for key in part}
        shapes = {key: shape for key, shape in shapes.items() if key in keys or key == "modulation_input"}
    for number in ranks.owned_indices(len(cache["samples"])):
        sample = cache["samples"][number]
        path, run = root / sample["file"], cache.get("calibration_run")
        check_cached_sample(path, sample["image_id"], sample["step_index"], shapes, checked=True, run=run)
        yield


def split_samples(image_ids: list[int]) -> tuple[list[int], list[int]]:
    """(training, held-out) sample indices: every tenth image judges, 32 at most; of a single image every tenth sample."""
    images = sorted(set(image_ids))
    stride = max(round(1 / HELD_OUT), -(-len(images) // MOST_HELD_OUT))
    judges = set(images[::stride]) if len(images) > 1 else set()
    held_out = [i for i, image in enumerate(image_ids) if image in judges] or list(range(0, len(image_ids), 10))
    judging = set(held_out)
    return [i for i in range(len(image_ids)) if i not in judging] or held_out, held_out


def spread_over(indices: Sequence[int], count: int) -> Sequence[int]:
    """At most `count` of the indices, the same at every call; drawn, so that no step of the schedule is passed over."""
    if len(indices) <= count:
        return indices
    chosen = np.random.default_rng(len(indices)).choice(len(indices), count, replace=False)
    return [indices[position] for position in np.sort(chosen)]
