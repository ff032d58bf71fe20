"""Stage 2W: catch the boundaries between blocks in one pass."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.block_cache import VELOCITY, boundary_keys, ends_of
from calibration_store.errors import OptionError, StoreError
from calibration_store.names import MULTIMODAL, block_kind, split_key
from w4a8.model.hooks import hooked_blocks
from w4a8.model.layers import model_blocks
from w4a8.model.memory_needs import config_of
from w4a8.model.parts import Pipeline
from w4a8.model.prompt_encoder import text_tokens
from w4a8.passes import Pass, PassBatch, SampleId, StoredPasses


class BlockRecorder:
    """Collects the boundaries between blocks in one pass, unevaluated; `finish` evaluates them all at once."""

    def __init__(self, keys: Mapping[str, tuple[list[str], list[str]]]):
        self._keys = keys
        self.boundaries: dict[str, mx.array] = {}

    def record(self, name: str, args: tuple, outputs: Any) -> None:
        input_keys, output_keys = self._keys[name]
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        for key, array in zip([*input_keys, *output_keys], [*args[: len(input_keys)], *given], strict=False):
            self.boundaries[key] = array

    def finish(self, output: mx.array, modulation_input: mx.array, where: str, first: Sequence[str] | None = None):
        """One `mx.eval` for everything; float16 arrays by key. first: keys of the first block's inputs; the ends alone.

        Raises StoreError that names the block when a value does not fit float16.
        """
        kept = self.boundaries | {"modulation_input": modulation_input}
        if first is not None:
            kept = ends_of(kept | {VELOCITY: output}, first)
        halves = {key: array.astype(mx.float16) for key, array in kept.items()}
        finite = mx.stack([mx.isfinite(array).all() for array in halves.values()])
        mx.eval(output, finite, halves)
        for key, fits in zip(halves, finite.tolist(), strict=True):
            if not fits:
                raise StoreError(
                    f"{split_key(key)[0] or 'the model'}: {key} does not fit float16 (above 65504 or not finite) at {where}"
                )
        self.boundaries.clear()
        return halves


class Recording:
    """What stage 2W records of a pass: the boundaries of some blocks of a model, or the ends of the whole stack."""

    def __init__(self, mmdit: nn.Module, blocks: str | None, ends: bool):
        """blocks: comma-separated, None for all. Raises OptionError for one that the model has not."""
        names = list(model_blocks(mmdit))
        chosen = [name.strip() for name in blocks.split(",")] if blocks is not None else names
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise OptionError(
                f"--blocks: no block {', '.join(map(repr, unknown))}; the model has {names[0]} to {names[-1]}"
            )
        self.keys = boundary_keys(names)
        self.blocks: Sequence[str] = [name for name in names if name in chosen]
        self._first = self.keys[names[0]][0] if ends else None

    def record_all(
        self, passes: StoredPasses, places: Sequence[SampleId]
    ) -> Iterator[tuple[SampleId, dict[str, np.ndarray]]]:
        """The arrays of every place's sample file; several places in a pass where that costs nothing and ends are enough."""
        size = self._at_once(passes)
        if size == 1:
            with closing(passes.over(places)) as left:
                for one in left:
                    yield (one.image_id, one.step), self.record(one)
            return
        for batch in passes.batches(places, size):
            arrays = {key: np.array(array) for key, array in self.record(batch).items()}
            for index, place in enumerate(batch.places):
                yield place, {key: array[index :: len(batch.places)] for key, array in arrays.items()}

    def probe(self, passes: StoredPasses, places: Sequence[SampleId]) -> tuple[float, Mapping[str, Any]]:
        """Seconds a sample takes (the second of two times), and the arrays of the first one's file."""
        size = self._at_once(passes)
        if size == 1:
            return passes.probe(places[0][1], self.record)
        for _ in range(2):
            start = time.perf_counter()
            found = list(self.record_all(passes, places[:size]))
            seconds = time.perf_counter() - start
        return seconds / len(found), found[0][1]

    def _at_once(self, passes: StoredPasses) -> int:
        return passes.samples_at_once() if self._first is not None else 1

    def record(self, one: Pass | PassBatch) -> dict[str, mx.array]:
        """Run a pass; float16 arrays, those of its sample file where it is of one sample."""
        recorder = BlockRecorder(self.keys)
        with hooked_blocks(
            one.pipeline.mmdit, recorder.record, self.blocks if self._first is None else self.blocks[:1]
        ):
            output = one.forward()
        return recorder.finish(output, one.modulation_input(), one.where, self._first)

    def bytes_of_sample(self, pipeline: Pipeline, latent_size: Sequence[int], guidance: bool) -> int:
        """What a sample's file takes, from shapes alone, within a percent."""
        config, rows = config_of(pipeline), 2 if guidance else 1
        sides = [latent_size[0] * latent_size[1] // config.patch_size**2, text_tokens(pipeline)]
        keys = self._first
        if keys is None:
            keys = list(dict.fromkeys(key for name in self.blocks for side in self.keys[name] for key in side))
        tokens = 1 + sum(
            sides[int(key[-1])] if block_kind(split_key(key)[0])[0] == MULTIMODAL else sum(sides) for key in keys
        )
        velocity = 0 if self._first is None else latent_size[0] * latent_size[1] * config.vae_latent_dim
        return 2 * rows * (tokens * config.hidden_size + velocity) + 256 * (len(keys) + 4)

    def shapes(self, found: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Shape of every boundary of the recorded blocks and of what is stored, from the shapes of a pass's arrays."""
        found = {key: tuple(shape) for key, shape in found.items()}
        if self._first is None:
            return found
        sides = [found[key] for key in self._first]
        joined = (sides[0][0], sum(side[1] for side in sides), *sides[0][2:])
        for name in self.blocks:
            streams = sides if block_kind(name)[0] == MULTIMODAL else [joined]
            for keys in self.keys[name]:
                found |= dict(zip(keys, streams, strict=False))
        return found
