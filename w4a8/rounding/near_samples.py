"""Samples that threads bring to the device before they are drawn, while the device computes with others."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import mlx.core as mx

from w4a8.rounding.settings import Indices


class NearSamples:
    """The arrays of a few samples by index; whoever draws a sample waits until its arrays are there."""

    def __init__(self, bring: Callable[[int], list[mx.array]], threads: int = 1):
        """bring: gives a sample's arrays, and runs on `threads` threads, where MLX may copy from NumPy and nothing else."""
        self._bring = bring
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="samples")
        self._near: dict[int, Future[list[mx.array]]] = {}

    def keep(self, indices: Indices) -> bool:
        """Begin to bring these samples, in this order, and let all others go; return whether any is on its way."""
        kept = {index: self._future(index) for index in dict.fromkeys(map(int, indices))}
        for index in self._near.keys() - kept.keys():
            self._near[index].cancel()  # nobody waits for it any more
        self._near = kept
        return not all(future.done() for future in kept.values())

    def arrays(self, indices: Indices) -> list[list[mx.array]]:
        """Return the arrays of each of these samples, kept or not. Raises what `bring` raises."""
        return [future.result() for future in [self._future(int(index)) for index in indices]]

    def _future(self, index: int) -> Future[list[mx.array]]:
        return self._near.get(index) or self._pool.submit(self._bring, index)
