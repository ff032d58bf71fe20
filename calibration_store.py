"""The only place that knows file names and keys: paths, formats, atomic writes, locks, resume checks.

NumPy only: the analyzers and other people's tools read the files without MLX. FORMAT strings and keys are a
contract (calibration_data/README.md); extra keys may be added, existing ones keep their meaning.
"""

import contextlib
import errno
import io
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import click
import filelock
import numpy as np
import orjson

MANIFEST_FORMAT = "calibration_manifest_v1"
TEMP_SUFFIX = ".tmp"
GENERATE = "generate_calibration_data.py"


class StoreError(click.ClickException):
    """A file or folder is not what it should be; the message is one line that says what to do."""

    exit_code = 2


class WriteError(StoreError):
    """A file could not be written; what was complete before stays complete."""

    exit_code = 1


# --- paths --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationPaths:
    """Where stage 1 keeps what, below one `--calib-dir`."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def images(self) -> Path:
        return self.root / "images"

    def sample(self, image_id: int, step_index: int) -> Path:
        return self.samples / f"{image_id:04d}_{step_index:03d}.npz"

    def image(self, image_id: int) -> Path:
        return self.images / f"{image_id:04d}.png"

    def owned_files(self) -> list[Path]:
        """Every file that stage 1 wrote here, its half-written temporary files included."""
        patterns = {
            self.root: r"manifest\.json",
            self.samples: r"\d{4,}_\d{3,}\.npz",
            self.images: r"\d{4,}\.png",
        }
        return [path for folder, pattern in patterns.items() for path in _matching(folder, pattern)]


def _matching(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        return []
    temp = rf"\.{pattern}\.[a-z0-9_]+{re.escape(TEMP_SUFFIX)}"
    return sorted(path for path in folder.iterdir() if re.fullmatch(f"{pattern}|{temp}", path.name))


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create `folder` and hold it against a second writer until the block ends. The lock leaves no file.

    A folder that is still empty at the end is removed again. Raises StoreError when another process holds it
    or it cannot be written.
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


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise StoreError when the disk of `folder` (which need not exist yet) cannot hold num_bytes more."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise StoreError(
            f"{folder}: needs {num_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; "
            "free some, or lower the number of images or raise --stride"
        )


# --- atomic files -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[io.BufferedWriter]:
    """Open a temporary file beside `path`; on success flush it to the disk and rename it, else remove it.

    Raises WriteError for what the operating system refuses (full disk, missing right).
    """
    temp = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temp = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMP_SUFFIX, dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temp, 0o644)
        os.replace(temp, path)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise WriteError(f"cannot write {path}: {reason}") from None
    finally:
        if temp is not None:
            Path(temp).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the renames inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically, indented, keys in the order given. NumPy scalars and arrays are accepted."""
    with atomic_file(path) as file:
        file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def read_json(path: Path, expected_format: str, made_by: str) -> dict[str, Any]:
    """Read a JSON file of a known format. Raises StoreError that names the script which writes it."""
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{path}: not found; run {made_by} first") from None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise StoreError(f"{path}: not valid JSON ({error}); run {made_by} --force to make it anew") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != expected_format:
        raise StoreError(f"{path}: format {found!r} is not {expected_format!r}; run {made_by} to make it anew")
    return content


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an uncompressed NPZ atomically; equal arrays give equal bytes."""
    with atomic_file(path) as file:
        np.savez(file, **arrays)


def write_png(path: Path, image: Any) -> None:
    """Write a PIL image as PNG atomically."""
    with atomic_file(path) as file:
        image.save(file, "PNG")


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Size in bytes of the file that `write_npz` would write."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.tell()


def read_npz(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """Read every array of an NPZ, checksums included; pickled arrays are refused.

    Raises StoreError with `remedy` (what to run) when the file is missing, truncated or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise StoreError(f"{path}: missing; {remedy}") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, AttributeError) as error:
        pickled = "allow_pickle" in str(error)
        what = "holds a pickled array, which is not read" if pickled else "truncated or damaged"
        raise StoreError(f"{path}: {what}; {remedy}") from None


class BackgroundWriter:
    """Runs writes on one thread, in order, with at most `pending` waiting: memory stays bounded by them.

    A failed write is raised by the next `submit` or by leaving the `with` block.
    """

    def __init__(self, pending: int = 1):
        self._slots = BoundedSemaphore(pending + 1)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._futures: list[Future] = []

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self._raise_failures()

    def submit(self, write, *args) -> None:
        """Queue `write(*args)`; waits while the queue is full."""
        self._slots.acquire()
        self._raise_failures()
        future = self._pool.submit(write, *args)
        future.add_done_callback(lambda _: self._slots.release())
        self._futures.append(future)

    def drain(self) -> None:
        """Wait until everything submitted is written."""
        for future in self._futures:
            future.result()
        self._futures.clear()

    def _raise_failures(self) -> None:
        done = [future for future in self._futures if future.done()]
        self._futures = [future for future in self._futures if not future.done()]
        for future in done:
            future.result()


# --- stage 1: manifest and samples --------------------------------------------------------------------------


def sample_arrays(
    x: np.ndarray, timestep: np.ndarray, sigma: float, step_index: int, image_id: int, is_final: bool
) -> dict[str, np.ndarray]:
    """The arrays of one sample file. x (1, h, w, 16) and timestep () share the activation dtype."""
    return {
        "x": x,
        "timestep": np.asarray(timestep, dtype=x.dtype),
        "sigma": np.float32(sigma),
        "step_index": np.int32(step_index),
        "image_id": np.int32(image_id),
        "is_final": np.bool_(is_final),
    }


def read_sample(paths: CalibrationPaths, manifest: Mapping[str, Any], image_id: int, step_index: int) -> dict:
    """Read one sample and check that it belongs to this run.

    Raises StoreError that names the file when it is missing, damaged, or of another image, step, size or dtype.
    """
    path = paths.sample(image_id, step_index)
    remedy = f"run {GENERATE} with --resume to make it anew"
    arrays = read_npz(path, remedy)
    try:
        found = (int(arrays["image_id"]), int(arrays["step_index"]), arrays["x"].shape, str(arrays["x"].dtype))
        arrays["timestep"], arrays["sigma"], arrays["is_final"]
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: not a calibration sample ({error}); {remedy}") from None
    expected = (image_id, step_index, (1, *manifest["latent_size"], 16), manifest["activation_dtype"])
    if found != expected:
        names = ("image_id", "step_index", "shape of x", "dtype of x")
        wrong = "; ".join(f"{n} {f}, expected {e}" for n, f, e in zip(names, found, expected, strict=True) if f != e)
        raise StoreError(f"{path}: a sample of another run ({wrong}); {remedy}")
    return arrays


def saved_steps(num_steps: int, stride: int) -> list[int]:
    """Step indices that stage 1 keeps: every stride-th model input, and num_steps for the finished latent."""
    return [*range(0, num_steps, stride), num_steps]


def is_complete(paths: CalibrationPaths, manifest: Mapping[str, Any], image_id: int) -> bool:
    """Whether every file of an image is on disk and valid."""
    if manifest["save_images"] and not _is_whole_png(paths.image(image_id)):
        return False
    try:
        for step_index in saved_steps(manifest["num_steps"], manifest["stride"]):
            read_sample(paths, manifest, image_id, step_index)
    except StoreError:
        return False
    return True


def _is_whole_png(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")


def read_manifest(root: Path) -> dict[str, Any]:
    """Read the manifest of a calibration folder. Raises StoreError."""
    return read_json(CalibrationPaths(root).manifest, MANIFEST_FORMAT, GENERATE)
