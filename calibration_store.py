"""The only place that knows file names and keys: paths, formats, atomic writes, locks, resume checks.

NumPy only: the analyzers and other people's tools read the files without MLX. FORMAT strings and keys are a
contract (calibration_data/README.md); extra keys may be added, existing ones keep their meaning.
"""

import contextlib
import errno
import functools
import hashlib
import io
import math
import os
import re
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
STATISTICS_FORMAT = "per_timestep_npz_v2"
W4A8_FORMAT = "per_timestep_quant_config_v4"
MULTITIER_FORMAT = "per_timestep_quant_config_v3"
TEMPORAL_FORMAT = "layer_temporal_analysis_v1"
PARTIAL_FORMAT = "activation_partials_v1"
CACHE_FORMAT = "adaround_cache_v2"
WEIGHTS_FORMAT = "adaround_weights_v1"
EVALUATION_FORMAT = "evaluation_v1"
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
    temp = rf"\.(?:{pattern})\.[a-z0-9_]+{re.escape(TEMP_SUFFIX)}"
    return sorted(path for path in folder.iterdir() if re.fullmatch(f"(?:{pattern})|{temp}", path.name))


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
    """Write an uncompressed NPZ atomically; equal arrays give equal bytes.

    np.savez computes the checksums between the writes, in one thread. Here threads compute them while the data
    goes to the disk, and data begin at multiples of 64 bytes so that they can be mapped aligned. The format
    is the same: a ZIP archive of stored .npy files.
    """
    members = [(f"{key}.npy", _npy_header(array), np.ascontiguousarray(array)) for key, array in arrays.items()]
    if sum(array.nbytes + 1024 for *_, array in members) >= 2**32:
        with atomic_file(path) as file:
            np.savez(file, **arrays)  # ZIP64
        return
    with atomic_file(path) as file, ThreadPoolExecutor(max_workers=min(4, len(members))) as pool:
        checksums = [pool.submit(_crc32, header, array) for _, header, array in members]
        offsets = []
        for name, header, array in members:
            offsets.append(file.tell())
            size = len(header) + array.nbytes
            padding = -(file.tell() + _LOCAL_HEADER.size + len(name) + 4 + len(header)) % 64
            extra = struct.pack("<HH", 0xD935, padding) + bytes(padding)  # the field Android's zipalign pads with
            file.write(_LOCAL_HEADER.pack(b"PK\3\4", 20, 0, 0, 0, 33, 0, size, size, len(name), len(extra)))
            file.write(name.encode() + extra + header)
            file.write(_bytes_of(array))
        directory = file.tell()
        for (name, header, array), checksum, offset in zip(members, checksums, offsets, strict=True):
            size, crc = len(header) + array.nbytes, checksum.result()
            file.write(
                _CENTRAL_HEADER.pack(b"PK\1\2", 20, 20, 0, 0, 0, 33, crc, size, size, len(name), 0, 0, 0, 0, 0, offset)
            )
            file.write(name.encode())
        end = file.tell()
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(members), len(members), end - directory, directory, 0))
        for checksum, offset in zip(checksums, offsets, strict=True):
            file.seek(offset + 14)
            file.write(struct.pack("<L", checksum.result()))


_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3L5H2L")


def _npy_header(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    fields = np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(array) if array.ndim else array)
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _crc32(header: bytes, array: np.ndarray) -> int:
    return zlib.crc32(_bytes_of(array), zlib.crc32(header))


