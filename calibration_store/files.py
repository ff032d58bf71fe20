"""Atomic writes, locks, free space, JSON and PNG files, and a thread that writes."""

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore
from types import TracebackType
from typing import Any

import filelock
import orjson
from PIL import Image, PngImagePlugin

from calibration_store.errors import StoreError, WriteError
from calibration_store.sizes import format_bytes

TEMP_SUFFIX = ".tmp"
LARGEST = 256 * 2**20  # limit in bytes of a file that is read as a whole; some formats have a limit of their own


def files_matching(folder: Path, pattern: str) -> list[Path]:
    """Return the files in a folder whose names match a pattern, and the temporary files of such names, sorted.

    A folder that does not exist has none. Raises StoreError for a folder that cannot be read.
    """
    if not os.path.isdir(folder):
        return []
    temp = rf"\.(?:{pattern})\.[a-z0-9_]+{re.escape(TEMP_SUFFIX)}"
    try:
        found = [path for path in folder.iterdir() if re.fullmatch(f"(?:{pattern})|{temp}", path.name)]
    except OSError as error:
        raise StoreError(f"{folder}: cannot be read ({error.strerror})") from None
    return sorted(path for path in found if not path.is_dir())


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create `folder`, and lock it against a second writer until the block ends. The lock leaves no file.

    A folder that is still empty at the end is removed again. Raises StoreError when another process holds the folder,
    or when the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise StoreError(f"cannot write to {folder}: no right to, or a read-only disk")
        if not filelock.lock_descriptor(descriptor, blocking=False):
            raise StoreError(f"{folder}: another process is writing here; wait for it to end or use another folder")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # refuses unless empty
    finally:
        os.close(descriptor)


def require_space(
    folder: Path, num_bytes: int, remedy: str = "lower --num-images or raise --stride", budget: int | None = None
) -> None:
    """Raise StoreError when `num_bytes` exceed the budget, or the free bytes of the disk that holds `folder`.

    The folder need not exist yet. remedy: what the message advises. budget: bytes of --max-bytes; None: no limit.
    """
    if budget is not None and num_bytes > budget:
        raise StoreError(
            f"{folder}: needs {format_bytes(num_bytes)}, --max-bytes allows {format_bytes(budget)}; {remedy}"
        )
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise StoreError(
            f"{folder}: needs {format_bytes(num_bytes)}, the disk has {format_bytes(free)} free; free some, or {remedy}"
        )


@contextlib.contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[io.BufferedWriter]:
    """Open a temporary file beside `path`; on success flush it to the disk and rename it, else remove it.

    durable: wait until the disk has the bytes. Without the wait a power loss may leave a torn file, which only its
    checksums show. Raises WriteError where the operating system refuses (full disk, missing right).
    """
    with replacements() as files, files.write(path, durable) as file:
        yield file


class Replacements:
    """Several files that are written under temporary names, and renamed when all of them are on the disk."""

    def __init__(self) -> None:
        self.written: dict[Path, Path] = {}  # path -> the temporary file beside it, until that one is renamed

    @contextlib.contextmanager
    def write(self, path: Path, durable: bool = True) -> Iterator[io.BufferedWriter]:
        """Open a temporary file beside `path`, and flush it to the disk at the end of the block. Raises WriteError."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMP_SUFFIX}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                self.written[path] = temporary
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(f"cannot write {path}: {refusal(error)}") from None

    def rename(self) -> None:
        """Put the files in their places, in the order in which they were written. Raises WriteError."""
        for path, temporary in list(self.written.items()):
            try:
                os.replace(temporary, path)
            except OSError as error:
                raise WriteError(f"cannot write {path}: {refusal(error)}") from None
            del self.written[path]

    def discard(self) -> None:
        """Remove the temporary files that are left."""
        for temporary in self.written.values():
            temporary.unlink(missing_ok=True)
        self.written.clear()


@contextlib.contextmanager
def replacements() -> Iterator[Replacements]:
    """Collect the files that the block writes, and rename them into place at its end; after an error remove them.

    Raises WriteError.
    """
    files = Replacements()
    try:
        yield files
        files.rename()
    finally:
        files.discard()


def refusal(error: OSError) -> str:
    """Return the operating system's message, or plain words where the disk is full."""
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the name of the temporary file of `atomic_file`, for libraries that open a file by its name."""
    with atomic_file(path) as file:
        yield Path(file.name)


def remove_file(path: Path) -> None:
    """Remove a file, if it exists. Raises WriteError where the operating system refuses."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"cannot remove {path}: {error.strerror}") from None


