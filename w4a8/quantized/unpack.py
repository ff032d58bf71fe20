"""Packed weights back to dense ones: `mx.dequantize`, and on CUDA a kernel that is limited by memory alone, bit for bit the same."""

import functools
from collections.abc import Callable

import mlx.core as mx

KERNEL_BITS = (4, 8)  # codes that fill a word without a rest
THREADS = 256

# One thread takes one word of codes and writes its 8 (or 4) weights at once.
KERNEL = """
    constexpr int per_word = 32 / BITS;
    const unsigned int word = blockIdx.x * blockDim.x + threadIdx.x;
    if (word >= WORDS) return;
    unsigned int word_codes = codes[word];
    const unsigned int group = word / (GROUP / per_word);
    const T scale = scales[group], bias = biases[group];
    struct alignas(per_word * sizeof(T) <= 16 ? per_word * sizeof(T) : 16) Values { T of[per_word]; } values;
    #pragma unroll
    for (int i = 0; i < per_word; i++) {
        values.of[i] = static_cast<T>(word_codes & ((1u << BITS) - 1)) * scale + bias;
        word_codes >>= BITS;
    }
    *reinterpret_cast<Values*>(weights + word * per_word) = values;
"""


def unpack(codes: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> mx.array:
    """Ŵ (out, in) = scale·code + bias in the dtype of the scales.

    codes uint32 (out, in·bits / 32), the first code in the lowest bits; scales and biases (out, in / group_size).
    """
    if bits in KERNEL_BITS and kernel_is_exact():
        return kernel_unpack(codes, scales, biases, bits, group_size)
    return mx.dequantize(codes, scales, biases, group_size, bits)


def kernel_unpack(codes: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> mx.array:
    """`unpack` by the CUDA kernel."""
    words = codes.size
    return _kernel()(
        inputs=[codes, scales, biases],
        template=[("T", scales.dtype), ("BITS", bits), ("GROUP", group_size), ("WORDS", words)],
        grid=(-(-words // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(codes.shape[0], codes.shape[1] * 32 // bits)],
        output_dtypes=[scales.dtype],
    )[0]


@functools.cache
def _kernel() -> Callable:
    return mx.fast.cuda_kernel("unpack_weights", ["codes", "scales", "biases"], ["weights"], KERNEL)


@functools.cache
def kernel_is_exact() -> bool:
    """Whether there is a CUDA device on which the kernel gives what `mx.dequantize` gives, bit for bit."""
    if mx.default_device() == mx.Device(mx.cpu) or mx.metal.is_available():
        return False
    try:
        for dtype in (mx.float16, mx.float32):
            weight = mx.random.normal((65, 384), key=mx.random.key(0)).astype(dtype)
            for bits in KERNEL_BITS:
                packed = mx.quantize(weight, 64, bits)
                if not mx.array_equal(kernel_unpack(*packed, bits, 64), mx.dequantize(*packed, 64, bits)).item():
                    return False
    except (RuntimeError, ValueError):
        return False
    return True
