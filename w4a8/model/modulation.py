"""Build DiffusionKit's modulation cache, and put the adaLN weights back afterwards."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from w4a8.model.parts import Pipeline


@contextlib.contextmanager
def modulation_cache(
    pipeline: Pipeline, pooled: Sequence[mx.array], timesteps: mx.array
) -> Iterator[Callable[[int], None]]:
    """Build DiffusionKit's modulation cache, and put the adaLN weights back on exit, also after an exception.

    pooled: one (R, channels) array per group of rows that is run on its own. timesteps (steps,) in the
    activation dtype: a lookup needs the very same float. Yields `select(group)`, which must be called before the
    model runs on that group's rows.

    DiffusionKit empties the live adaLN weights when it builds the cache and re-reads them from disk. This function
    keeps references to them instead, so that nothing is loaded twice.
    """
    mmdit = pipeline.mmdit
    mmdit.load_weights([], strict=False)  # changes nothing, but raises LiveHooksError when hooks are live
    linears = [module for name, module in mmdit.named_modules() if name.endswith("adaLN_modulation.layers.1")]
    weights = [tree_map(lambda array: array, linear.parameters()) for linear in linears]
    groups: list[list[tuple[Any, dict]]] = []

    def restore() -> None:
        for linear, parameters in zip(linears, weights, strict=True):
            linear.update(parameters)
        mmdit.pop("to_offload", None)  # aliases that would show up in parameters()
        mmdit.clear_modulation_params_cache()

    try:
        for rows in pooled:
            mmdit.cache_modulation_params(rows, timesteps)
            owners = [module for _, module in mmdit.named_modules() if "_modulation_params" in module]
            groups.append([(module, module["_modulation_params"]) for module in owners])
            restore()

        def select(group: int) -> None:
            for module, params in groups[group]:
                module["_modulation_params"] = params

        select(0)
        yield select
    finally:
        restore()