def write_png(path: Path, image: Any) -> None:
    """Write a PIL image as PNG atomically."""
    with atomic_file(path) as file:
        image.save(file, "PNG")


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Size in bytes of the file that `write_npz` writes."""
    size = 0
    for key, array in arrays.items():
        header = len(_npy_header(array))
        size += _LOCAL_HEADER.size + len(key) + 4 + 4
        size += -(size + header) % 64 + header + array.nbytes
    return size + sum(_CENTRAL_HEADER.size + len(key) + 4 for key in arrays) + 22


# what damaged bytes raise in zipfile, NumPy's header parser and the file system
NPZ_ERRORS = (
    ValueError, TypeError, IndexError, OSError, EOFError, AttributeError, RuntimeError, NotImplementedError, struct.error,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_npz(path: Path, remedy: str, wanted: Callable[[str], bool] = lambda key: True) -> dict[str, np.ndarray]:
    """Read the arrays of an NPZ whose keys are wanted, checksums included; read-only; pickled arrays are refused.

    np.load takes 0.1 ms a member, most of it for parsing headers and copying: too long for the thousands of
    members of statistics. Raises StoreError with `remedy` (what to run) when the file is missing or damaged.
    """
    arrays = {}
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.infolist():
                key = member.filename.removesuffix(".npy")
                if wanted(key):
                    arrays[key] = _npy_array(_member_bytes(content, member))
    except FileNotFoundError:
        raise StoreError(f"{path}: missing; {remedy}") from None
    except NPZ_ERRORS as error:
        pickled = "Object arrays cannot be loaded" in str(error)
        what = "holds a pickled array, which is not read" if pickled else "truncated or damaged"
        raise StoreError(f"{path}: {what}; {remedy}") from None
    return arrays


def _member_bytes(content: bytes, member: zipfile.ZipInfo) -> memoryview:
    """The data of one member, its checksum verified."""
    names = struct.unpack_from("<HH", content, member.header_offset + 26)
    start = member.header_offset + _LOCAL_HEADER.size + sum(names)
    data = memoryview(content)[start : start + member.compress_size]
    if member.compress_type == zipfile.ZIP_DEFLATED:
        data = memoryview(zlib.decompress(data, -zlib.MAX_WBITS))
    elif member.compress_type != zipfile.ZIP_STORED:
        raise NotImplementedError(f"compression method {member.compress_type}")
    if zlib.crc32(data) != member.CRC:
        raise zipfile.BadZipFile(f"checksum of {member.filename}")
    return data


def _npy_array(data: memoryview) -> np.ndarray:
    size, start = struct.unpack_from("<H", data, 8)[0] if data[6] == 1 else struct.unpack_from("<L", data, 8)[0], 10
    start += 0 if data[6] == 1 else 2
    shape, fortran, dtype = _npy_layout(bytes(data[: start + size]))
    array = np.frombuffer(data, dtype, math.prod(shape), start + size)
    return array.reshape(shape, order="F" if fortran else "C")


@functools.lru_cache
def _npy_layout(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    return shape, fortran, dtype


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
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._raise_failures()

    def submit(self, write, *args) -> None:
        """Queue `write(*args)`; waits while the queue is full."""
        self._slots.acquire()
        future = self._pool.submit(write, *args)
        future.add_done_callback(lambda _: self._slots.release())
        self._futures.append(future)
        self._raise_failures()

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


def run_identity(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over what the samples follow from: two runs with the same one have the same samples."""
    keys = ("model_version", "local_checkpoint", "num_steps", "cfg_scale", "negative_prompt", "latent_size", "use_t5")
    keys += ("sampler_shift", "seed_base", "activation_dtype", "stride", "batch_size")
    prompts = [image["prompt"] for image in manifest["images"]]
    return hashlib.sha256(orjson.dumps([*(manifest.get(key) for key in keys), prompts])).hexdigest()


def select_images(manifest: Mapping[str, Any], num_images: int) -> list[dict[str, Any]]:
    """num_images entries of a finished run's images, evenly over the whole run, without repeats.

    Raises StoreError when the run is unfinished or has fewer images.
    """
    images = manifest["images"]
    if len(images) < manifest["num_images"]:
        raise StoreError(
            f"the calibration run has {len(images)} of {manifest['num_images']} images; "
            f"finish it with {GENERATE} --resume (TROUBLESHOOTING_GUIDE Issue 9)"
        )
    if num_images > len(images):
        raise StoreError(
            f"--num-images {num_images}: the calibration run has {len(images)} images; give --num-images {len(images)} or fewer"
        )
    return [images[round(i)] for i in np.linspace(0, len(images) - 1, num_images)]


def select_steps(manifest: Mapping[str, Any], stride: int) -> list[int]:
    """Every stride-th of the model inputs that stage 1 saved, as step indices."""
    return saved_steps(manifest["num_steps"], manifest.get("stride", 1))[:-1][::stride]


