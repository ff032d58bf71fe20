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
from w4a8.backend.blas import cores
from w4a8.backend.memory import device_memory
from w4a8.backend.parallel import on_every_core
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.model.diffusionkit import MMDiTConfig
from w4a8.passes import SampleId, sample_ids_of
from w4a8.rounding.near_samples import NearSamples
from w4a8.rounding.settings import Indices

HELD_OUT, MOST_HELD_OUT = 0.1, 32  # share and largest number of the images that are never trained on: they judge

Reader = Callable[[SampleId], list[np.ndarray]]  # gives the arrays of a sample


class SampleBatch(NamedTuple):
    """Rows of some samples, one below the other, float32: the inputs of a stretch of blocks, and its outputs."""

    tokens: list[mx.array]  # image and text; for FLUX's unified blocks one array of both
    modulation: mx.array
    outputs: list[mx.array]  # none where the unit computes them anew


class TrainingSamples(Protocol):
    """The samples that a unit is trained on: indices of samples, and batches of them in float32."""

    @property
    def training(self) -> Sequence[int]:
        """The indices of the samples that are trained on."""

    @property
    def held_out(self) -> Sequence[int]:
        """The indices of the samples that judge."""

    @property
    def all_steps(self) -> Sequence[int]:
        """The positions of all cached steps in key_timesteps."""

    @property
    def holds_velocity(self) -> bool:
        """True where the output is the model's velocity, not the last block's tokens."""

    @property
    def held_bytes(self) -> int:
        """The bytes that they take of the memory that MLX does not count."""

    def steps(self, indices: Indices) -> np.ndarray:
        """Return the step of each of these samples, as a position in key_timesteps: (samples,) integers."""

    def batch(self, indices: Indices) -> SampleBatch:
        """Return inputs, modulation input and outputs of these samples."""

    def keep(self, indices: Indices) -> bool:
        """Begin to bring these samples, which are drawn from next, into memory in this order, and let all others go.

        Return whether threads are at work on it.
        """


# Share of the device's memory that samples may take, and bytes in all; more samples stay in their files.
SAMPLES_SHARE, MOST_SAMPLES = 0.25, 4e9
WORTH_THREADS = 2**23  # bytes of arrays that are read on every core


def fit_in_memory(num_bytes: int) -> bool:
    """Return whether samples of this number of bytes are all held in memory."""
    return num_bytes <= min(SAMPLES_SHARE * device_memory(), MOST_SAMPLES)


