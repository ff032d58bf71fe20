"""The cached samples that units are trained on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from calibration_store.block_cache import block_keys, check_cached_sample, read_cached_block, stored_shapes
from calibration_store.layout import BlockCachePaths

HELD_OUT = 0.1  # of the images: never trained on, they judge


class TrainingSamples(Protocol):
    """What a unit is trained on: indices of samples, and batches of them in float32."""

    training: Sequence[int]
    held_out: Sequence[int]

    def batch(self, indices: Sequence[int]) -> list[mx.array]:
        """Inputs, modulation input and outputs of these samples, rows one below the other."""


class Samples:
    """The cached samples of a stretch of blocks, float16 in memory (the GPU's, where there is one)."""

    def __init__(self, calib_dir: Path, cache: Mapping[str, Any], blocks: Sequence[str]):
        """cache: the block cache's metadata; inputs are those of the first block, outputs those of the last."""
        count = len(cache["samples"])
        image_ids: list[int] = []
        arrays: list[Any] = []
        for position, cached in enumerate(read_cached_block(calib_dir, blocks[0], blocks[-1], cache)):
            members = [*cached.inputs, cached.modulation_input, *cached.outputs]
            if not arrays:
                arrays = [np.empty((count, *member.shape), np.float16) for member in members]
            for array, member in zip(arrays, members, strict=True):
                array[position] = member
            image_ids.append(cached.image_id)
        if mx.default_device() != mx.Device(mx.cpu):  # copied once: a batch of SD3-Medium's samples is 0.2 GB
            arrays = [mx.array(array) for array in arrays]
        self.image_ids, self._arrays = image_ids, arrays
        self.training, self.held_out = split_samples(image_ids)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    def batch(self, indices: Sequence[int]) -> list[mx.array]:
        """As TrainingSamples.batch."""
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
