"""The cached samples that units are trained on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from calibration_store.block_cache import block_keys, check_cached_sample, read_cached_block, stored_shapes
from calibration_store.layout import BlockCachePaths
from w4a8.memory import device_memory

HELD_OUT = 0.1  # of the images: never trained on, they judge


class TrainingSamples(Protocol):
    """What a unit is trained on: indices of samples, and batches of them in float32."""

    training: Sequence[int]
    held_out: Sequence[int]

    def batch(self, indices: Sequence[int]) -> list[mx.array]:
        """Inputs, modulation input and outputs of these samples, rows one below the other."""


SAMPLES_SHARE = 0.25  # of the device's memory that samples may take; more stay in their files, mapped


class Samples:
    """The cached samples of a stretch of blocks, float16: in memory (the GPU's, where there is one), or mapped when they are many."""

    def __init__(self, calib_dir: Path, cache: Mapping[str, Any], blocks: Sequence[str]):
        """cache: the block cache's metadata; inputs are those of the first block, outputs those of the last."""
        self.image_ids: list[int] = []
        mapped: list[list[np.ndarray]] = []
        for cached in read_cached_block(calib_dir, blocks[0], blocks[-1], cache):
            mapped.append([*cached.inputs, cached.modulation_input, *cached.outputs])
            self.image_ids.append(cached.image_id)
        self.num_bytes = sum(member.nbytes for members in mapped for member in members)
        self._mapped, self._arrays = mapped, []
        if self.num_bytes <= SAMPLES_SHARE * device_memory():
            on_gpu = mx.default_device() != mx.Device(mx.cpu)
            self._arrays = [np.stack(members) for members in zip(*mapped, strict=True)]
            self._arrays = [mx.array(array) for array in self._arrays] if on_gpu else self._arrays
            self._mapped = []
        self.training, self.held_out = split_samples(self.image_ids)

    @property
    def held_bytes(self) -> int:
        """What they take of the memory that MLX does not count."""
        return sum(array.nbytes for array in self._arrays if isinstance(array, np.ndarray))

    def batch(self, indices: Sequence[int]) -> list[mx.array]:
        """As TrainingSamples.batch."""
        if self._mapped:
            chosen = zip(*[self._mapped[index] for index in indices], strict=True)
            return [mx.array(np.concatenate(members)).astype(mx.float32) for members in chosen]
        if isinstance(self._arrays[0], mx.array):
            indices = mx.array(indices)
        picked = (array[indices] for array in self._arrays)
        return [mx.array(array.reshape(-1, *array.shape[2:])).astype(mx.float32) for array in picked]


def verified(calib_dir: Path, cache: Mapping[str, Any], stretches: Iterable[Sequence[str]]) -> Iterator[None]:
    """Check what will be trained on, checksums and every value, a sample at a time. Raises StoreError that names the file.

    stretches: blocks whose first inputs and last outputs are used. Once a run, before any work: later the data are
    mapped, and a flipped bit would be trained on.
    """
    root = BlockCachePaths(calib_dir).root
    keys = {key for blocks in stretches for part in block_keys(cache, blocks[0], blocks[-1]) for key in part}
    shapes = {key: shape for key, shape in stored_shapes(cache).items() if key in keys or key == "modulation_input"}
    for sample in cache["samples"]:
        check_cached_sample(root / sample["file"], sample["image_id"], sample["step_index"], shapes, checked=True)
        yield


def split_samples(image_ids: list[int]) -> tuple[list[int], list[int]]:
    """(training, held-out) sample indices: every tenth image judges; of a single image every tenth sample."""
    images = sorted(set(image_ids))
    judges = set(images[:: round(1 / HELD_OUT)]) if len(images) > 1 else set()
    held_out = [i for i, image in enumerate(image_ids) if image in judges] or list(range(0, len(image_ids), 10))
    return [i for i in range(len(image_ids)) if i not in set(held_out)] or held_out, held_out
