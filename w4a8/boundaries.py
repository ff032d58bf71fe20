"""Stage 2W: catch the boundaries between blocks in one pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from calibration_store.block_cache import boundary_keys
from calibration_store.errors import OptionError, StoreError
from calibration_store.names import split_key
from hooks import hooked_blocks
from w4a8.model.layers import model_blocks
from w4a8.passes import Pass


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

    def finish(self, output: mx.array, modulation_input: mx.array, where: str) -> dict[str, mx.array]:
        """One `mx.eval` for everything; float16 arrays by key.

        Raises StoreError that names the block when a value does not fit float16.
        """
        halves = {key: array.astype(mx.float16) for key, array in self.boundaries.items()}
        halves["modulation_input"] = modulation_input.astype(mx.float16)
        finite = mx.stack([mx.isfinite(array).all() for array in halves.values()])
        mx.eval(output, finite, halves)
        for key, fits in zip(halves, finite.tolist(), strict=True):
            if not fits:
                raise StoreError(
                    f"{split_key(key)[0]}: {key} does not fit float16 (above 65504 or not finite) at {where}"
                )
        self.boundaries.clear()
        return halves


class Boundaries:
    """The boundaries of some blocks of a model: their keys, and how to record them."""

    def __init__(self, mmdit: nn.Module, blocks: str | None):
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

    def record(self, one: Pass) -> dict[str, mx.array]:
        """Run a pass; the arrays of its sample file, float16."""
        recorder = BlockRecorder(self.keys)
        with hooked_blocks(one.pipeline.mmdit, recorder.record, self.blocks):
            output = one.forward()
        return recorder.finish(output, one.modulation_input(), one.where)
