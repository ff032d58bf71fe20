"""The boundaries between blocks, made block after block from a cache of the ends: one forward pass over the samples in all."""

from collections.abc import Callable, Mapping, Sequence
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
from w4a8.passes import SampleId, places_of
from w4a8.rounding.training_samples import Samples, cache_reader, reader, stacked

REMEDY = "run optimize_adaround.py with --resume to make it anew"


class BlockBoundaries:
    """Where the walk through the model stands: files of the boundaries on both sides of a block, which a kill survives.

    """

    def __init__(
        self, cache: Mapping[str, Any], paths: WeightPaths, plan: Mapping[str, Any], chunk: int, ranks: SingleProcess = SINGLE_PROCESS,
        dtype: str = "float16",
    ):  # fmt: skip
        """chunk: samples that are run at once; it decides the last bits of what they give. ranks: share them.

        dtype: of the tokens between the blocks; float32 where they may exceed float16.
        """
        self.dtype = dtype
        self.cache, self.paths, self.plan, self.chunk, self.ranks = cache, paths, plan, chunk, ranks
        self.run = cache.get("calibration_run")
        self.blocks: list[str] = cache["block_names"]
        self.shapes = boundary_shapes(cache)
        self.places = places_of(cache)
        self._whole: set[str] = set()  # boundaries that were seen whole, or made, by this process

    def samples(self, mmdit: nn.Module, block: str) -> Samples:
        """What a block is trained on; makes what lacks and removes what is behind."""
        before = self._before(block)
        self._make(mmdit, block)
        kept = {self.paths.boundary(name).root for name in (before, block) if name}
        self._remove([each for each in self.paths.boundaries if each.root not in kept])
        modulation = cache_reader(self.paths.calib_dir, self.cache, ["modulation_input"])
        inputs, outputs = self._inputs(block), self._boundary(block)
        return Samples(
            self.places,
            lambda place: [*inputs(place), *modulation(place), *outputs(place)],
            self.cache["key_timesteps"],
            inputs=len(self._keys(before) if before else block_keys(self.cache, block)[0]),
        )

    def few(self, mmdit: nn.Module, count: int) -> Samples:
        """Some of the first block's samples, for a trial; writes nothing."""
        block, places = self.blocks[0], self.places[: 2 * count]
        inputs, modulation = (
            self._inputs(block),
            cache_reader(self.paths.calib_dir, self.cache, ["modulation_input"]),
        )
        outputs = {
            place: [np.array(tokens) for tokens in self._run(mmdit, block, self._given(block, [place]))]
            for place in places
        }
        return Samples(
            places, lambda place: [*inputs(place), *modulation(place), *outputs[place]], self.cache["key_timesteps"],
            inputs=len(block_keys(self.cache, block)[0]),
        )  # fmt: skip

    def finish(self) -> None:
        """Remove what is left of the walk."""
        self._remove(self.paths.boundaries)

    def num_bytes(self) -> int:
        """What is on the disk at most while it walks: three boundaries."""
        keys = {block: self._keys(block) for block in self.blocks}
        largest = max(
            npz_bytes(cached_sample_arrays(0, 0, {key: np.broadcast_to(np.zeros((), self.dtype), self.shapes[key]) for key in found}, self.run))
            for found in keys.values()
        )  # fmt: skip
        return 3 * largest * len(self.places)

    # reading

    def _before(self, block: str) -> str | None:
        index = self.blocks.index(block)
        return self.blocks[index - 1] if index else None

    def _keys(self, block: str) -> list[str]:
        return block_keys(self.cache, block)[1]

    def _inputs(self, block: str) -> Callable[[SampleId], list[np.ndarray]]:
        before = self._before(block)
        if before is None:
            return cache_reader(self.paths.calib_dir, self.cache, block_keys(self.cache, block)[0])
        return self._boundary(before)

    def _boundary(self, block: str) -> Callable[[SampleId], list[np.ndarray]]:
        """(image_id, step_index) -> the arrays of a boundary, mapped."""
        return reader(
            self.paths.boundary(block),
            {key: self.shapes[key] for key in self._keys(block)},
            REMEDY,
            self.dtype,
        )

    # making

    def _make(self, mmdit: nn.Module, block: str) -> None:
        """What a block gives for every sample, from what the one before it gives."""
        if block in self._whole:
            return
        boundary, keys, ranks = self.paths.boundary(block), self._keys(block), self.ranks
        chunks = [self.places[start : start + self.chunk] for start in range(0, len(self.places), self.chunk)]
        own = [chunks[number] for number in ranks.owned_indices(len(chunks))]
        left = [chunk for chunk in own if not all(self._holds(boundary, keys, place) for place in chunk)]
        if not ranks.total(len(left)):
            self._whole.add(block)
            return
        before = self._before(block)
        if before is not None:
            self._make(mmdit, before)
        with (
            progress_bar(len(self.places), f"{block} of every sample", "sample", leave=False) as bar,
            BackgroundWriter(pending=2, threads=min(4, blas.cores())) as writer,
            streams_for(len(chunks)) as streams,  # as many as ever: threads decide the last bits
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
                    arrays = dict(zip(keys, map(np.array, tokens), strict=True))
                    writer.submit(self._write, boundary, block, chunk, arrays)
                    ranks.advance(bar, len(chunk))
            writer.drain()
            ranks.complete(bar)
        self._whole.add(block)

    def _given(self, block: str, chunk: Sequence[SampleId]) -> list[mx.array]:
        """What enters a block for some samples, rows one below the other: its tokens, and the modulation input."""
        modulation = cache_reader(self.paths.calib_dir, self.cache, ["modulation_input"])
        return [
            mx.array(rows) for read in (self._inputs(block), modulation) for rows in stacked(read, chunk)
        ]

    def _run(self, mmdit: nn.Module, block: str, given: Sequence[mx.array]) -> list[mx.array]:
        """The tokens that a block gives, in the walk's dtype, unevaluated."""
        *tokens, modulation = [array.astype(mx.float32) for array in given]
        return [tokens.astype(getattr(mx, self.dtype)) for tokens in model_blocks(mmdit)[block].run(tokens, modulation)]

    def _write(
        self, boundary: BoundaryPaths, block: str, chunk: Sequence[SampleId], tokens: Mapping[str, np.ndarray]
    ) -> None:
        for key, array in tokens.items():
            if not np.isfinite(array).all():
                raise StoreError(f"{block}: {key} does not fit {self.dtype}, or is not finite")
        for index, place in enumerate(chunk):
            rows = {
                key: array[slice(*np.array([index, index + 1]) * (len(array) // len(chunk)))]
                for key, array in tokens.items()
            }
            write_npz(
                boundary.sample(*place), cached_sample_arrays(*place, rows, self.run), durable=False
            )  # checked when it is read again

    def _holds(self, boundary: BoundaryPaths, keys: Sequence[str], place: SampleId) -> bool:
        try:
            check_cached_sample(
                boundary.sample(*place), *place, {key: self.shapes[key] for key in keys}, checked=True, run=self.run,
                dtype=self.dtype,
            )
        except StoreError:
            return False
        return True

    def _remove(self, boundaries: Sequence[BoundaryPaths]) -> None:
        for boundary in boundaries:
            if self.ranks.rank == 0:
                remove_folder(boundary.root, boundary.owned_files())
                remove_folder(boundary.root.parent, [])
            self._whole = {each for each in self._whole if self.paths.boundary(each).root != boundary.root}
