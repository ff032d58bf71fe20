"""Write, read and map NPZ files without the slow parts of np.savez and np.load."""

import functools
import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from calibration_store.errors import StoreError
from calibration_store.files import atomic_file, open_regular, read_bytes


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], durable: bool = True) -> None:
    """Write an uncompressed NPZ atomically; equal arrays give equal bytes. durable: as `atomic_file`.

    np.savez computes the checksums between the writes, in one thread. Here threads compute them while the data go to
    the disk, and data begin at multiples of 64 bytes, so that a mapped array is aligned. The format is the same: a ZIP
    archive of stored .npy files. Raises WriteError.
    """
    members = [(f"{key}.npy", _npy_header(array), np.ascontiguousarray(array)) for key, array in arrays.items()]
    if sum(array.nbytes + 1024 for *_, array in members) >= 2**32:
        with atomic_file(path, durable) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # ZIP64; NumPy's stubs take the arrays for allow_pickle
        return
    with atomic_file(path, durable) as file, ThreadPoolExecutor(max_workers=min(4, len(members))) as pool:
        checksums = [pool.submit(_crc32, header, array) for _, header, array in members]
        offsets = []
        for name, header, array in members:
            offsets.append(file.tell())
            size = len(header) + array.nbytes
            padding = -(file.tell() + _LOCAL_HEADER.size + len(name) + 4 + len(header)) % 64
            extra = struct.pack("<HH", 0xD935, padding) + bytes(padding)  # the padding field of Android's zipalign
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
    return array.reshape(-1).view(np.uint8).data


def _crc32(header: bytes, array: np.ndarray) -> int:
    return zlib.crc32(_bytes_of(array), zlib.crc32(header))


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Return the size in bytes of the file that `write_npz` writes of these arrays."""
    size = 0
    for key, array in arrays.items():
        header = len(_npy_header(array))
        size += _LOCAL_HEADER.size + len(key) + 4 + 4
        size += -(size + header) % 64 + header + array.nbytes
    return size + sum(_CENTRAL_HEADER.size + len(key) + 4 for key in arrays) + 22


# Damaged bytes raise these errors in zipfile, in the file system, and in NumPy's header parser, which may run out of
# memory or depth.
NPZ_ERRORS = (
    ValueError, TypeError, IndexError, OSError, EOFError, AttributeError, RuntimeError, NotImplementedError,
    struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error, MemoryError, RecursionError,
)  # fmt: skip
LARGEST_NPZ = 16 * 2**30  # limit in bytes of a file that is read as a whole; compressed members unpack to a quarter
HEADER_BYTES = 2**14  # limit of the header of an .npy file, which takes far less
SMALL_MEMBER = 2**20  # bytes up to which a member is unpacked at once, and looked for among those already unpacked
NPY_MAGIC = b"\x93NUMPY"


def read_npz(path: Path, remedy: str, wanted: Callable[[str], bool], limit: int = LARGEST_NPZ) -> dict[str, np.ndarray]:
    """Read the arrays of an NPZ whose keys are wanted, and verify their checksums. The arrays are read-only.

    limit: bytes that the file may have; compressed members that are wanted may unpack to a quarter of it, and other
    members are not unpacked. np.load takes 0.1 ms a member, most of it for parsing headers and copying: too long for
    the thousands of members of statistics. Small members of the same bytes, as q, k and v have in statistics, give one
    array. Raises StoreError with `remedy` (the command to run) when the file is missing, damaged or larger, or when a
    member is pickled.
    """
    return npz_arrays(path, read_bytes(path, remedy, "missing", limit), remedy, wanted, limit // 4)


def npz_arrays(
    path: Path, content: bytes, remedy: str, wanted: Callable[[str], bool], limit: int
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return the wanted arrays of an NPZ whose content has been read, as `read_npz` does.

    path: the file that a StoreError names. limit: bytes that compressed members may unpack to.
    """
    arrays, left = {}, limit
    known: dict[tuple[int, ...], tuple[memoryview, np.ndarray]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.infolist():
                key = member.filename.removesuffix(".npy")
                if not wanted(key):
                    continue
                if member.compress_type != zipfile.ZIP_STORED:
                    left -= member.file_size
                if left < 0:
                    raise ValueError("more than such a file holds")
                packed = _packed_bytes(content, member)
                sizes = (member.CRC, member.compress_type, member.file_size, member.compress_size)
                small = max(sizes[2:]) <= SMALL_MEMBER
                before = known.get(sizes) if small else None
                if before is not None and bytes(before[0]) == bytes(packed):
                    arrays[key] = before[1]
                    continue
                arrays[key] = _npy_array(_unpacked(packed, member))
                if small:
                    known[sizes] = packed, arrays[key]
    except NPZ_ERRORS as error:
        pickled = "Object arrays cannot be loaded" in str(error)
        what = "holds a pickled array, which is not read" if pickled else "truncated or damaged"
        raise StoreError(f"{path}: {what}; {remedy}") from None
    return arrays


def _packed_bytes(content: bytes | memoryview, member: zipfile.ZipInfo) -> memoryview:
    """Return the data of one member as they lie in the file. Raises one of NPZ_ERRORS."""
    names = struct.unpack_from("<HH", content, member.header_offset + 26)
    start = member.header_offset + _LOCAL_HEADER.size + sum(names)
    return memoryview(content)[start : start + member.compress_size]


def _unpacked(data: memoryview, member: zipfile.ZipInfo, checked: bool = True) -> memoryview:
    """Return the bytes of an array's file. A large compressed one is unpacked when the array's header fits its size.

    data: what `_packed_bytes` returned; checked: verify the checksum. Raises one of NPZ_ERRORS.
    """
    if member.compress_type == zipfile.ZIP_DEFLATED:
        if member.file_size > SMALL_MEMBER:
            head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, HEADER_BYTES)
            begin, shape, dtype, _ = _npy_head(memoryview(head))
            _check_size(member.file_size - begin, shape, dtype)
        data = memoryview(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.file_size + 1))
    elif member.compress_type != zipfile.ZIP_STORED:
        raise NotImplementedError(f"compression method {member.compress_type}")
    if checked and zlib.crc32(data) != member.CRC:
        raise zipfile.BadZipFile(f"checksum of {member.filename}")
    return data