class Samples:
    """Cached samples as their files have them.

    They are in memory (the GPU's, where there is one), or read from their files at every use when they do not fit.
    `load`, `of_stretch` and `of_ends` read; the constructor stores.
    """

    def __init__(
        self, sample_ids: Sequence[SampleId], read: Reader, key_timesteps: Sequence[int], inputs: int, num_bytes: int,
        arrays: Sequence[np.ndarray] | Sequence[mx.array] = (), holds_velocity: bool = False,
    ):  # fmt: skip
        """Store how samples are read: their arrays are the inputs, the modulation input, and the outputs.

        inputs: the number of input arrays; num_bytes: of all samples; arrays: those of all samples, (samples, …) each,
        where they are held in memory; holds_velocity: as in TrainingSamples.
        """
        self.sample_ids, self.num_bytes, self.holds_velocity = sample_ids, num_bytes, holds_velocity
        self._read, self._inputs, self._arrays = read, inputs, arrays
        self._steps = np.array([list(key_timesteps).index(step) for _, step in sample_ids])
        self.all_steps = range(len(key_timesteps))
        self._near = NearSamples(self._brought, threads=cores())  # mapped pages come one by one
        self.training, self.held_out = split_samples([image_id for image_id, _ in sample_ids])

    @classmethod
    def load(
        cls, sample_ids: Sequence[SampleId], read: Reader, key_timesteps: Sequence[int], inputs: int = 2,
        holds_velocity: bool = False,
    ) -> "Samples":  # fmt: skip
        """Return these samples, read into memory if all of them fit.

        read: gives a sample's arrays, whose first `inputs` are its inputs; it leaves no file open, since an operating
        system allows a few hundred. Raises StoreError as `read` does.
        """
        first = read(sample_ids[0])
        num_bytes = len(sample_ids) * sum(member.nbytes for member in first)
        arrays: list[np.ndarray] | list[mx.array] = []
        if fit_in_memory(num_bytes):
            arrays = filled = [np.empty((len(sample_ids), *member.shape), member.dtype) for member in first]
            for index, sample_id in enumerate(sample_ids):
                for array, member in zip(filled, read(sample_id), strict=True):
                    array[index] = member
            if mx.default_device() != mx.Device(mx.cpu):
                arrays = [mx.array(array) for array in filled]
        return cls(sample_ids, read, key_timesteps, inputs, num_bytes, arrays, holds_velocity)

    @classmethod
    def of_cache(cls, calib_dir: Path, cache: Mapping[str, Any], mmdit: nn.Module, blocks: Sequence[str]) -> "Samples":
        """Load what a cache holds of these blocks: the ends of the whole model, or the stretch's inputs and outputs."""
        return cls.of_ends(calib_dir, cache, mmdit) if holds_ends(cache) else cls.of_stretch(calib_dir, cache, blocks)

    @classmethod
    def of_stretch(cls, calib_dir: Path, cache: Mapping[str, Any], blocks: Sequence[str]) -> "Samples":
        """Load from a cache of all boundaries the inputs of the first of these blocks, and the outputs of the last."""
        inputs, outputs = block_keys(cache, blocks[0], blocks[-1])
        read = cache_reader(calib_dir, cache, [*inputs, "modulation_input", *outputs])
        return cls.load(sample_ids_of(cache), read, cache["key_timesteps"], len(inputs))

    @classmethod
    def of_ends(cls, calib_dir: Path, cache: Mapping[str, Any], mmdit: nn.Module) -> "Samples":
        """Load from a cache of the ends the whole model's inputs, and its velocity, a patch a token."""
        inputs, _ = block_keys(cache, cache["block_names"][0])
        read = cache_reader(calib_dir, cache, [*inputs, "modulation_input", VELOCITY])

        def patched(sample_id: SampleId) -> list[np.ndarray]:
            *found, velocity = read(sample_id)
            return [*found, patches(velocity, mmdit.config)]

        return cls.load(sample_ids_of(cache), patched, cache["key_timesteps"], len(inputs), holds_velocity=True)

    @property
    def held_bytes(self) -> int:
        """The bytes that they take of the memory that MLX does not count."""
        return sum(array.nbytes for array in self._arrays if isinstance(array, np.ndarray))

    def steps(self, indices: Indices) -> np.ndarray:
        """Return steps as TrainingSamples.steps says."""
        return self._steps[np.asarray(indices)]

    def batch(self, indices: Indices) -> SampleBatch:
        """Return a batch as TrainingSamples.batch says."""
        if self._arrays:
            found = [rows.astype(mx.float32) for rows in self._picked(np.asarray(indices))]
        else:
            members = zip(*self._near.arrays(indices), strict=True)
            found = [mx.concatenate(list(each)).astype(mx.float32) for each in members]
        *tokens, modulation = found[: self._inputs + 1]
        return SampleBatch(tokens, modulation, found[self._inputs + 1 :])

    def keep(self, indices: Indices) -> bool:
        """Keep samples as TrainingSamples.keep says."""
        return not self._arrays and self._near.keep(indices)

    def _brought(self, index: int) -> list[mx.array]:
        # NumPy reads the mapped pages, because it lets other threads run meanwhile.
        return [mx.array(np.array(member)) for member in self._read(self.sample_ids[index])]

    def _picked(self, indices: np.ndarray) -> list[mx.array]:
        """Return rows of the arrays in memory, one sample below the other."""
        on_device = mx.array(indices)
        picked = (array[on_device if isinstance(array, mx.array) else indices] for array in self._arrays)
        return [mx.array(array.reshape(-1, *array.shape[2:])) for array in picked]


def stacked(read: Reader, sample_ids: Sequence[SampleId]) -> list[np.ndarray]:
    """Return the arrays of some samples, rows one below the other.

    Many bytes are read on every core, since mapped pages come one by one; a few are read sooner than threads start.
    """
    arrays = [np.empty((len(sample_ids), *member.shape), member.dtype) for member in read(sample_ids[0])]
    every = on_every_core if sum(array.nbytes for array in arrays) > WORTH_THREADS else map

    def copy(at: int) -> None:
        for array, member in zip(arrays, read(sample_ids[at]), strict=True):
            array[at] = member

    for _ in every(copy, range(len(sample_ids))):
        pass
    return [array.reshape(-1, *array.shape[2:]) for array in arrays]


