"""What a stage knows of the processes of `mlx.launch` before it loads anything: who it is, who speaks, who does what."""

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import click

from calibration_store.errors import OptionError
from w4a8.cli.progress import ProgressBar

Item = TypeVar("Item")
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


class Alone:
    """The only process: what ranks do, done by one. Also what another rank would do: `Alone(rank, size)`."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def first(self, value: int) -> int:
        """Rank 0's value: what all have to go by."""
        return value

    def total(self, value: int) -> int:
        """The sum of all ranks' values."""
        return value

    def gathered(self, found: Tree | None, like: Tree) -> list[Tree]:
        """What every rank found, in their order, in arrays of the shapes of `like`, float32; of one with None there is no use."""
        return [found]

    def does(self, number: int) -> bool:
        """Whether the item of this number is this rank's: its number decides, never its speed."""
        return number % self.size == self.rank

    def mine(self, count: int) -> list[int]:
        """Numbers of this rank's items, in turn, of so many."""
        return [number for number in range(count) if self.does(number)]

    def range_of(self, count: int) -> range:
        """Numbers of this rank's items, one after the other, of so many."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def each(self) -> list["Alone"]:
        """Who does what, rank by rank."""
        return [Alone(rank, self.size) for rank in range(self.size)]

    def say_shares(self, counts: Sequence[int], unit: str) -> None:
        """The line of a dry run; none for one rank."""
        if self.size > 1:
            click.echo(f"{self.size} ranks: {', '.join(map(str, counts))} {unit}")

    def count(self, bar: ProgressBar, done: int = 1) -> None:
        """So many items are done, and what the others have done meanwhile, which comes with their signs of life."""
        bar.update(done)

    def complete(self, bar: ProgressBar) -> None:
        """Wait for the others, and let the bar say so."""


ALONE = Alone()


class Joined(Protocol):
    """The group that this process is of."""

    def close(self) -> None: ...

    def fail(self, message: str) -> bool: ...


JOINED: list[Joined] = []


def ended(message: str | None) -> bool:
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
def silenced(script: str) -> Iterator[None]:
    """Nobody but rank 0 prints in the block; errors come after it. Raises OptionError for a script that ranks cannot share."""
    if launched_rank() is not None and script not in SHARED:
        raise OptionError(f"{script} is for one process: run it without mlx.launch, which is for {', '.join(SHARED)}")
    if not launched_rank():
        yield
        return
    with open(os.devnull, "w") as nobody, contextlib.redirect_stdout(nobody), contextlib.redirect_stderr(nobody):
        yield


def who() -> str:
    """What an error of another rank than the first begins with."""
    rank = launched_rank()
    return f"rank {rank} ({socket.gethostname()}): " if rank else ""


def those_of(ranks: Alone, items: Iterable[Item], everything: Sequence[Item]) -> list[Item]:
    """Of the items that are left, this rank's: their places among all decide, never anyone's speed."""
    own = {everything[number] for number in ranks.range_of(len(everything))}
    return [item for item in items if item in own]