def read_manifest(root: Path) -> dict[str, Any]:
    """Read the manifest of a calibration folder. Raises StoreError, also when an entry that the stages need is not right."""
    path = CalibrationPaths(root).manifest
    manifest = read_json(path, MANIFEST_FORMAT, GENERATE)
    for content, entries in (
        (manifest, MANIFEST_ENTRIES),
        *((image, IMAGE_ENTRIES) for image in manifest.get("images", [])),
    ):
        for key, kind in entries.items():
            if not isinstance(content.get(key) if isinstance(content, dict) else None, kind):
                raise StoreError(f"{path}: no valid entry {key!r}; run {GENERATE} with --force to make the run anew")
    return manifest


MANIFEST_ENTRIES = {
    "model_version": str,
    "num_steps": int,
    "cfg_scale": (int, float),
    "latent_size": list,
    "use_t5": bool,
}
MANIFEST_ENTRIES |= {"activation_dtype": str, "num_images": int, "images": list}
IMAGE_ENTRIES = {"image_id": int, "prompt": str, "negative_prompt": str, "seed": int, "cfg_weight": (int, float)}


def read_run_sample(
    paths: CalibrationPaths, manifest: Mapping[str, Any], image_id: int, step_index: int, schedule: list[float]
) -> dict[str, np.ndarray]:
    """`read_sample`, and its timestep must be the schedule's. Raises StoreError that names the file."""
    sample = read_sample(paths, manifest, image_id, step_index)
    if float(sample["timestep"]) != schedule[step_index]:
        raise StoreError(
            f"{paths.sample(image_id, step_index)}: a sample of another run (timestep {float(sample['timestep'])}, "
            f"expected {schedule[step_index]}); run {GENERATE} with --force to make the run anew"
        )
    return sample


# --- stages that follow: what a run is, and whether to go on with it ----------------------------------------


def check_stage(
    paths, record: Path, plan: Mapping[str, Any], options: Mapping[str, str], resume: bool, force: bool, made_by: str
) -> None:
    """Whether a stage may begin, go on or start over in its folder, as --resume and --force say. Writes nothing.

    record is the JSON file that says what the stage's run is (`plan`); options names the flag behind a key of
    it. Raises StoreError when the folder is used and neither flag is given, or when --resume would mix two runs.
    """
    owned = paths.owned_files()
    finished = [path for path in owned if path.suffix != TEMP_SUFFIX]
    if finished and not (resume or force):
        raise StoreError(f"{paths.root} holds a run already: --resume goes on with it, --force starts over")
    if finished and resume:
        if not record.exists():
            raise StoreError(f"{paths.root}: files without {record.name}; use --force to start over")
        before = read_json(record, plan["format"], made_by)
        for key, flag in options.items():
            if before.get(key) != plan[key]:
                raise StoreError(
                    f"--resume: the run in {paths.root} has {flag} {before.get(key)}, not {plan[key]}; use --force"
                )
        if before.get("calibration_run") != plan["calibration_run"]:
            raise StoreError(f"--resume: {paths.root} was made from another calibration run; use --force")


def open_stage(paths, record: Path, plan: Mapping[str, Any], force: bool) -> None:
    """After `check_stage`: remove half-written files, with `force` all of an earlier run's, and note what the run is."""
    clear_files(paths.owned_files(), record, force)
    if not record.exists():
        write_json(record, plan)


def clear_files(owned: Sequence[Path], first: Path, everything: bool) -> None:
    """Remove temporary files, or everything, `first` first: without it the others are no run."""
    for path in sorted(owned, key=lambda path: path != first):
        if everything or path.suffix == TEMP_SUFFIX:
            path.unlink()


def owned_bytes(paths) -> int:
    """Bytes on the disk of what a stage has written so far."""
    return sum(path.stat().st_size for path in paths.owned_files())


