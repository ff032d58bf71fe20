"""The boundaries between blocks, made block after block from a cache of the ends.

In all that is one forward pass over the samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.block_cache import (
    block_keys,
    boundary_shapes,
    cached_sample_arrays,
    check_cached_sample,
)
from calibration_store.errors import StoreError
from calibration_store.files import BackgroundWriter, remove_folder
from calibration_store.layout import BoundaryPaths, WeightPaths
from calibration_store.npz import npz_bytes, write_npz
from w4a8.backend import blas
from w4a8.backend.parallel import streams_for
from w4a8.backend.processes import SINGLE_PROCESS, SingleProcess
from w4a8.backend.progress import progress_bar
from w4a8.model.layers import model_blocks
from w4a8.passes import SampleId, sample_ids_of
from w4a8.rounding.quantized_forward import original_forward
from w4a8.rounding.training_samples import Reader, Samples, cache_reader, fit_in_memory, reader, stacked

BOUNDARIES_AT_ONCE = 3  # that are held or on the disk at the same time
REMEDY = "run optimize_adaround.py with --resume to make it anew"


class BlockBoundaries:
    """The boundaries on both sides of a block, while the run walks through the model.

    Few of them are in memory, and a run that was killed makes them anew. Others are files, which it goes on with.
    """

    def __init__(
        self, cache: Mapping[str, Any], paths: WeightPaths, plan: Mapping[str, Any], chunk: int,
        ranks: SingleProcess = SINGLE_PROCESS, dtype: str = "float16", products: mx.Dtype | None = None,
    ):  # fmt: skip
        """Store where the boundaries lie, and how they are made.

        cache: metadata of the block cache; chunk: the number of samples that are run at once, which decides the last
        bits of their tokens; ranks: the processes that share the samples; dtype: of the tokens between the blocks,
        float32 where they may exceed float16's 65,504; products: the 16-bit dtype that blocks compute in, None for
        float32.
        """
        self.dtype, self.products = dtype, products
        self.cache, self.paths, self.plan, self.chunk, self.ranks = cache, paths, plan, chunk, ranks
        self.run = cache.get("calibration_run")
        self.blocks: list[str] = cache["block_names"]
        self.shapes = boundary_shapes(cache)
        self.sample_ids = sample_ids_of(cache)
        self._whole: set[str] = set()  # blocks whose boundary this process has made, or seen to be whole
        self._in_memory = ranks.size == 1 and fit_in_memory(BOUNDARIES_AT_ONCE * self._largest())
        self._held: dict[
            str, dict[SampleId, list[np.ndarray]]
        ] = {}  # in memory, by block: tokens in the order of its keys
        self._modulations: dict[SampleId, list[np.ndarray]] = {}

    def samples(self, mmdit: nn.Module, block: str) -> Samples:
        """Return the samples that a block is trained on.

        Boundaries that they need and that are not there are made; boundaries that no later block needs are removed.
        """
        before = self._before(block)
        self._make(mmdit, block)
        kept = {self.paths.boundary(name).root for name in (before, block) if name}
        self._remove([each for each in self.paths.boundaries if each.root not in kept])
        modulation, inputs, outputs = self._modulation(), self._inputs(block), self._boundary(block)
        return Samples.load(
            self.sample_ids,
            lambda sample_id: [*inputs(sample_id), *modulation(sample_id), *outputs(sample_id)],
            self.cache["key_timesteps"],
            inputs=len(self._keys(before) if before else block_keys(self.cache, block)[0]),
        )

    def few(self, mmdit: nn.Module, count: int) -> Samples:
        """Return some of the first block's samples, 2·count at most, for a trial run; write nothing."""
        block, sample_ids = self.blocks[0], self.sample_ids[: 2 * count]
        inputs, modulation = self._inputs(block), self._modulation()
        outputs = {
            sample_id: [np.array(tokens) for tokens in self._run(mmdit, block, self._given(block, [sample_id]))]
            for sample_id in sample_ids
        }
        return Samples.load(
            sample_ids,
            lambda sample_id: [*inputs(sample_id), *modulation(sample_id), *outputs[sample_id]],
            self.cache["key_timesteps"],
            inputs=len(block_keys(self.cache, block)[0]),
        )

    def finish(self) -> None:
        """Remove all boundaries that are left."""
        self._remove(self.paths.boundaries)

    def memory_bytes(self) -> int:
        """Return the bytes of the device's memory that all samples take: none, since files hold them."""
        return 0

    def num_bytes(self) -> int:
        """Return the largest number of bytes on the disk at the same time."""
        return 0 if self._in_memory else BOUNDARIES_AT_ONCE * self._largest()

    def _largest(self) -> int:
        """Return the bytes of the largest boundary, as files."""
        zero = np.zeros((), self.dtype)
        boundaries = [
            {key: np.broadcast_to(zero, self.shapes[key]) for key in self._keys(block)} for block in self.blocks
        ]
        largest = max(npz_bytes(cached_sample_arrays(0, 0, arrays, self.run)) for arrays in boundaries)
        return largest * len(self.sample_ids)

    # which tokens lie where

    def _before(self, block: str) -> str | None:
        """Return the block before this one; None for the first."""
        index = self.blocks.index(block)
        return self.blocks[index - 1] if index else None

    def _keys(self, block: str) -> list[str]:
        """Return the keys of the tokens that a block gives."""
        return block_keys(self.cache, block)[1]

    def _inputs(self, block: str) -> Reader:
        """Return a reader of a block's input tokens."""
        before = self._before(block)
        if before is None:
            return cache_reader(self.paths.calib_dir, self.cache, block_keys(self.cache, block)[0])
        return self._boundary(before)

    def _modulation(self) -> Reader:
        """Return a reader of the modulation inputs, which all blocks share; in memory each of them is read once."""
        read = cache_reader(self.paths.calib_dir, self.cache, ["modulation_input"])
        if not self._in_memory:
            return read

        def kept(sample_id: SampleId) -> list[np.ndarray]:
            if sample_id not in self._modulations:
                self._modulations[sample_id] = [np.array(array) for array in read(sample_id)]
            return self._modulations[sample_id]

        return kept

    def _boundary(self, block: str) -> Reader:
        """Return a reader of the tokens that a block gives, mapped or in memory."""
        if self._in_memory:
            return self._held[block].__getitem__
        return reader(
            self.paths.boundary(block),
            {key: self.shapes[key] for key in self._keys(block)},
            REMEDY,
            self.dtype,
        )

    # how boundaries are made

    def _make(self, mmdit: nn.Module, block: str) -> None:
        """Make the tokens that a block gives for every sample, from the tokens of the block before it."""
        if block in self._whole:
            return
        boundary, keys, ranks = self.paths.boundary(block), self._keys(block), self.ranks
        chunks = [self.sample_ids[start : start + self.chunk] for start in range(0, len(self.sample_ids), self.chunk)]
        own = [chunks[number] for number in ranks.owned_indices(len(chunks))]
        left = [chunk for chunk in own if not all(self._holds(boundary, keys, sample_id) for sample_id in chunk)]
        if not ranks.total(len(left)):
            self._whole.add(block)
            return
        before = self._before(block)
        if before is not None:
            self._make(mmdit, before)
        self._held[block] = {}
        with (
            progress_bar(len(self.sample_ids), f"{block} of every sample", "sample", leave=False) as bar,
            BackgroundWriter(pending=2, threads=min(4, blas.cores())) as writer,
            streams_for(len(chunks)) as streams,  # for all chunks, not those left: threads decide the last bits
        ):
            ranks.advance(bar, sum(map(len, own)) - sum(map(len, left)))
            turns = [left[start : start + len(streams)] for start in range(0, len(left), len(streams))]
            given = [self._given(block, chunk) for chunk in turns[0]] if turns else []
            for turn, following in zip(turns, [*turns[1:], []], strict=True):
                made = []
                for arrays, stream in zip(given, streams, strict=False):
                    with mx.stream(stream):
                        made.append(self._run(mmdit, block, arrays))
                mx.async_eval(made)
                given = [self._given(block, chunk) for chunk in following]  # while it computes
                for chunk, tokens in zip(turn, made, strict=True):
                    named = dict(zip(keys, map(np.array, tokens), strict=True))
                    writer.submit(self._write, boundary, block, chunk, named)
                    ranks.advance(bar, len(chunk))
            writer.drain()
            ranks.complete(bar)
        self._whole.add(block)

    def _given(self, block: str, chunk: Sequence[SampleId]) -> list[mx.array]:
        """Return a block's inputs for some samples, rows one below the other: its tokens, and the modulation input."""
        return [mx.array(rows) for read in (self._inputs(block), self._modulation()) for rows in stacked(read, chunk)]

    def _run(self, mmdit: nn.Module, block: str, given: Sequence[mx.array]) -> list[mx.array]:
        """Return the tokens that a block gives, in the dtype between blocks, unevaluated."""
        *tokens, modulation = [array.astype(mx.float32) for array in given]
        module = model_blocks(mmdit)[block]
        with original_forward([module], self.products).installed(mmdit, [module]):
            return [tokens.astype(getattr(mx, self.dtype)) for tokens in module.run(tokens, modulation)]

    def _write(
        self, boundary: BoundaryPaths, block: str, chunk: Sequence[SampleId], tokens: Mapping[str, np.ndarray]
    ) -> None:
        """Keep each sample, or write its file. Raises StoreError where a token is not finite, or does not fit the dtype."""
        for key, array in tokens.items():
            if not np.isfinite(array).all():
                raise StoreError(f"{block}: {key} does not fit {self.dtype}, or is not finite")
        for index, sample_id in enumerate(chunk):
            rows = {
                key: array[slice(*np.array([index, index + 1]) * (len(array) // len(chunk)))]
                for key, array in tokens.items()
            }
            if self._in_memory:
                self._held[block][sample_id] = list(rows.values())
                continue
            arrays = cached_sample_arrays(*sample_id, rows, self.run)
            write_npz(boundary.sample(*sample_id), arrays, durable=False)  # it is checked when it is read again

    def _holds(self, boundary: BoundaryPaths, keys: Sequence[str], sample_id: SampleId) -> bool:
        """Return whether a sample's file is there, valid, and this run's."""
        if self._in_memory:
            return False  # what is whole is noted
        path, shapes = boundary.sample(*sample_id), {key: self.shapes[key] for key in keys}
        try:
            check_cached_sample(path, *sample_id, shapes, checked=True, run=self.run, dtype=self.dtype)
        except StoreError:
            return False
        return True

    def _remove(self, boundaries: Sequence[BoundaryPaths]) -> None:
        """Remove these boundaries from the disk, which rank 0 does, and from memory."""
        if self.ranks.rank == 0:
            remove_boundaries(boundaries)
        for boundary in boundaries:
            self._whole = {each for each in self._whole if self.paths.boundary(each).root != boundary.root}
        self._held = {block: found for block, found in self._held.items() if block in self._whole}


def remove_boundaries(boundaries: Sequence[BoundaryPaths]) -> None:
    """Remove these boundaries from the disk."""
    for boundary in boundaries:
        remove_folder(boundary.root, boundary.owned_files())
        remove_folder(boundary.root.parent, [])