def reader(
    paths: BlockCachePaths | BoundaryPaths,
    shapes: Mapping[str, Sequence[int]],
    remedy: str = CACHE_REMEDY,
    dtype: str = "float16",
) -> Reader:
    """Return a function that gives the arrays of these shapes of a sample, mapped.

    The function raises StoreError that names a missing or damaged file, and the remedy.
    """

    def read(sample_id: SampleId) -> list[np.ndarray]:
        arrays = check_cached_sample(paths.sample(*sample_id), *sample_id, shapes, False, None, remedy, dtype)
        return [arrays[key] for key in shapes]

    return read


def cache_reader(calib_dir: Path, cache: Mapping[str, Any], keys: Sequence[str]) -> Reader:
    """Return the `reader` of these arrays of a block cache. Raises StoreError when the cache does not hold them."""
    paths, stored = BlockCachePaths(calib_dir), stored_shapes(cache)
    missing = [key for key in keys if key not in stored]
    if missing:
        raise StoreError(
            f"{paths.metadata}: has no {missing[0]}; run cache_adaround_data.py --boundaries all --force for it"
        )
    return reader(paths, {key: stored[key] for key in keys})


def patches(velocity: np.ndarray, config: MMDiTConfig) -> np.ndarray:
    """Cut a velocity (R, h, w, channels) into the final layer's patches, (R, tokens, 1, size²·channels)."""
    size, (rows, height, width, channels) = config.patch_size, velocity.shape
    order = (0, 1, 3, 5, 2, 4) if config.patchify_via_reshape else (0, 1, 3, 2, 4, 5)  # FLUX: channels before pixels
    split = velocity.reshape(rows, height // size, size, width // size, size, channels).transpose(order)
    return split.reshape(rows, -1, 1, size * size * channels)


def verified(
    calib_dir: Path, cache: Mapping[str, Any], stretches: Iterable[Sequence[str]], ranks: SingleProcess = SINGLE_PROCESS
) -> Iterator[None]:
    """Check the data that will be trained on, checksums and every value; yield after each sample.

    stretches: blocks whose first inputs and last outputs are used. This is done once a run, before any work: later the
    data are mapped, and a flipped bit would be trained on. Every rank checks its own share. Raises StoreError that
    names the damaged file.
    """
    root, shapes = BlockCachePaths(calib_dir).root, stored_shapes(cache)
    if not holds_ends(cache):
        keys = {key for blocks in stretches for part in block_keys(cache, blocks[0], blocks[-1]) for key in part}
        shapes = {key: shape for key, shape in shapes.items() if key in keys or key == "modulation_input"}

    def check(number: int) -> None:
        sample = cache["samples"][number]
        path, run = root / sample["file"], cache.get("calibration_run")
        check_cached_sample(path, sample["image_id"], sample["step_index"], shapes, checked=True, run=run)

    yield from on_every_core(check, ranks.owned_indices(len(cache["samples"])))


def split_samples(image_ids: list[int]) -> tuple[list[int], list[int]]:
    """Return (training, held-out) sample indices.

    Every tenth image is held out, 32 at most; where there is a single image, every tenth sample.
    """
    images = sorted(set(image_ids))
    stride = max(round(1 / HELD_OUT), -(-len(images) // MOST_HELD_OUT))
    judges = set(images[::stride]) if len(images) > 1 else set()
    held_out = [i for i, image in enumerate(image_ids) if image in judges] or list(range(0, len(image_ids), 10))
    judging = set(held_out)
    return [i for i in range(len(image_ids)) if i not in judging] or held_out, held_out


def spread_over(indices: Sequence[int], count: int) -> Sequence[int]:
    """Return at most `count` of the indices, the same at every call.

    They are drawn at random, so that no step of the schedule is passed over.
    """
    if len(indices) <= count:
        return indices
    chosen = np.random.default_rng(len(indices)).choice(len(indices), count, replace=False)
    return [indices[position] for position in np.sort(chosen)]