# --- stage 2A: activation statistics ------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationPaths:
    """Where stage 2A keeps what; `calib_dir` is the folder that all stages share."""

    calib_dir: Path

    @property
    def root(self) -> Path:
        return self.calib_dir / "activations"

    @property
    def statistics(self) -> Path:
        return self.root / "layer_statistics.json"

    @property
    def timestep_stats(self) -> Path:
        return self.root / "timestep_stats"

    def step_arrays(self, key: str) -> Path:
        return self.timestep_stats / f"step_{key}.npz"

    def step_index(self, key: str) -> Path:
        return self.timestep_stats / f"step_{key}_index.json"

    @property
    def quant_config(self) -> Path:
        return self.root / "quant_config.json"

    @property
    def multitier_config(self) -> Path:
        return self.root / "quant_config_multitier.json"

    @property
    def temporal_analysis(self) -> Path:
        return self.root / "layer_temporal_analysis.json"

    @property
    def multitier_temporal_analysis(self) -> Path:
        return self.root / "layer_temporal_analysis_multitier.json"

    @property
    def partials(self) -> Path:
        return self.root / "partial"

    @property
    def collection(self) -> Path:
        return self.partials / "collection.json"

    def partial(self, image_id: int, step_index: int) -> Path:
        return self.partials / f"{image_id:04d}_{step_index:03d}.npz"

    def owned_files(self) -> list[Path]:
        """Every file that stage 2A wrote, its half-written temporary files included."""
        patterns = {
            self.root: r"layer_statistics\.json",
            self.timestep_stats: r"step_\d+(\.npz|_index\.json)",
            self.partials: r"\d{4,}_\d{3,}\.npz|collection\.json",
        }
        return [path for folder, pattern in patterns.items() for path in _matching(folder, pattern)]


PARTIAL_KEYS = {"layers", "inputs", "channels", "limits", "histograms"}


def read_partial(paths: ActivationPaths, image_id: int, step_index: int) -> dict[str, np.ndarray]:
    """The statistics of one pass (arrays: PARTIAL_KEYS). Raises StoreError that names the file."""
    path = paths.partial(image_id, step_index)
    remedy = "run collect_layer_activations.py with --resume to make it anew"
    arrays = read_npz(path, remedy)
    if set(arrays) != PARTIAL_KEYS:
        raise StoreError(f"{path}: not a partial result; {remedy}")
    return arrays


def is_partial_complete(paths: ActivationPaths, image_id: int, step_index: int) -> bool:
    """Whether the result of one pass is on disk and valid."""
    try:
        read_partial(paths, image_id, step_index)
    except StoreError:
        return False
    return True


# --- stages 3A and 3A': statistics, also those that another tool wrote ---------------------------------------

COLLECT = "collect_layer_activations.py"


