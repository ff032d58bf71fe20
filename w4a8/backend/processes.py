"""What a stage knows of the processes of `mlx.launch` before it loads anything: who it is, who speaks, who does what."""

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
BACKENDS = {  # what mlx.launch tells its processes -> the backend that it started
    "MLX_HOSTFILE": "ring", "NCCL_HOST_IP": "nccl", "MLX_JACCL_COORDINATOR": "jaccl", "OMPI_COMM_WORLD_SIZE": "mpi",
}  # fmt: skip
RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
SHARED = (
    "generate_calibration_data.py", "cache_adaround_data.py", "collect_layer_activations.py", "optimize_adaround.py",
    "evaluate_quantization.py",
)  # fmt: skip


def launched_rank() -> int | None:
    """This process's rank below `mlx.launch`; None without it."""
    found = [os.environ[name] for name in RANKS if name in os.environ]
    return int(found[0]) if found and any(name in os.environ for name in BACKENDS) else None



class SingleProcess:
    """The only process of a stage. `SingleProcess(rank, size)` also says which items another process owns.

    Ownership follows from an item's index alone, so it never depends on timing.
    """

    def __init__(self, rank: int = 0, size: int = 1):
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
        """Return an object for each process, which says what that one owns."""
        return [SingleProcess(rank, self.size) for rank in range(self.size)]

    def print_shares(self, counts: Sequence[int], unit: str) -> None:
        """Print the line of a dry run that says how many items each process owns; print nothing for one process."""
        if self.size > 1:
            click.echo(f"{self.size} ranks: {', '.join(map(str, counts))} {unit}")

    def advance(self, bar: ProgressBar, done: int = 1) -> None:
        """Advance the bar by `done`, and by what the other processes have reported since the last call."""
        bar.update(done)

    def complete(self, bar: ProgressBar) -> None:
        """Wait for the other processes, and set the bar to its end."""


SINGLE_PROCESS = SingleProcess()


class Joined(Protocol):
    """The group that this process is of."""

    def close(self) -> None: ...

    def fail(self, message: str) -> bool: ...


JOINED: list[Joined] = []


def end_processes(message: str | None) -> bool:
    """A stage's end, with its error or None: tell the other ranks. Whether this process prints the error."""
    if JOINED:
        ranks = JOINED.pop()
        if message is None:
            ranks.close()
            return True
        return ranks.fail(message)
    rank = launched_rank()
    if rank and message is not None:
        time.sleep(3)  # rank 0 says the same, and mlx.launch ends this one
    return True


@contextlib.contextmanager
def only_rank_0_speaks(script: str) -> Iterator[None]:
    """Nobody but rank 0 prints in the block; errors come after it. Raises OptionError for a script that ranks cannot share."""
    if launched_rank() is not None and script not in SHARED:
        raise OptionError(f"{script} is for one process: run it without mlx.launch, which is for {', '.join(SHARED)}")
    if not launched_rank():
        yield
        return
    with open(os.devnull, "w") as nobody, contextlib.redirect_stdout(nobody), contextlib.redirect_stderr(nobody):
        yield


def rank_prefix() -> str:
    """What an error of another rank than the first begins with."""
    rank = launched_rank()
    return f"rank {rank} ({socket.gethostname()}): " if rank else ""


