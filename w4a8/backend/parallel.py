"""Who computes what at the same time: the CPU's cores, a stream each. Changes no result."""

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

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def run_cpu_streams_side_by_side() -> None:
    """Let gradients of several CPU streams really run at the same time; call it before anything is evaluated.

    MLX walks a graph with many outputs depth first, one stream's part after the other's, unless this variable is
    large; it is read once. On a GPU nothing changes.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "2000")


@contextlib.contextmanager
def streams_for(groups: int) -> Iterator[list[mx.Stream]]:
    """Streams for so many groups of work, at most one a core of the CPU; the device's own elsewhere."""
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
    """What works at the same time: the CPUs of this process; a GPU is one."""
    return blas.cores() if mx.default_device() == mx.Device(mx.cpu) else 1


def row_groups(images: int) -> list[slice]:
    """Split the images of one pass over the CPU's cores; one group elsewhere.

    Most of MLX's CPU operations use one thread of their stream, so groups on streams of their own run side by
    side. Which group an image falls in depends on its place in the batch and on the number of cores.
    """
    count = min(images, working_cores())
    edges = [images * core // count for core in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


@functools.cache
def _cpu_streams(count: int) -> list[mx.Stream]:
    """Made once: MLX never frees a stream, and each is a thread."""
    return [mx.new_stream(mx.cpu) for _ in range(count)]


SMALL = 65536  # elements of a token array (rows, tokens, hidden) whose products gain nothing from a second thread


@contextlib.contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """One BLAS thread for passes over small token arrays: as fast alone, and a neighbour has the other core. Same results."""
    with _blas_threads(2 if elements <= SMALL else 1):
        yield


@contextlib.contextmanager
def _blas_threads(groups: int) -> Iterator[None]:
    """One BLAS thread per group when several run side by side."""
    if groups > 1:
        blas.set_threads(1)
    try:
        yield
    finally:
        blas.set_threads(blas.cores())


@functools.cache
def announce_compilation(what: str) -> None:
    """Say once that a GPU is about to compile: MLX does so at a kernel's first use, for up to a minute, and keeps what it can."""
    if mx.default_device() != mx.Device(mx.cpu):
        click.echo(f"compiling {what}, once …", err=True)


def on_every_core(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`function` of every item, in their order, on as many threads as there are cores: for NumPy, which lets go of the GIL."""
    with ThreadPoolExecutor(blas.cores()) as pool:
        yield from pool.map(function, items)


def compiled(function: Callable) -> Callable:
    """A function of MLX arrays, element by element, as one kernel on a GPU: many small ones are what an iteration waits for.

    As it is on a CPU, where compiling costs more, and where its gradients are taken.
    """
    return function if mx.default_device() == mx.Device(mx.cpu) else mx.compile(function)