STATISTICS_FIELDS = ("min", "max", "shift", "hist_counts", "hist_edges")  # what a layer may have beside its averages


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer's input looked like at one step; arrays in the dtype of the file."""

    avg_min: np.ndarray  # (channels,)
    avg_max: np.ndarray  # (channels,)
    extremes: tuple[np.ndarray, np.ndarray] | None  # minimum and maximum over all images, (channels,) each
    shift: np.ndarray | None  # (channels,), post-GELU layers
    counts: np.ndarray | None  # (bins,)
    edges: np.ndarray | None  # (bins + 1,)
    entry: Mapping[str, Any]  # what the JSON index says of it; may be empty

    def reach(self) -> np.ndarray:
        """Per channel, the largest |x − shift| between the average minimum and maximum: (channels,) float64."""
        return self._reach(self.avg_min, self.avg_max)

    def full_reach(self) -> np.ndarray:
        """The same between the extremes of all images: (channels,) float64.

        A file without them but with a histogram gives the averages, wider by what the histogram's range exceeds them.
        """
        if self.extremes is not None:
            return self._reach(*self.extremes)
        if self.counts is None or not self.tensor_absmax():
            return self.reach()
        filled = np.flatnonzero(self.counts)
        widest = max(-self.edges[filled[0]], self.edges[filled[-1] + 1])
        return self.reach() * max(1.0, widest / self.tensor_absmax())

    def _reach(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        shift = 0.0 if self.shift is None else self.shift.astype(np.float64)
        return np.maximum(np.abs(low - shift), np.abs(high - shift)).astype(np.float64)

    def tensor_absmax(self) -> float:
        """max over channels of max(|avg_min|, |avg_max|)."""
        return float(max(-self.avg_min.min(), self.avg_max.max(), self.avg_min.max(), -self.avg_max.min()))


@dataclass(frozen=True)
class ActivationStatistics:
    """The statistics of a run (format per_timestep_npz_v2), read a step at a time."""

    path: Path
    timestep_dir: Path
    step_keys: list[str]
    sigma_map: dict[str, float]
    metadata: dict[str, Any]

    def read_step(self, key: str, fields: Sequence[str] = STATISTICS_FIELDS) -> dict[str, LayerStatistics]:
        """Every layer's statistics at one step: the limits, and these of the fields that a layer may have.

        Raises StoreError, one line that names file and layer, when something is missing, not finite or impossible.
        """
        index_path, path = self.timestep_dir / f"step_{key}_index.json", self.timestep_dir / f"step_{key}.npz"
        remedy = f"run {COLLECT} to make it anew"
        index = _read_index(index_path, remedy)
        suffixes = tuple(f"__{field}" for field in ("avg_min", "avg_max", *fields))
        arrays = read_npz(path, remedy, lambda member: member.endswith(suffixes))
        layers = {}
        for name, entry in index.items():
            prefix = name.replace(".", "_")
            low, high, shift, counts, edges = (
                arrays.get(f"{prefix}__{field}")
                for field in ("avg_min", "avg_max", "shift", "hist_counts", "hist_edges")
            )
            extremes = (arrays.get(f"{prefix}__min"), arrays.get(f"{prefix}__max"))
            extremes = None if any(array is None for array in extremes) else extremes
            if low is None or high is None:
                raise StoreError(
                    f"{path}: no {prefix}__avg_min and __avg_max for layer {name} of {index_path.name}; {remedy}"
                )
            layers[name] = LayerStatistics(low, high, extremes, shift, counts, edges, entry)
            fault = _statistics_fault(layers[name])
            if fault:
                raise StoreError(f"{path}: {name}: {fault}; {remedy}")
        return layers


def _read_index(path: Path, remedy: str) -> dict[str, Mapping[str, Any]]:
    try:
        index = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{path}: missing; {remedy}") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise StoreError(f"{path}: not valid JSON ({error}); {remedy}") from None
    if not isinstance(index, dict) or not index or not all(isinstance(entry, dict) for entry in index.values()):
        raise StoreError(f"{path}: not an index of layers; {remedy}")
    return index


def _statistics_fault(layer: LayerStatistics) -> str | None:
    """What makes a layer's statistics unusable, or None."""
    if layer.avg_min.ndim != 1 or layer.avg_min.shape != layer.avg_max.shape or not layer.avg_min.size:
        return f"avg_min {layer.avg_min.shape} and avg_max {layer.avg_max.shape} are not of equal length"
    low, high = layer.extremes or (None, None)
    arrays = {"avg_min": layer.avg_min, "avg_max": layer.avg_max, "shift": layer.shift, "min": low, "max": high}
    for field, array in arrays.items():
        if array is not None and array.shape != layer.avg_min.shape:
            return f"{field} {array.shape} is not of the length of avg_min {layer.avg_min.shape}"
        if array is not None and not np.isfinite(array).all():
            return f"{field} holds NaN or infinity"
    if (layer.avg_min > layer.avg_max).any():
        return "avg_min is above avg_max"
    if any(isinstance(value, float) and not math.isfinite(value) for value in layer.entry.values()):
        return "the index holds NaN or infinity"
    if layer.counts is not None:
        if layer.edges is None or layer.edges.shape != (layer.counts.size + 1,):
            return "hist_counts and hist_edges do not belong together"
        if not (layer.edges[1:] > layer.edges[:-1]).all():
            return "the histogram has bins of zero width"
        if layer.counts.min() < 0 or not layer.counts.any():
            return "the histogram is empty or negative"
    return None


def read_statistics(path: Path) -> ActivationStatistics:
    """Open layer_statistics.json; `timestep_dir` may be absolute, beside the file, or relative to the working folder.

    Raises StoreError when the format is not per_timestep_npz_v2 or an entry is missing.
    """
    content = read_json(path, STATISTICS_FORMAT, COLLECT)
    keys, sigmas = content.get("step_keys"), content.get("sigma_map")
    if not isinstance(keys, list) or not keys:
        raise StoreError(f"{path}: no valid entry 'step_keys'; run {COLLECT} to make it anew")
    for key in map(str, keys):
        if not isinstance(sigmas, dict) or not isinstance(sigmas.get(key), (int, float)):
            raise StoreError(f"{path}: 'sigma_map' has no sigma for step {key}; run {COLLECT} to make it anew")
    folder = Path(str(content.get("timestep_dir", "timestep_stats")))
    candidates = [path.parent / folder, folder]  # an absolute folder is both
    timestep_dir = next((candidate for candidate in candidates if candidate.is_dir()), None)
    if timestep_dir is None:
        raise StoreError(f"{path}: its 'timestep_dir' {folder} is neither beside it nor in the working folder")
    keys = [str(key) for key in keys]
    return ActivationStatistics(
        path, timestep_dir, keys, {key: float(sigmas[key]) for key in keys}, content.get("metadata") or {}
    )


def write_quant_config(path: Path, head: Mapping[str, Any], steps: Iterator[tuple[str, Mapping]]) -> None:
    """Write a quantization config atomically, `per_timestep` a step at a time: compact, never whole in memory."""
    with atomic_file(path) as file:
        file.write(orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)[:-1] + b',"per_timestep":{')
        for position, (key, layers) in enumerate(steps):
            file.write(b"," if position else b"")
            file.write(orjson.dumps(key) + b":" + orjson.dumps(layers, option=orjson.OPT_SERIALIZE_NUMPY))
        file.write(b"}}\n")


