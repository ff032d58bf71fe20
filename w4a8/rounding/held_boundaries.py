"""All samples' inputs of one block in memory; block after block they are replaced by its outputs.

The memory is the device's, if there is room, since a GPU waits for samples of the host's; else the host's beside a GPU, but
for the first samples, as many as the device has room for.
What a block gives is not kept: its unit computes its targets from the inputs (`Unit.targets`). No file is written, so a
run that was killed walks through the finished blocks anew, in a forward pass of 16-bit products.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.block_cache import block_keys, boundary_shapes
from calibration_store.errors import StoreError
from calibration_store.files import BackgroundWriter
from calibration_store.layout import WeightPaths
from w4a8.backend.memory import device_memory, memory_beside_gpu
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.backend.progress import progress_bar
from w4a8.model.layers import model_blocks
from w4a8.passes import SampleId, sample_ids_of
from w4a8.rounding.block_boundaries import remove_boundaries
from w4a8.rounding.near_samples import NearSamples
from w4a8.rounding.quantized_forward import OVERFLOW, original_forward
from w4a8.rounding.settings import Indices
from w4a8.rounding.training_samples import SampleBatch, cache_reader, split_samples

HELD_SHARE, HOST_SHARE = 0.3, 0.5  # shares of the device's memory, and of the host's, that the samples may take
DEVICE_SHARE = 0.85  # share of the device's memory that an iteration and samples may take together, below LIMIT_SHARE
IN_FILES, ON_DEVICE, ON_HOST = "files", "device", "host"  # where boundaries are kept
# Each sample has a list: the block's input tokens, then its modulation input, as arrays of MLX or NumPy.
SampleRows = list[list[Any]]


class HeldSamples:
    """A block's samples in memory, without its outputs (TrainingSamples)."""

    def __init__(self, sample_ids: Sequence[SampleId], key_timesteps: Sequence[int], rows: SampleRows):
        """Store each sample's rows, MLX arrays on the device or NumPy's on the host, and choose the samples that judge."""
        self.rows, self.holds_velocity = rows, False
        self.held_bytes = sum(array.nbytes for row in rows for array in row if isinstance(array, np.ndarray))
        # This function brings samples from the host. If it referred to self, the two would form a reference cycle, and all
        # samples would stay in memory until Python's collector runs.
        self._near = NearSamples(lambda index: list(map(mx.array, rows[index])))
        self._steps = np.array([list(key_timesteps).index(step) for _, step in sample_ids])
        self.all_steps = range(len(key_timesteps))
        self.training, self.held_out = split_samples([image_id for image_id, _ in sample_ids])

    def steps(self, indices: Indices) -> np.ndarray:
        """Return steps as TrainingSamples.steps says."""
        return self._steps[np.asarray(indices)]

    def batch(self, indices: Indices) -> SampleBatch:
        """Return a batch as TrainingSamples.batch says, but no outputs."""
        near = iter(self._near.arrays(self._of_host(indices)))
        # A GPU takes a sample's arrays one by one sooner than one large array.
        rows = [self.rows[index] if self._is_on_device(index) else next(near) for index in indices]
        *tokens, modulation = [mx.concatenate(list(each)).astype(mx.float32) for each in zip(*rows, strict=True)]
        return SampleBatch(tokens, modulation, [])

    def keep(self, indices: Indices) -> bool:
        """Keep samples as TrainingSamples.keep says; those on the device are there anyway."""
        return self._near.keep(self._of_host(indices))

    def _is_on_device(self, index: int) -> bool:
        return isinstance(self.rows[index][0], mx.array)

    def _of_host(self, indices: Indices) -> list[int]:
        return [index for index in indices if not self._is_on_device(index)]


