"""Stage 2W: the boundaries between blocks, caught in one pass of the model."""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from calibration_store.block_cache import VELOCITY, boundary_keys, ends_of
from calibration_store.errors import OptionError, StoreError
from calibration_store.names import MULTIMODAL, block_kind, split_key
from w4a8.backend.parallel import streams_for
from w4a8.model.hooks import hooked_blocks
from w4a8.model.layers import model_blocks
from w4a8.model.parts import Pipeline
from w4a8.passes import Pass, PassBatch, SampleId, StoredPasses


class BlockRecorder:
    """A collector of the boundaries between blocks in one pass, unevaluated; `finish` evaluates them all at once."""

    def __init__(self, keys: Mapping[str, tuple[list[str], list[str]]]):
        """Store the keys of each block's inputs and outputs."""
        self._keys = keys
        self.boundaries: dict[str, mx.array] = {}

    def record(self, name: str, args: tuple, outputs: Any) -> None:
        """Note a block's inputs and outputs; a hook calls it."""
        input_keys, output_keys = self._keys[name]
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        for key, array in zip([*input_keys, *output_keys], [*args[: len(input_keys)], *given], strict=False):
            self.boundaries[key] = array

    def finish(
        self, output: mx.array, modulation_input: mx.array, where: str, first: Sequence[str] | None = None
    ) -> "RecordedPass":
        """Return the pass's arrays in float16 by key, unevaluated.

        output: of the model; where: the sample in words; first: keys of the first block's inputs where only the ends
        are recorded.
        """
        kept = self.boundaries | {"modulation_input": modulation_input}
        if first is not None:
            kept = ends_of(kept | {VELOCITY: output}, first)
        halves = {key: array.astype(mx.float16) for key, array in kept.items()}
        self.boundaries.clear()
        return RecordedPass(where, output, halves, mx.stack([mx.isfinite(array).all() for array in halves.values()]))


class RecordedPass(NamedTuple):
    """A pass before its evaluation."""

    where: str
    output: mx.array  # of the model
    halves: dict[str, mx.array]  # float16, by key
    finite: mx.array  # (keys,) bool: no value of the array is infinite or NaN

    def checked(self) -> dict[str, mx.array]:
        """Return the arrays by key. Raises StoreError that names the block when a value does not fit float16."""
        mx.eval(self)
        for key, fits in zip(self.halves, np.array(self.finite), strict=True):
            if not fits:
                raise StoreError(
                    f"{split_key(key)[0] or 'the model'}: {key} does not fit float16 (above 65504 or not finite) "
                    f"at {self.where}"
                )
        return self.halves


class Recording:
    """The choice of the arrays that stage 2W records: boundaries of some blocks, or the ends of the whole stack."""

    def __init__(self, mmdit: nn.Module, blocks: str | None, ends: bool):
        """Choose the blocks by their names, comma-separated; None stands for all.

        ends: only the ends of the stack are recorded. Raises OptionError for a block that the model has not.
        """
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
        self, passes: StoredPasses, sample_ids: Sequence[SampleId]
    ) -> Generator[tuple[SampleId, Mapping[str, mx.array | np.ndarray]], None, None]:
        """Yield every sample with the arrays of its file.

        Several samples share a pass where only ends are recorded and a GPU takes no longer for it. On a CPU small passes
        run side by side.
        """
        size = self._at_once(passes)
        if size == 1:
            with closing(passes.groups(sample_ids, passes.side_by_side())) as groups:
                for group in groups:
                    yield from zip(
                        [SampleId(one.image_id, one.step) for one in group], self.record(*group), strict=True
                    )
            return
        for batch in passes.batches(sample_ids, size):
            arrays = {key: np.array(array) for key, array in self.record(batch)[0].items()}
            for index, sample_id in enumerate(batch.sample_ids):
                yield sample_id, {key: array[index :: len(batch.sample_ids)] for key, array in arrays.items()}

    def probe(self, passes: StoredPasses, sample_ids: Sequence[SampleId]) -> tuple[float, Mapping[str, Any]]:
        """Return the seconds of a sample in the second of two runs, and the arrays of the first sample's file."""
        size = max(self._at_once(passes), passes.side_by_side())
        for _ in range(2):
            start = time.perf_counter()
            found = list(self.record_all(passes, sample_ids[:size]))
            seconds = time.perf_counter() - start
        return seconds / len(found), found[0][1]

    def _at_once(self, passes: StoredPasses) -> int:
        """Return the number of samples in one pass."""
        return passes.samples_at_once() if self._first is not None else 1

    def record(self, *passes: Pass | PassBatch) -> list[dict[str, mx.array]]:
        """Run passes, on a CPU at the same time, and return the float16 arrays of each sample's file.

        A PassBatch gives the rows of all its samples. Raises StoreError that names the block when a value does not fit float16.
        """
        hooked, taken = self.blocks if self._first is None else self.blocks[:1], []
        with streams_for(len(passes)) as streams:
            for one, stream in zip(passes, streams, strict=True):
                recorder = BlockRecorder(self.keys)
                with mx.stream(stream), hooked_blocks(one.pipeline.mmdit, recorder.record, hooked):
                    output = one.forward()
                    taken.append(recorder.finish(output, one.modulation_input(), one.where, self._first))
            mx.eval(taken)
        return [one.checked() for one in taken]

    def bytes_of_sample(self, pipeline: Pipeline, latent_size: Sequence[int], guidance: bool) -> int:
        """Return the size of a sample's file in bytes, from shapes alone, within a percent."""
        config, rows = pipeline.mmdit_config, 2 if guidance else 1
        sides = [latent_size[0] * latent_size[1] // config.patch_size**2, pipeline.text_tokens]
        keys = self._first
        if keys is None:
            keys = list(dict.fromkeys(key for name in self.blocks for side in self.keys[name] for key in side))
        tokens = 1 + sum(
            sides[int(key[-1])] if block_kind(split_key(key)[0])[0] == MULTIMODAL else sum(sides) for key in keys
        )
        velocity = 0 if self._first is None else latent_size[0] * latent_size[1] * config.vae_latent_dim
        return 2 * rows * (tokens * config.hidden_size + velocity) + 256 * (len(keys) + 4)

    def shapes(self, found: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Return the shape of every boundary of the recorded blocks, stored or not, and of the other stored arrays.

        found: the shapes of a pass's arrays.
        """
        known = {key: tuple(shape) for key, shape in found.items()}
        if self._first is None:
            return known
        sides = [known[key] for key in self._first]
        joined = (sides[0][0], sum(side[1] for side in sides), *sides[0][2:])
        for name in self.blocks:
            streams = sides if block_kind(name)[0] == MULTIMODAL else [joined]
            for keys in self.keys[name]:
                known |= dict(zip(keys, streams, strict=False))
        return known
