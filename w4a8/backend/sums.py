"""Sums over micro-batches whose last bits do not depend on the process that computes a micro-batch."""

from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx.utils import tree_map

from w4a8.backend.processes import SingleProcess, Tree


def summed(
    ranks: SingleProcess, count: int, at_once: int, made: Callable[[Sequence[int]], list[Tree]], like: Tree
) -> Tree:
    """Return the sum of the trees of the numbers 0 … count - 1, added in their order whatever the number of ranks.

    made: gives the trees of at most `at_once` numbers, all of which this rank owns; like: arrays of the same shapes. The
    device may still be computing the sum.
    """
    total, own, rounds = None, ranks.owned_indices(count), -(-count // ranks.size)
    for start in range(0, rounds, at_once):
        found = made(own[start : start + at_once])
        for turn in range(start, min(start + at_once, rounds)):
            mine = found[turn - start] if turn < len(own) else None
            for each in ranks.gathered(mine, like)[: count - turn * ranks.size]:
                total = each if total is None else tree_map(mx.add, total, each)
        mx.async_eval(total)
    return total
