"""Work side by side on the CPU's cores, a stream for each core. No result depends on it."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import click
import mlx.core as mx

from w4a8.backend import blas

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run_cpu_streams_side_by_side() -> None:
    """Let gradients of several CPU streams really run at the same time; call it before anything is evaluated.

    MLX walks a graph with many outputs depth first, one stream's part after the other's, unless this variable is
    large. MLX reads it once. On a GPU nothing changes.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "2000")


@contextlib.contextmanager
def streams_for(groups: int) -> Iterator[list[mx.Stream]]:
    """Give a stream for each group of work, at most one a core of the CPU; elsewhere the device's own stream."""
    count = min(groups, working_cores())
    with _blas_threads(count):
        yield [mx.default_stream(mx.default_device())] if count == 1 else _cpu_streams(count)


@contextlib.contextmanager
def side_by_side(count: int) -> Iterator[list[tuple[slice, mx.Stream]]]:
    """Split `count` rows of work over the CPU's cores, one group elsewhere: (rows, the stream to compute them on)."""
    groups = row_groups(count)
    with streams_for(len(groups)) as streams:
        yield list(zip(groups, streams, strict=True))


def working_cores() -> int:
    """Return the number of units that compute at the same time: the CPUs of this process; 1 for a GPU."""
    return blas.cores() if mx.default_device() == mx.Device(mx.cpu) else 1


def row_groups(images: int) -> list[slice]:
    """Split the images of one pass over the CPU's cores; one group elsewhere.

    Most of MLX's CPU operations use one thread of their stream, so groups on streams of their own run side by
    side. The group of an image depends on its index in the batch and on the number of cores.
    """
    count = min(images, working_cores())
    edges = [images * core // count for core in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


@functools.cache
def _cpu_streams(count: int) -> list[mx.Stream]:
    """Return CPU streams; they are made once, since MLX never frees a stream, and each has a thread."""
    return [mx.new_stream(mx.cpu) for _ in range(count)]


SMALL = 65536  # elements of a token array (rows, tokens, hidden) whose products gain nothing from a second thread


@contextlib.contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """Use one BLAS thread for passes over token arrays of at most SMALL elements; results are the same.

    Such a pass is as fast with one thread, and another process has the other core.
    """
    with _blas_threads(2 if elements <= SMALL else 1):
        yield


@contextlib.contextmanager
def _blas_threads(groups: int) -> Iterator[None]:
    """Use one BLAS thread per group when several run side by side; a single group changes nothing."""
    if groups == 1:
        yield
        return
    blas.set_threads(1)
    try:
        yield
    finally:
        blas.set_threads(blas.cores())


@functools.cache
def announce_compilation(what: str) -> None:
    """Print once that a GPU is about to compile: MLX does so at a kernel's first use, for up to a minute."""
    if mx.default_device() != mx.Device(mx.cpu):
        click.echo(f"compiling {what}, once …", err=True)


def on_every_core(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Yield `function` of every item, in their order, computed on a thread for each core.

    It is for NumPy's functions, which release the GIL.
    """
    with ThreadPoolExecutor(blas.cores()) as pool:
        yield from pool.map(function, items)


def compiled(function: Callable) -> Callable:
    """Return a function of MLX arrays, element by element, as one kernel on a GPU, where many small ones take longer.

    On a CPU, where compiling costs more than it gains, and where gradients are taken through it, it computes as it is.
    """
    return function if mx.default_device() == mx.Device(mx.cpu) else mx.compile(function)