class HeldBoundaries:
    """The walk of all samples through the blocks, in memory; it stands in for `BlockBoundaries`."""

    def __init__(
        self, cache: Mapping[str, Any], paths: WeightPaths, chunk: int, dtype: str, products: mx.Dtype, on_device: int,
        opened: Callable[[], nn.Module], ranks: SingleProcess = SINGLE_PROCESS,
    ):  # fmt: skip
        """Store where the ends lie, and how samples walk.

        cache: metadata of the block cache; chunk: the number of samples that are run at once; dtype: of tokens between
        blocks; products: the 16-bit dtype that blocks compute in; on_device: the number of samples in the device's memory,
        the others are in the host's; opened: gives a transformer, whose weights are dropped after a block; ranks: the
        processes, each of which holds all samples.
        """
        self._cache, self._paths, self._chunk, self._products = cache, paths, chunk, products
        self._dtype, self._on_device, self._opened, self._ranks = getattr(mx, dtype), on_device, opened, ranks
        self._blocks: list[str] = cache["block_names"]
        self._ids = sample_ids_of(cache)
        self._held: HeldSamples | None = None
        self._at = 0  # the index of the block whose inputs are held

    def memory_bytes(self) -> int:
        """Return the bytes of the device's memory that the samples take."""
        return held_bytes(self._cache, self._dtype) * self._on_device // len(self._ids)

    def num_bytes(self) -> int:
        """Return the number of bytes on the disk: none."""
        return 0

    def samples(self, mmdit: nn.Module, block: str) -> HeldSamples:
        """Return the samples that a block is trained on, walked up to it; mmdit: not used, since it is trained with."""
        index = self._blocks.index(block)
        if self._held is None or index < self._at:
            self._held, self._at = self._read(self._ids), 0
        while self._at < index:
            self._walk(self._opened(), self._blocks[self._at], self._held)
            self._at += 1
        return self._held

    def few(self, mmdit: nn.Module, count: int) -> HeldSamples:
        """Return some of the first block's samples, 2·count at most, for a trial run."""
        return self._read(self._ids[: 2 * count])

    def finish(self) -> None:
        """Let the samples go, and remove boundary files that an earlier process with less memory may have left."""
        self._held = None
        mx.clear_cache()
        if self._ranks.rank == 0:
            remove_boundaries(self._paths.boundaries)

    def _read(self, sample_ids: Sequence[SampleId]) -> HeldSamples:
        keys = [*block_keys(self._cache, self._blocks[0])[0], "modulation_input"]
        read, rows = cache_reader(self._paths.calib_dir, self._cache, keys), list[list[Any]]()
        with progress_bar(len(sample_ids), "reading the cache", "sample", leave=False) as bar:
            for number, sample_id in enumerate(sample_ids):
                own = mx.array if number < self._on_device else np.array
                rows.append([own(array) for array in read(sample_id)])
                bar.update()
        return HeldSamples(sample_ids, self._cache["key_timesteps"], rows)

    def _walk(self, mmdit: nn.Module, name: str, held: HeldSamples) -> None:
        """Replace the inputs of a block by what it gives. Raises StoreError where a token is not finite."""
        block, rows = model_blocks(mmdit)[name], held.rows
        parts = [range(begin, min(begin + self._chunk, len(rows))) for begin in range(0, len(rows), self._chunk)]
        forward = original_forward([block], self._products)
        with (
            forward.installed(mmdit, [block]),
            BackgroundWriter(pending=2, threads=2) as writer,  # brings tokens to the host while the next ones are made
            progress_bar(len(rows), f"{name} of every sample", "sample", leave=False) as bar,
        ):
            for part, following in zip(parts, [*parts[1:], range(0)], strict=True):
                tokens, modulation, _ = held.batch(part)
                given = [array.astype(self._dtype) for array in block.run(tokens, modulation)]
                finite = mx.stack([mx.isfinite(array).all() for array in given]).all()
                held.keep(following)
                mx.eval(given, finite)
                if not finite.item():
                    raise StoreError(f"{name}: {OVERFLOW}")
                of_device, of_host = (
                    [index for index in part if (index < self._on_device) is whose] for whose in (True, False)
                )
                replace_rows(rows, part, of_device, given)  # here, since another thread has none of MLX's streams
                if of_host:
                    writer.submit(replace_rows, rows, part, of_host, given, True)
                bar.update(len(part))
            writer.drain()
            held.keep(())  # the samples that it has near are of the block before


def held_bytes(cache: Mapping[str, Any], dtype: mx.Dtype) -> int:
    """Return the bytes of a block's inputs of all samples."""
    shapes, keys = boundary_shapes(cache), block_keys(cache, cache["block_names"][0])[0]
    return len(sample_ids_of(cache)) * sum(int(np.prod(shapes[key])) for key in keys) * dtype.size


def place_of_samples(num_bytes: int, least: int, ranks: SingleProcess) -> str:
    """Return where all processes have room for all samples: on the device, on the host, or only in files.

    num_bytes: what held_bytes gives; least: the bytes that an iteration takes of the device at least. Processes may share a
    host and a device.
    """
    room = ranks.size * num_bytes
    on_host = room <= HOST_SHARE * memory_beside_gpu()
    on_device = room <= HELD_SHARE * device_memory() and num_bytes + least <= device_memory()
    places = {ON_DEVICE: on_device, ON_HOST: on_host}
    return next((place for place, fits in places.items() if ranks.total(int(fits)) == ranks.size), IN_FILES)


def room_for_samples(num_bytes: int, count: int, peak: int) -> int:
    """Return how many of the host's samples the device holds beside iterations that take `peak` bytes.

    num_bytes: of all `count` samples. One more batch of each side is on the way there, which DEVICE_SHARE leaves room for.
    """
    room = DEVICE_SHARE * device_memory() - peak
    return max(0, min(count, int(room // (num_bytes / count))))


def replace_rows(
    rows: SampleRows, part: Sequence[int], chosen: Sequence[int], tokens: Sequence[mx.array], on_host: bool = False
) -> None:
    """Put tokens, rows of the samples `part` one below the other, in the place of the chosen samples' own.

    on_host: the chosen samples are the host's.
    """
    arrays: Sequence[Any] = [np.asarray(array) for array in tokens] if on_host else tokens
    count = len(tokens[0]) // len(part)  # rows of a sample
    for index in chosen:
        begin, (*before, modulation) = count * part.index(index), rows[index]
        given = [array[begin : begin + count] for array in arrays]
        if on_host:
            given = [overwritten(old, new) for old, new in zip_longest(before[: len(given)], given)]
        rows[index] = [*given, modulation]


def overwritten(old: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    """Return a copy of `new`: in the memory of `old` where it fits, since an operating system takes longer for new pages."""
    if old is None or old.shape != new.shape or old.dtype != new.dtype:
        return np.array(new)
    np.copyto(old, new)
    return old