def refuse_other_format(path: Path, own_format: str, option: str) -> None:
    """Raise StoreError when `path` is a file that another stage wrote: an output never takes its place."""
    if path.exists():
        with path.open("rb") as file:
            if f'"format":"{own_format}"'.encode() not in file.read(200).replace(b'": "', b'":"'):
                raise StoreError(f"{path}: exists and is no {own_format} file; give another {option}")


# --- stage 2W: the block cache ------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockCachePaths:
    """Where stage 2W keeps what; `calib_dir` is the folder that all stages share."""

    calib_dir: Path

    @property
    def root(self) -> Path:
        return self.calib_dir / "adaround_cache"

    @property
    def metadata(self) -> Path:
        return self.root / "metadata.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    def sample(self, image_id: int, step_index: int) -> Path:
        return self.samples / f"{image_id:04d}_{step_index:03d}.npz"

    def owned_files(self) -> list[Path]:
        """Every file that stage 2W wrote, its half-written temporary files included."""
        patterns = {self.root: r"(metadata|plan)\.json", self.samples: r"\d{4,}_\d{3,}\.npz"}
        return [path for folder, pattern in patterns.items() for path in _matching(folder, pattern)]


CACHE_REMEDY = "run cache_adaround_data.py with --resume to make it anew"


def map_npz(path: Path, keys: Sequence[str], remedy: str) -> dict[str, np.ndarray]:
    """Members of an uncompressed NPZ, mapped read-only where they lie in the file: only what is used is read.

    Raises StoreError when the file or a member is missing or damaged, or when members are compressed.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for key in keys:
                member = archive.getinfo(f"{key}.npy")
                if member.compress_type != zipfile.ZIP_STORED:
                    raise StoreError(f"{path}: compressed members cannot be mapped; {remedy}")
                file.seek(member.header_offset)
                header = file.read(30)
                file.seek(
                    int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR
                )
                start = file.tell()
                head = file.read(12)
                size = (
                    10 + int.from_bytes(head[8:10], "little")
                    if head[6] == 1
                    else 12 + int.from_bytes(head[8:12], "little")
                )
                file.seek(start)
                shape, fortran, dtype = _npy_layout(file.read(size))
                order = "F" if fortran else "C"
                arrays[key] = np.memmap(path, dtype, "r", offset=file.tell(), shape=shape, order=order)
    except FileNotFoundError:
        raise StoreError(f"{path}: missing; {remedy}") from None
    except KeyError as error:
        raise StoreError(f"{path}: {error.args[0]}; {remedy}") from None
    except NPZ_ERRORS as error:
        raise StoreError(f"{path}: truncated or damaged ({error}); {remedy}") from None
    return arrays


@dataclass(frozen=True)
class CachedBlock:
    """What one block saw and gave in one pass: tokens (R, tokens, 1, hidden) float16, mapped from the file."""

    image_id: int
    step_index: int
    inputs: tuple[np.ndarray, ...]  # (image, text) for mm blocks, (tokens,) for uni blocks
    outputs: tuple[np.ndarray, ...]  # (image, text), (image,) for the last mm block, (tokens,) for uni blocks
    modulation_input: np.ndarray  # (R, 1, 1, hidden)


def read_cache_metadata(calib_dir: Path) -> dict[str, Any]:
    """The block cache's metadata. Raises StoreError when there is none or it is of another calibration run."""
    path = BlockCachePaths(calib_dir).metadata
    metadata = read_json(path, CACHE_FORMAT, "cache_adaround_data.py")
    manifest = CalibrationPaths(calib_dir).manifest
    if manifest.exists() and metadata.get("calibration_run") not in (None, run_identity(read_manifest(calib_dir))):
        raise StoreError(
            f"{path}: made from another calibration run than {manifest}; run cache_adaround_data.py --force"
        )
    return metadata


