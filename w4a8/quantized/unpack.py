"""Packed weights back to dense ones: `mx.dequantize`, or on CUDA one kernel for many layers at once, bit for bit the same."""

import functools
from collections.abc import Callable, Sequence
from itertools import accumulate

import mlx.core as mx

KERNEL_BITS = (4, 8)  # codes that fill a word without a rest
THREADS = 256

# One thread takes one word of codes and writes its 8 (or 4) weights at once; which layer it is of is known at compile time.
KERNEL = """
    constexpr unsigned int per_word = 32 / BITS;
    unsigned int word = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned int* codes; const T* scales; const T* biases; T* weights;
    {choose}
    unsigned int word_codes = codes[word];
    const unsigned int group = word / (GROUP / per_word);
    const T scale = scales[group], bias = biases[group];
    struct alignas(per_word * sizeof(T) < 16 ? per_word * sizeof(T) : 16) Values {{ T of[per_word]; }} values;
    #pragma unroll
    for (int i = 0; i < per_word; i++) {{
        values.of[i] = static_cast<T>(word_codes & ((1u << BITS) - 1)) * scale + bias;
        word_codes >>= BITS;
    }}
    *reinterpret_cast<Values*>(weights + word * per_word) = values;
"""
CHOOSE = "if (word < {end}u) {{ codes = codes{i}; scales = scales{i}; biases = biases{i}; weights = weights{i}; word -= {begin}u; }}"

Layer = tuple[mx.array, mx.array, mx.array]  # codes, scales, biases


def unpack(codes: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> mx.array:
    """Ŵ (out, in) = scale·code + bias in the dtype of the scales.

    codes uint32 (out, in·bits / 32), the first code in the lowest bits; scales and biases (out, in / group_size).
    """
    return mx.dequantize(codes, scales, biases, group_size, bits)


def unpack_together(layers: Sequence[Layer], bits: int, group_size: int) -> list[mx.array]:
    """`unpack` of several layers in one launch of the CUDA kernel."""
    words = [codes.size for codes, *_ in layers]
    kernel = _kernel(tuple(words), bits, group_size)
    return kernel(
        inputs=[array for layer in layers for array in layer],
        template=[("T", layers[0][1].dtype), ("BITS", bits), ("GROUP", group_size)],
        grid=(-(-sum(words) // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(codes.shape[0], codes.shape[1] * 32 // bits) for codes, *_ in layers],
        output_dtypes=[scales.dtype for _, scales, _ in layers],
    )


@functools.cache
def _kernel(words: tuple[int, ...], bits: int, group_size: int) -> Callable:
    """The kernel for layers of so many words."""
    ends = list(accumulate(words))
    cases = [
        CHOOSE.format(i=i, end=end, begin=end - count) for i, (end, count) in enumerate(zip(ends, words, strict=True))
    ]
    choose = " else ".join([*cases, "{ return; }"])
    names = [f"{name}{i}" for i in range(len(words)) for name in ("codes", "scales", "biases")]
    outputs = [f"weights{i}" for i in range(len(words))]
    number = abs(hash((words, bits, group_size)))
    return mx.fast.cuda_kernel(f"unpack_weights_{number}", names, outputs, KERNEL.format(choose=choose))


@functools.cache
def kernel_is_exact(bits: int, group_size: int, dtype: mx.Dtype) -> bool:
    """Whether there is a CUDA device on which the kernel gives what `mx.dequantize` gives, bit for bit."""
    if bits not in KERNEL_BITS or mx.default_device() == mx.Device(mx.cpu) or mx.metal.is_available():
        return False
    layers = []
    for rows in (65, 3):
        keys = mx.random.split(mx.random.key(rows), 3)
        codes = mx.random.randint(0, 2**31 - 1, (rows, 384 * bits // 32), key=keys[0]).astype(mx.uint32) * 2
        grid = [mx.random.normal((rows, 384 // group_size), key=key).astype(dtype) for key in keys[1:]]
        layers.append((codes, *grid))
    try:
        found = unpack_together(layers, bits, group_size)
        expected = [unpack(*layer, bits, group_size) for layer in layers]
        return all(mx.array_equal(one, other).item() for one, other in zip(found, expected, strict=True))
    except (RuntimeError, ValueError):
        return False
