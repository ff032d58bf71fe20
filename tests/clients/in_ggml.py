"""Multiply a packed layer in ggml itself, and compare with the toolkit's a8-block and its own quantizer.

    python tests/clients/in_ggml.py make /tmp/clients/ggml.npz                          # with the toolkit
    .venv-clients/bin/python tests/clients/in_ggml.py compare /tmp/clients/ggml.npz     # with stable-diffusion.cpp's library

The file holds a layer of SD3-Medium's size (6144 x 1536, Q4_1), rows of inputs, some of them wide, and what the toolkit
makes of them: codes and steps of a8-block, and x̂·Ŵᵀ in float64. ggml multiplies in integers: its codes must be equal,
and its result within 1e-3.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np

ROWS, OUT, IN = 64, 6144, 1536
F32, Q4_1 = 0, 3  # ggml_type
BLOCK = np.dtype([("d", "<f2"), ("s", "<f2"), ("codes", "i1", 32)])  # block_q8_1


def make(path: Path) -> None:
    """Write the layer, the inputs and the toolkit's results."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import mlx.core as mx

    from w4a8.quantized.dynamic_rules import block_codes
    from w4a8.quantized.gguf_file import packed_blocks
    from w4a8.quantized.layer import QuantizedLayer

    random = np.random.default_rng(0)
    weight = (random.standard_normal((OUT, IN)) * IN**-0.5).astype(np.float32)
    x = random.standard_normal((ROWS, IN)).astype(np.float32)
    x[:, ::97] *= 40  # outlier channels
    layer = QuantizedLayer.nearest(weight, 4, 32)
    rebuilt, codes, steps = (np.array(array) for array in block_codes(mx.array(x)))
    exact = rebuilt.astype(np.float64) @ layer.weight.astype(np.float64).T
    np.savez(path, x=x, packed=packed_blocks(layer, 4), codes=codes.astype(np.int8), steps=steps[..., 0], y=exact)


class Ggml:
    """The few functions of ggml that are needed, from the library of stable-diffusion-cpp-python."""

    def __init__(self) -> None:
        import stable_diffusion_cpp

        folder = Path(stable_diffusion_cpp.__file__).parent
        self.library = ctypes.CDLL(str(next(folder.rglob("libstable-diffusion.so"))))
        pointer = ctypes.c_void_p
        for name, result, *arguments in (
            ("ggml_init", pointer, Parameters),
            ("ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
            ("ggml_get_data", pointer, pointer),
            ("ggml_mul_mat", pointer, pointer, pointer, pointer),
            ("ggml_new_graph", pointer, pointer),
            ("ggml_build_forward_expand", None, pointer, pointer),
            ("ggml_graph_compute_with_ctx", ctypes.c_int, pointer, pointer, ctypes.c_int),
            ("quantize_row_q8_1", None, pointer, pointer, ctypes.c_int64),
        ):
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, list(arguments)

    def multiply(self, packed: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return x (rows, in) times a Q4_1 weight of packed rows, (rows, out) float32, on two threads."""
        call, (rows, width), out = self.library, x.shape, len(packed)
        context = call.ggml_init(Parameters(packed.nbytes + 64 * x.nbytes + 4 * rows * out + 2**26, None, False))
        weight, inputs = (
            call.ggml_new_tensor_2d(context, Q4_1, width, out),
            call.ggml_new_tensor_2d(context, F32, width, rows),
        )
        for tensor, array in ((weight, packed), (inputs, x)):
            ctypes.memmove(call.ggml_get_data(tensor), np.ascontiguousarray(array).ctypes.data, array.nbytes)
        product, graph = call.ggml_mul_mat(context, weight, inputs), call.ggml_new_graph(context)
        call.ggml_build_forward_expand(graph, product)
        assert call.ggml_graph_compute_with_ctx(context, graph, 2) == 0
        found = np.empty((rows, out), np.float32)
        ctypes.memmove(found.ctypes.data, call.ggml_get_data(product), found.nbytes)
        return found

    def blocks(self, x: np.ndarray) -> np.ndarray:
        """Return x (rows, in) as ggml quantizes it: (rows, in / 32) of BLOCK."""
        found = np.empty((len(x), x.shape[1] // 32), BLOCK)
        self.library.quantize_row_q8_1(x.ctypes.data, found.ctypes.data, x.size)
        return found


class Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def compare(path: Path) -> None:
    """Print how many codes differ, and the error of the product; end with 1 where they are not what they must be."""
    ggml = Ggml()
    with np.load(path) as given:
        x, codes, steps, y = (given[key] for key in ("x", "codes", "steps", "y"))
        blocks, product = ggml.blocks(x), ggml.multiply(given["packed"], x)
    other = int((blocks["codes"] != codes).sum())
    step = float(np.abs(blocks["d"].astype(np.float64) / steps - 1).max())
    error = float(np.linalg.norm(product - y) / np.linalg.norm(y))
    print(
        f"ggml, {OUT} x {IN}, {ROWS} rows: {other} of {codes.size} codes differ, steps by {step:.1e}; product: {error:.1e}"
    )
    sys.exit(other > 0 or error > 1e-3)


if __name__ == "__main__":
    {"make": make, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
