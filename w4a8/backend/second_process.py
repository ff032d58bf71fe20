"""Let a second process of this machine do every second item, for work that holds Python's lock. It needs no MLX."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def with_second_process(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """Yield `function` of every item, in their order; a second process computes every second one.

    function and results: such that `pickle` knows them. An error comes in its item's turn. The second process is at
    most one item ahead, and ends with this one. Where it ends before its time, for want of memory for example, this one
    does its work.
    """
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_send_results, args=(function, items[1::2], receiving, sending))
    process.daemon = True
    with receiving:
        if not _started(process):
            yield from map(function, items)
            return
        sending.close()
        try:
            for index, item in enumerate(items):
                if index % 2:
                    try:
                        result, error = receiving.recv()
                    except (EOFError, OSError):
                        result, error = function(item), None
                    if error is not None:
                        raise error
                    yield result
                else:
                    yield function(item)
        finally:
            process.kill()
            process.join()


def _started(process: multiprocessing.Process) -> bool:
    """Start the process, and return whether this worked. Ctrl-C waits until the process ignores it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # a child inherits the mask
    try:
        process.start()
    except OSError:
        return False
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return True


def _send_results(
    function: Callable[[_Item], _Result], items: Sequence[_Item], receiving: Connection, sending: Connection
) -> None:
    """Send (result, error) of every item until one is an error, or until the first process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first process, which ends this one
    receiving.close()  # only the first process may hold this end, so that sending fails without it
    with contextlib.suppress(BrokenPipeError):
        for item in items:
            try:
                message = function(item), None
            except MemoryError:
                return  # the first process does it
            except Exception as error:
                sending.send((None, error))
                return
            sending.send(message)
