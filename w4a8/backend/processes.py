"""The processes of `mlx.launch` as a stage knows them before it loads anything: ranks, ownership, and who prints."""

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import click

from calibration_store.errors import OptionError
from w4a8.backend.progress import ProgressBar

_Item = TypeVar("_Item")
Tree = Any  # MLX arrays in lists and dictionaries
BACKENDS = {  # variables that mlx.launch sets for its processes -> the backend that it started
    "MLX_HOSTFILE": "ring", "NCCL_HOST_IP": "nccl", "MLX_JACCL_COORDINATOR": "jaccl", "OMPI_COMM_WORLD_SIZE": "mpi",
}  # fmt: skip
RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
SHARED = (  # the stages that several processes can share
    "generate_calibration_data.py", "cache_adaround_data.py", "collect_layer_activations.py", "optimize_adaround.py",
    "evaluate_quantization.py",
)  # fmt: skip


def launched_rank() -> int | None:
    """Return this process's rank below `mlx.launch`; None without it."""
    found = [os.environ[name] for name in RANKS if name in os.environ]
    return int(found[0]) if found and any(name in os.environ for name in BACKENDS) else None


class SingleProcess:
    """The only process of a stage. `SingleProcess(rank, size)` also says which items another process owns.

    Ownership follows from an item's index alone, so it never depends on timing.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        """Store the rank of the process that is meant, and the number of processes."""
        self.rank, self.size = rank, size

    def barrier(self) -> None:
        """Wait until every process is here."""

    def from_rank_0(self, value: int) -> int:
        """Return rank 0's value, which every process follows."""
        return value

    def total(self, value: int) -> int:
        """Return the sum of all processes' values."""
        return value

    def gathered(self, found: Tree | None, like: Tree) -> list[Tree]:
        """Return the trees of every process, by rank, in float32 arrays of the shapes of `like`.

        A process that found nothing passes None; the tree in its place has no meaning.
        """
        return [found]

    def owns(self, index: int) -> bool:
        """Return whether this process owns the item with this index."""
        return index % self.size == self.rank

    def owned_indices(self, count: int) -> list[int]:
        """Return the indices below `count` that this process owns; processes take turns."""
        return [index for index in range(count) if self.owns(index)]

    def owned_range(self, count: int) -> range:
        """Return a range of indices below `count` that this process owns; each process has one stretch."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def owned_items(self, items: Iterable[_Item], everything: Sequence[_Item]) -> list[_Item]:
        """Return the items that this process owns. Its stretch of `everything` decides."""
        own = {everything[index] for index in self.owned_range(len(everything))}
        return [item for item in items if item in own]

    def every_rank(self) -> list["SingleProcess"]:
        """Return an object for each process, which answers `owns` and `owned_…` for that process."""
        return [SingleProcess(rank, self.size) for rank in range(self.size)]

    def print_shares(self, counts: Sequence[int], unit: str) -> None:
        """Print the line of a dry run that says how many items each process owns; print nothing for one process."""
        if self.size > 1:
            click.echo(f"{self.size} ranks: {', '.join(map(str, counts))} {unit}")

    def advance(self, bar: ProgressBar, done: int = 1) -> None:
        """Advance the bar by `done`, and by the items that the other processes have reported since the last call."""
        bar.update(done)

    def complete(self, bar: ProgressBar) -> None:
        """Wait for the other processes, and set the bar to its end."""


SINGLE_PROCESS = SingleProcess()


class Joined(Protocol):
    """The group that this process belongs to."""

    def close(self) -> None:
        """Leave the group in good order."""

    def fail(self, message: str) -> bool:
        """Tell the group that this process failed; return whether it has to print the message."""


JOINED: list[Joined] = []  # the group, once there is one


def end_processes(message: str | None) -> bool:
    """Tell the other ranks that a stage has ended, with its error or None.

    Return whether this process has to print the error.
    """
    if JOINED:
        ranks = JOINED.pop()
        if message is None:
            ranks.close()
            return True
        return ranks.fail(message)
    rank = launched_rank()
    if rank and message is not None:
        time.sleep(3)  # rank 0 prints the same, and mlx.launch ends this process
    return True


@contextlib.contextmanager
def only_rank_0_speaks(script: str) -> Iterator[None]:
    """Let only rank 0 print in the block; errors are printed after it.

    Raises OptionError for a script that ranks cannot share.
    """
    if launched_rank() is not None and script not in SHARED:
        raise OptionError(f"{script} is for one process: run it without mlx.launch, which is for {', '.join(SHARED)}")
    if not launched_rank():
        yield
        return
    with open(os.devnull, "w") as nobody, contextlib.redirect_stdout(nobody), contextlib.redirect_stderr(nobody):
        yield


def rank_prefix() -> str:
    """Return the prefix of an error of this rank; it is empty for rank 0."""
    rank = launched_rank()
    return f"rank {rank} ({socket.gethostname()}): " if rank else ""
