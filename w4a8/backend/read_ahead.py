"""Call a slow reader ahead of its user, on every core: files are independent, and unpacking lets go of Python's lock."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from w4a8.backend.blas import cores

_Key = TypeVar("_Key")
_Read = TypeVar("_Read")


def read_ahead(read: Callable[[_Key], _Read], keys: Iterable[_Key]) -> Iterator[tuple[_Key, _Read]]:
    """Yield (key, read(key)) in order. No more are read, and not yet used, than there are cores.

    An exception of `read` is raised when its key's turn comes.
    """
    left = iter(keys)
    with ThreadPoolExecutor(cores()) as pool:
        ahead: deque[tuple[_Key, Future[_Read]]] = deque()
        try:
            for key in islice(left, cores()):
                ahead.append((key, pool.submit(read, key)))
            while ahead:
                key, future = ahead.popleft()
                found = future.result()
                for following in islice(left, 1):
                    ahead.append((following, pool.submit(read, following)))
                yield key, found
        finally:
            for _, future in ahead:
                future.cancel()
