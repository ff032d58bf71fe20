"""Open weight files: the one door through which every tensor of a model comes, as a number of the dtype in its file."""

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np

from calibration_store.errors import UserError
from calibration_store.safetensors_header import weight_dtypes
from w4a8.model.gguf_weights import gguf_arrays, is_gguf

NUMBERS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
INDICES = ("position_ids",)  # the ends of names whose integers are no weights
SCALE = re.compile(r"\.(?:scale_weight|weight_scale)$")  # the name of a float8 weight's factor, in two programs' files
MARKS = ("scaled_fp8",)  # names that only say how a file was written
# Ends of names that show who packed the integers of a file.
PACKERS = (
    ("quant_state.bitsandbytes__nf4", "bitsandbytes' NF4"),
    ("quant_state.bitsandbytes__fp4", "bitsandbytes' FP4"),
    (".SCB", "bitsandbytes' 8 bits"),
    (".weight_scale", "8 bits with scales"),
    (".qweight", "GPTQ's or AWQ's 4 bits"),
)


def load_arrays(path: Path, packed: bool = False) -> dict[str, mx.array]:
    """Open a safetensors or GGUF file: name -> array of floating-point numbers, each read when it is used.

    float8 becomes float16, which holds each of its values; where the file has a factor beside a weight (scaled fp8),
    the product is float32. A GGUF file is unpacked at once. packed: the file has MLX's packed layers, whose codes are uint32 beside `.scales`. Raises
    UserError for a file of another kind and for integers in the place of a weight, and what `mx.load` raises,
    RuntimeError or ValueError, for a file that is none.
    """
    refuse_other_kinds(path)
    if is_gguf(path):
        return gguf_arrays(path)
    dtypes = weight_dtypes(path)
    refuse_integers(path, dtypes, packed)
    arrays = _open(path, dtypes)
    for name in [name for name in arrays if name.endswith(INDICES) or name in MARKS]:
        del arrays[name]
    for name, dtype in dtypes.items():
        if name in arrays and dtype == "F8_E4M3":
            arrays[name] = mx.from_fp8(arrays[name], mx.float16)
    for name in [name for name in arrays if SCALE.search(name)]:
        factor, weight = arrays.pop(name), SCALE.sub(".weight", name)
        if weight not in arrays:
            raise UserError(f"{path}: {name} belongs to no weight; copy or download the file again")
        rows = factor.astype(mx.float32).reshape(-1, *[1] * (arrays[weight].ndim - 1))
        arrays[weight] = arrays[weight].astype(mx.float32) * rows
    return arrays


def refuse_other_kinds(path: Path) -> None:
    """Raise UserError for a file that its first bytes show to be no safetensors file, with its kind."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return  # the header's reader says what is wrong
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        raise UserError(f"{path}: a pickle, which may run code when it is read; convert it to safetensors")
    if b"\0" not in head[:8] and head.lstrip().startswith(b"{") and not path.name.endswith(".index.json"):
        raise UserError(f"{path}: JSON; give a safetensors file of the original model")


def refuse_integers(path: Path, dtypes: dict[str, str], packed: bool) -> None:
    """Raise UserError where a tensor of integers stands in the place of a weight, and name the program that packed it."""
    if not packed and any(name.endswith(".scales") for name in dtypes):
        raise UserError(f"{path}: its weights are packed already; quantize the original model's")
    for name, dtype in dtypes.items():
        if dtype in NUMBERS or name.endswith(INDICES):
            continue
        if packed and dtype == "U32" and f"{name.removesuffix('.weight')}.scales" in dtypes:
            continue
        packer = next((who for end, who in PACKERS if any(other.endswith(end) for other in dtypes)), None)
        how = f"packed in {packer}" if packer else f"integers ({dtype})"
        raise UserError(f"{path}: {name} is {how}; quantize the original model's weights, in 16 or 32 bits or float8")


def _open(path: Path, dtypes: dict[str, str]) -> dict[str, mx.array]:
    if "F8_E5M2" not in dtypes.values():
        arrays = mx.load(str(path), format="safetensors")
        assert isinstance(arrays, dict)  # MLX's stubs also name the results for .npy, and with metadata
        return arrays
    return _open_with_e5m2(path)


def _open_with_e5m2(path: Path) -> dict[str, mx.array]:
    """Read a file with float8 of 5 and 2 bits, which `mx.load` refuses: they are the upper byte of a float16."""
    codes = np.memmap(path, np.uint8, "r")
    length = int(codes[:8].view("<u8")[0])
    header = json.loads(bytes(codes[8 : 8 + length]))
    header.pop("__metadata__", None)
    kinds = {"F64": mx.float32, "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    sizes = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    arrays: dict[str, mx.array] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data, dtype = codes[8 + length + begin : 8 + length + end], entry["dtype"]
        if dtype == "F8_E5M2":
            found = mx.array((data.astype(np.uint16) << 8).view(np.float16))
        elif dtype == "BF16":
            found = mx.array(np.array(data).view(np.uint16)).view(mx.bfloat16)
        elif dtype in sizes:
            found = mx.array(np.array(data).view(sizes[dtype]).astype(np.float32 if dtype == "F64" else sizes[dtype]))
        else:  # F8_E4M3's codes, and integers that were let through
            found = mx.array(np.array(data))
        arrays[name] = found.astype(kinds.get(dtype, found.dtype)).reshape(entry["shape"])
    return arrays