def read_cached_block(calib_dir: Path, block: str, last: str | None = None) -> Iterator[CachedBlock]:
    """One block's inputs and outputs over all samples of the cache, without loading any other block's.

    With `last`, the inputs of `block` and the outputs of `last`: a stretch of blocks. Raises StoreError (also after the
    first samples) when a file is missing, damaged or of another run.
    """
    paths, metadata = BlockCachePaths(calib_dir), read_cache_metadata(calib_dir)
    for name in (block, last or block):
        if name not in metadata["block_names"]:
            cached = ", ".join(metadata["block_names"])
            raise StoreError(f"{paths.metadata}: block {name} is not cached (it has {cached})")
    input_keys = metadata["block_shapes"][block]["input_keys"]
    output_keys = metadata["block_shapes"][last or block]["output_keys"]
    for sample in metadata["samples"]:
        arrays = map_npz(paths.root / sample["file"], [*input_keys, *output_keys, "modulation_input"], CACHE_REMEDY)
        yield CachedBlock(
            sample["image_id"],
            sample["step_index"],
            tuple(arrays[key] for key in input_keys),
            tuple(arrays[key] for key in output_keys),
            arrays["modulation_input"],
        )


def is_cached(paths: BlockCachePaths, image_id: int, step_index: int, keys: Sequence[str]) -> bool:
    """Whether a sample of the block cache is on disk, whole, with these keys."""
    try:
        map_npz(paths.sample(image_id, step_index), keys, CACHE_REMEDY)
    except StoreError:
        return False
    return True


# --- stage 3W: learned rounding -----------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightPaths:
    """Where stage 3W keeps what; `calib_dir` is the folder that all stages share."""

    calib_dir: Path

    @property
    def root(self) -> Path:
        return self.calib_dir / "adaround_weights"

    @property
    def metadata(self) -> Path:
        return self.root / "metadata.json"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint.npz"

    def block(self, block: str) -> Path:
        return self.root / f"{block}.npz"

    def losses(self, block: str) -> Path:
        return self.root / f"{block}_losses.json"

    def owned_files(self) -> list[Path]:
        """Every file that stage 3W wrote, its half-written temporary files included."""
        return _matching(self.root, r"(metadata|plan)\.json|checkpoint\.npz|(mm|uni)\d+(\.npz|_losses\.json)")


def read_quantized_block(paths: WeightPaths, block: str) -> dict[str, dict[str, np.ndarray]]:
    """The learned quantization of one block: {layer: {field: array}}, fields as in FORMATS.

    Raises StoreError that names the file.
    """
    remedy = "run optimize_adaround.py with --resume to make it anew"
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, array in read_npz(paths.block(block), remedy).items():
        name, _, field = key.rpartition("__")
        layers.setdefault(layer_name(name), {})[field] = array
    for name, fields in layers.items():
        if not {"q", "scale", "zero_point"} <= set(fields):
            raise StoreError(f"{paths.block(block)}: {name}: no codes, scale or zero point; {remedy}")
    return layers


def layer_name(prefix: str) -> str:
    """mm0_img_mlp_fc2 -> mm0.img.mlp.fc2 (q_proj and its like keep their underscore)."""
    return re.sub(r"_(?!proj)", ".", prefix)


# --- stage 4: evaluation ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationPaths:
    """Where stage 4 keeps what; `root` is evaluation/ below the folder that all stages share, or --output."""

    root: Path

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    @property
    def grid(self) -> Path:
        return self.root / "grid.png"

    @property
    def error_plot(self) -> Path:
        return self.root / "error_over_steps.png"

    def run(self, variant: str, identity: str) -> Path:
        """The images and latents of one variant; identity says what they follow from."""
        return self.root / "runs" / f"{variant}_{identity[:16]}.npz"
