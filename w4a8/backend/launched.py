"""The processes that `mlx.launch` started on one folder: how they exchange arrays, and what happens when one is lost.

Computed arrays are exchanged through mx.distributed, signs of life are not: a collective cannot carry them while a rank
computes, and waits for ever where its peer is gone. Signs of life lie in the folder that all ranks share, one small
file a rank.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from calibration_store.errors import StoreError, WriteError
from w4a8.backend.processes import BACKENDS, JOINED, SINGLE_PROCESS, SingleProcess, Tree, launched_rank
from w4a8.backend.progress import ProgressBar
from w4a8.backend.words import format_seconds

JOIN_SECONDS = 60.0  # until all ranks have started
LOST_SECONDS = 30.0  # without a sign of life, after which a rank is lost
STUCK_SECONDS = 30.0  # in one collective with all ranks alive, after which the network is down
BEAT_SECONDS = 1.0  # between two signs of life
STALE_SECONDS = 120.0  # age of a sign that a killed rank has left
HELP = "Issue 34"


class LaunchedProcesses(SingleProcess):
    """One of several processes. `close` it when all is done; a rank that ends otherwise ends the others, too."""

    def __init__(self, group: mx.distributed.Group, folder: Path, on_device: bool):
        """Write the first sign of life, start the watch over the other ranks, and wait until they share the folder.

        on_device: collectives run on the GPU. Raises WriteError or StoreError where the folder cannot be written, or is
        not shared.
        """
        self._group, self._folder, self._on_device = group, folder / ".ranks", on_device
        self.rank, self.size, self.host = group.rank(), group.size(), socket.gethostname()
        self._waiting = self._collectives = self._done = self._seen = 0
        self._failure: str | None = None
        self._closed = threading.Event()
        self._run = f"{self.from_rank_0(secrets.randbits(30)):08x}"
        self._peers = [_Peer(self._path(rank)) for rank in range(self.size) if rank != self.rank]
        self._pipe, self._wakeups = _wakeups()
        try:
            self._beat()
        except OSError as error:
            raise WriteError(f"cannot write {self._folder}: {error.strerror}") from None
        self._watch = threading.Thread(target=self._keep_watch, name="ranks", daemon=True)
        self._watch.start()
        self._meet()

    # together

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.total(0)

    def from_rank_0(self, value: int) -> int:
        """Return rank 0's value, which every process follows."""
        return self.total(value if self.rank == 0 else 0)

    def total(self, value: int) -> int:
        """Return the sum of all processes' values, int32."""
        given = mx.array([value], dtype=mx.int32)
        return int(self._collective(lambda stream: mx.distributed.all_sum(given, group=self._group, stream=stream)))

    def gathered(self, found: Tree | None, like: Tree) -> list[Tree]:
        """Return the trees of every process as SingleProcess.gathered says."""
        leaves: list[mx.array] = []
        if found is None:
            found = tree_map(mx.zeros_like, like)
        tree_map(lambda _, leaf: leaves.append(leaf.reshape(-1).astype(mx.float32)), like, found)
        own = mx.concatenate(leaves)
        mx.eval(own)
        every = self._collective(lambda stream: mx.distributed.all_gather(own, group=self._group, stream=stream))
        return [self._tree(row, like) for row in every.reshape(self.size, -1)]

    def _tree(self, row: mx.array, like: Tree) -> Tree:
        """Cut a vector into arrays of the shapes of `like`."""
        begin = 0

        def cut(leaf: mx.array) -> mx.array:
            nonlocal begin
            begin += leaf.size
            return row[begin - leaf.size : begin].reshape(leaf.shape)

        return tree_map(cut, like)

    def _collective(self, start: Callable[[Any], mx.array]) -> mx.array:
        """Run a collective to its end; `start` begins it on a stream. Raises StoreError where a connection broke."""
        self._collectives += 1
        self._waiting = self._collectives
        try:
            found = start(mx.gpu if self._on_device else mx.cpu)
            mx.eval(found)
            mx.synchronize()
        except RuntimeError as error:  # the watch finds out whose connection broke, and ends this process
            time.sleep(LOST_SECONDS + STUCK_SECONDS)
            raise StoreError(f"the ranks no longer reach each other ({' '.join(str(error).split())[:160]})") from None
        self._waiting = 0
        return found

    def advance(self, bar: ProgressBar, done: int = 1) -> None:
        """Advance the bar by `done`, and by the items that the other processes have reported since the last call."""
        self._done += done
        others = max(self._seen, sum(peer.beat.get("done", 0) for peer in self._peers))
        bar.update(done + others - self._seen)
        self._seen = others

    def complete(self, bar: ProgressBar) -> None:
        """Wait for the other processes, and set the bar to its end."""
        self._seen = self.total(self._done) - self._done
        bar.update(bar.total - bar.n)

    # life and death

    def close(self) -> None:
        """End the watch and remove this rank's sign; every rank is done, and nobody waits for this one any more."""
        self._closed.set()
        os.write(self._wakeups, b"\0")  # the watch need not wait for its next sign
        self._watch.join()
        remove_signs(self._folder, [self._path(self.rank)])

    def fail(self, message: str) -> bool:
        """Tell the other ranks that this one failed, and return whether it has to print the message.

        A rank does not where a lower one has failed, too: that one prints its own.
        """
        self._failure = message
        self._say()
        lower = [peer for peer in self._peers if peer.rank < self.rank]
        deadline = time.monotonic() + 3
        while lower and time.monotonic() < deadline:
            if any(peer.read().get("failed") is not None for peer in lower):
                return False
            time.sleep(0.1)
        return True

    def _path(self, rank: int) -> Path:
        return self._folder / f"{self._run}_{rank}.json"  # two stages may be at work below one folder

    def _say(self) -> None:
        """Give a sign of life; where the disk is full, the work itself reports it."""
        with contextlib.suppress(OSError):
            self._beat()

    def _beat(self) -> None:
        """Write this rank's sign of life. Raises OSError."""
        content = {
            "host": self.host, "pid": os.getpid(), "time": time.time(), "done": self._done, "waiting": self._waiting,
            "failed": self._failure,
        }  # fmt: skip
        data = json.dumps(content).encode()
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path(self.rank), os.O_WRONLY | os.O_CREAT, 0o644)
        try:  # written in place, since a renamed file is seen late over a network
            os.pwrite(descriptor, data, 0)
            os.ftruncate(descriptor, len(data))
        finally:
            os.close(descriptor)

    def _meet(self) -> None:
        """Wait until every rank's sign lies in this folder.

        Where one is missing, the folder is not shared: rank 0 raises StoreError, and the other ranks end.
        """
        deadline = time.monotonic() + LOST_SECONDS
        while (missing := [peer.rank for peer in self._peers if not peer.read()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not self.total(len(missing)):
            return
        remove_signs(self._folder, [self._path(self.rank)])
        if self.rank:
            os._exit(1)  # rank 0 prints the error
        unseen = f"rank {', '.join(map(str, missing))} does" if missing else "another rank does"
        raise StoreError(
            f"{self._folder.parent} on {self.host}: {unseen} not see this folder; every host needs the same one, on a "
            f"network file system ({HELP})"
        )

    def _keep_watch(self) -> None:
        """Give signs of life and look for those of the others; where one is lost, end the process with one line."""
        ending = None
        while not self._closed.is_set():
            if ending is None and self._terminated(BEAT_SECONDS):
                ending = time.monotonic()  # the launcher ends this rank because of another one: look which
            self._say()
            self._look(ending is not None)
            if ending is not None:
                time.sleep(0.2)
                if time.monotonic() - ending > 5:
                    os._exit(143)

    def _terminated(self, seconds: float) -> bool:
        """Wait this long for a signal, and return whether it was SIGTERM."""
        ready, _, _ = select.select([self._pipe], [], [], seconds)
        return bool(ready) and signal.SIGTERM in os.read(self._pipe, 64)

    def _look(self, ending: bool) -> None:
        """Read the others' signs, and end this process where a rank has failed, is lost, or cannot be reached.

        ending: the launcher is about to end this process.
        """
        for peer in self._peers:
            peer.read()
        for peer in self._peers:
            if peer.left or not peer.beat:
                continue
            if peer.beat["failed"] is not None:  # it has said why; this one may be about to say the same
                if time.monotonic() - peer.changed > (0 if ending else 10):
                    os._exit(1)
            elif self._is_lost(peer):
                self._end(
                    f"rank {peer.rank} ({peer.beat['host']}) has ended: no sign of life; what is complete is kept, "
                    "--resume goes on"
                )
        waits = [since for peer in self._peers if (since := peer.waiting_since(self._waiting)) is not None]
        if not self._waiting or len(waits) < len(self._peers):
            return
        if time.monotonic() - max(waits) > STUCK_SECONDS:
            hosts = ", ".join(f"rank {peer.rank} ({peer.beat['host']})" for peer in self._peers)
            self._end(
                f"no answer from {hosts} for {format_seconds(STUCK_SECONDS)}, though alive: the network between the "
                f"hosts is down ({HELP}); what is complete is kept, --resume goes on"
            )

    def _is_lost(self, peer: "_Peer") -> bool:
        """Return whether a rank's process is gone, or has given no sign of life for LOST_SECONDS."""
        if peer.beat["host"] == self.host:
            try:
                os.kill(peer.beat["pid"], 0)
            except ProcessLookupError:
                peer.read()  # it may have left in good order a moment ago
                return not peer.left
            except PermissionError:
                pass
        return time.monotonic() - peer.changed > LOST_SECONDS

    def _end(self, message: str) -> None:
        """End this process; the lowest rank that is left prints the message."""
        alive = [peer.rank for peer in self._peers if not peer.left and not self._is_lost(peer)]
        if self.rank < min([*alive, self.size]):
            os.write(2, f"Error: {message}\n".encode())
        os._exit(1)


def remove_signs(folder: Path, paths: Iterable[Path]) -> None:
    """Remove signs of life, and their folder with the last one."""
    for path in paths:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another rank's sign, or another stage's, is still there
        folder.rmdir()


def silent_signs(folder: Path) -> list[Path]:
    """Return the signs of ranks that were killed."""
    oldest = time.time() - STALE_SECONDS
    return [path for path in folder.glob("*.json") if path.stat().st_mtime < oldest]


class _Peer:
    """Another rank, as its sign of life describes it."""

    def __init__(self, path: Path):
        """Store where the rank's sign lies; `read` reads it."""
        self.path, self.rank = path, int(path.stem.rpartition("_")[2])
        self.beat: dict[str, Any] = {}
        self.changed, self.left = time.monotonic(), False
        self._waits = (0, 0.0)

    def read(self) -> dict[str, Any]:
        """Read the rank's sign and return it; the last one where it is being written, {} where there was none yet."""
        try:
            beat = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            self.left = bool(self.beat)
            return self.beat
        except (OSError, ValueError):  # it is being written
            return self.beat
        if beat != self.beat:
            self.beat, self.changed = beat, time.monotonic()
        if beat["waiting"] != self._waits[0]:
            self._waits = (beat["waiting"], time.monotonic())
        return self.beat

    def waiting_since(self, collective: int) -> float | None:
        """Return the time at which the rank was first seen in this collective; None where it is not in it."""
        return self._waits[1] if collective and self._waits[0] == collective else None


def _wakeups() -> tuple[int, int]:
    """Return both ends of a pipe that tells which signals came, also while the main thread waits in a collective.

    SIGTERM by itself no longer ends the process.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGTERM, lambda signum, frame: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    return reading, writing


def join(folder: Path) -> SingleProcess:
    """Join the processes that share `folder`, and return this one; without `mlx.launch` it is SINGLE_PROCESS.

    Raises StoreError or WriteError where the backend is missing, a rank does not answer, or the folder is not shared.
    """
    if not launched_rank() and os.access(folder / ".ranks", os.W_OK):
        remove_signs(folder / ".ranks", silent_signs(folder / ".ranks"))
    if launched_rank() is None:
        return SINGLE_PROCESS
    backend = next(backend for name, backend in BACKENDS.items() if name in os.environ)
    if backend == "ring" and not Path(os.environ["MLX_HOSTFILE"]).read_text().strip():
        return SINGLE_PROCESS  # mlx.launch -n 1
    if not mx.distributed.is_available(backend):
        raise StoreError(
            f"mlx.launch started the backend {backend}, which this MLX has not; give --backend ring ({HELP})"
        )
    timer = threading.Timer(JOIN_SECONDS, _not_joined, [backend])
    timer.daemon = True
    timer.start()
    try:
        group = mx.distributed.init(strict=True, backend=backend)
        if group.size() == 1:
            return SINGLE_PROCESS
        ranks = LaunchedProcesses(group, folder, on_device=backend == "nccl")
    except (RuntimeError, ValueError) as error:
        raise StoreError(f"the ranks do not reach each other ({' '.join(str(error).split())[:160]}; {HELP})") from None
    finally:
        timer.cancel()
    JOINED.append(ranks)
    return ranks


def _not_joined(backend: str) -> None:
    """End this process because some rank has not started; rank 0 prints the error."""
    if not launched_rank():
        waited = format_seconds(JOIN_SECONDS)
        os.write(2, f"Error: not every rank came within {waited} (backend {backend}; {HELP})\n".encode())
    os._exit(1)