def _npy_head(data: memoryview) -> tuple[int, tuple[int, ...], np.dtype, bool]:
    """Return (offset of the data, shape, dtype, Fortran order) of an .npy file. Raises one of NPZ_ERRORS."""
    if bytes(data[:6]) != NPY_MAGIC:
        raise ValueError("no .npy file")
    size, start = (
        (struct.unpack_from("<H", data, 8)[0], 10) if data[6] == 1 else (struct.unpack_from("<L", data, 8)[0], 12)
    )
    if size > HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes")
    shape, fortran, dtype = _npy_layout(bytes(data[: start + size]))
    return start + size, shape, dtype, fortran


def _check_size(found: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise ValueError unless an array of this shape takes the bytes that were found."""
    if min(shape, default=0) < 0 or found != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{found} bytes for shape {shape} of {dtype}")


def _npy_array(data: memoryview) -> np.ndarray:
    """Return the array of a whole .npy file: without a copy, but for a big-endian one, which MLX does not know."""
    begin, shape, dtype, fortran = _npy_head(data)
    _check_size(len(data) - begin, shape, dtype)
    array = np.frombuffer(data, dtype, math.prod(shape), begin).reshape(shape, order="F" if fortran else "C")
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
        array.flags.writeable = False
    return array


@functools.lru_cache
def _npy_layout(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    return shape, fortran, dtype


def map_npz(
    path: Path, keys: Sequence[str], remedy: str, checked: bool = False, optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return members of an uncompressed NPZ as read-only maps of the file: the disk is read where an array is used.

    checked: verify the members' checksums, which reads them whole. optional: members that the file may lack. Raises
    StoreError when the file or a member is missing or damaged, or when a member is compressed.
    """
    arrays = {}
    try:
        with open_regular(path, remedy, "missing", None) as file, zipfile.ZipFile(file) as archive:
            content = np.memmap(file, np.uint8, "r").data
            for key in [*keys, *(key for key in optional if f"{key}.npy" in archive.NameToInfo)]:
                member = archive.getinfo(f"{key}.npy")
                if member.compress_type != zipfile.ZIP_STORED:
                    raise StoreError(f"{path}: compressed members cannot be mapped; {remedy}")
                arrays[key] = _npy_array(_unpacked(_packed_bytes(content, member), member, checked))
    except KeyError as error:
        raise StoreError(f"{path}: {error.args[0]}; {remedy}") from None
    except NPZ_ERRORS as error:
        raise StoreError(f"{path}: truncated or damaged ({error}); {remedy}") from None
    return arrays