def clear_temporaries(folder: Path, pattern: str) -> None:
    """Remove the temporary files that a kill left, of files whose names match a pattern. Raises WriteError."""
    for path in files_matching(folder, pattern):
        if path.suffix == TEMP_SUFFIX:
            remove_file(path)


def remove_folder(folder: Path, owned: Sequence[Path]) -> None:
    """Remove the files that a stage owns, then their folder, unless it holds other files. Raises WriteError."""
    for path in owned:
        remove_file(path)
    with contextlib.suppress(OSError):  # not empty, or not there
        folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Make the renames inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_regular(
    path: Path, remedy: str, absent: str = "not found", limit: int | None = LARGEST
) -> Iterator[io.BufferedReader]:
    """Open a regular file for reading: neither a pipe nor a device, and at most `limit` bytes large.

    Raises StoreError in the operating system's words, and with `remedy` where the file is absent or too large.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would wait for a writer
            found = os.fstat(file.fileno())
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(found.st_mode):
                raise StoreError(f"{path}: a pipe or a device, not a file; {remedy}")
            if limit is not None and found.st_size > limit:
                raise StoreError(f"{path}: {format_bytes(found.st_size)}, more than such a file can have; {remedy}")
            yield file
    except OSError as error:
        raise StoreError(f"{path}: {why_unreadable(path, error, remedy, absent)}") from None


def read_bytes(path: Path, remedy: str, absent: str = "not found", limit: int | None = LARGEST) -> bytes:
    """Return a file's content. Raises StoreError as `open_regular` does, and where the memory is too small."""
    try:
        with open_regular(path, remedy, absent, limit) as file:
            return file.read()
    except MemoryError:
        raise StoreError(f"{path}: does not fit into memory; {remedy}") from None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file. Raises StoreError when it cannot be read."""
    digest = hashlib.sha256()
    with open_regular(path, "make it anew", limit=None) as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def why_unreadable(path: Path, error: OSError, remedy: str, absent: str = "not found") -> str:
    """Return why a file could not be read, with `remedy` where the file does not exist."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        if path.is_symlink():
            return f"a link to {os.readlink(path)}, which does not exist; mend or remove the link"
        return f"{absent}; {remedy}"
    if error.errno == errno.ELOOP:
        return "a link that leads back to itself; remove it"
    return f"cannot be read ({error.strerror})"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically: indented, with the keys in the order given. NumPy scalars and arrays are accepted."""
    with atomic_file(path) as file:
        file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def write_png(path: Path, image: Image.Image, chunks: Mapping[str, str] | None = None) -> None:
    """Write an image as PNG atomically. chunks: text by keyword, which image programs show (prompt, seed)."""
    text = PngImagePlugin.PngInfo()
    for key, value in (chunks or {}).items():
        text.add_itxt(key, value)
    with atomic_file(path) as file:
        image.save(file, "PNG", pnginfo=text)


class BackgroundWriter:
    """A queue of writes that run on threads of their own; at most `pending` writes wait, which bounds the memory.

    One thread writes in the order of submission, several threads write in any order. A failed write is raised by the
    next `submit`, or at the end of the `with` block.
    """

    def __init__(self, pending: int = 1, threads: int = 1):
        self._slots = BoundedSemaphore(pending + threads)
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="writer")
        self._futures: list[Future[Any]] = []

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._raise_failures()

    def submit(self, write: Callable[..., Any], *args: Any) -> None:
        """Queue `write(*args)`, after a wait where the queue is full. Raises the error of an earlier write."""
        self._slots.acquire()
        future = self._pool.submit(write, *args)
        future.add_done_callback(lambda _: self._slots.release())
        self._futures.append(future)
        self._raise_failures()

    def drain(self) -> None:
        """Wait until every submitted write is done. Raises the error of a failed write."""
        for future in self._futures:
            future.result()
        self._futures.clear()

    def _raise_failures(self) -> None:
        done = [future for future in self._futures if future.done()]
        self._futures = [future for future in self._futures if not future.done()]
        for future in done:
            future.result()
