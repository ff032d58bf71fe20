"""A block in 16 bits: attention whose gradients need no array of all scores, and activations that are float32 inside."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from w4a8.backend.parallel import compiled
from w4a8.model.layers import Block

TILE = 128  # tokens: cuDNN has gradients for whole tiles alone
MASKED = -1e9  # added to the score of a token that fills up a tile; its weight is exactly 0
QUERIES = 256  # tokens whose scores are in memory at once where gradients are made from scores computed anew


@contextlib.contextmanager
def in_sixteen_bits(dtype: mx.Dtype | None, blocks: Sequence[Block]) -> Iterator[None]:
    """Let blocks compute attention, and take and give an MLP's activations, in this dtype until exit.

    None leaves all as it is.
    """
    if dtype is None:
        yield
        return
    streams = [stream for block in blocks for stream in block.streams.values()]
    modules = [block.module for block in blocks] + [stream for stream in streams if "attn2" in stream]
    mlps = [stream.mlp for stream in streams if "mlp" in stream]  # all with nn.GELU
    attentions, activations = [module.sdpa for module in modules], [mlp.act_fn for mlp in mlps]
    try:
        for module in modules:
            module.sdpa = functools.partial(attention, dtype=dtype)
        for mlp in mlps:
            mlp.act_fn = _gelu(mlp.act_fn._approx)
        yield
    finally:
        for module, original in zip(modules, attentions, strict=True):
            module.sdpa = original
        for mlp, original in zip(mlps, activations, strict=True):
            mlp.act_fn = original


@functools.cache
def _gelu(approximation: str) -> Callable:
    """Return a GELU that computes in float32, but keeps its 16-bit input and output alone for the gradient."""
    activation = nn.GELU(approximation)

    def slope_of(x: mx.array, slope: mx.array) -> mx.array:
        _, (found,) = mx.vjp(activation, [x.astype(mx.float32)], [slope.astype(mx.float32)])
        return found.astype(x.dtype)

    activate = mx.custom_function(compiled(lambda x: activation(x.astype(mx.float32)).astype(x.dtype)))
    backward = compiled(slope_of)
    activate.vjp(lambda x, slope, output: backward(x, slope))
    return activate


def product(a: mx.array, b: mx.array) -> mx.array:
    """Return a @ b in the dtype of both.

    A CPU multiplies 16-bit arrays in float32, for which it has a fast library, and rounds the result.
    """
    if a.dtype == mx.float32 or mx.default_device() != mx.Device(mx.cpu):
        return a @ b
    return (a.astype(mx.float32) @ b.astype(mx.float32)).astype(a.dtype)


def attended(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Return softmax(scale·q·kᵀ)·v in the dtype of all three; a CPU computes it as `product` does."""
    if q.dtype == mx.float32 or mx.default_device() != mx.Device(mx.cpu):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    wide = [array.astype(mx.float32) for array in (q, k, v)]
    return mx.fast.scaled_dot_product_attention(*wide, scale=scale).astype(q.dtype)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, dtype: mx.Dtype) -> mx.array:
    """Return softmax(scale·q·kᵀ)·v in dtype, (rows, heads, tokens, channels), as q, k and v are shaped."""
    q, k, v = (array.astype(dtype) for array in (q, k, v))
    return _tiled(q, k, v, scale) if mx.cuda.is_available() else _recomputed(scale)(q, k, v)


def _tiled(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Fill tokens up to whole tiles, for which both directions are one kernel on CUDA (in MLX 0.32)."""
    tokens = q.shape[2]
    extra = -tokens % TILE
    if not extra:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    q, k, v = (mx.pad(array, [(0, 0), (0, 0), (0, extra), (0, 0)]) for array in (q, k, v))
    mask = mx.where(mx.arange(tokens + extra) < tokens, 0.0, MASKED).astype(q.dtype).reshape(1, 1, 1, -1)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)[:, :, :tokens]


@functools.cache
def _recomputed(scale: float) -> Callable:
    """Return the attention that computes the scores of QUERIES tokens at a time, and anew in the backward pass.

    The formulas are those of FlashAttention (Dao et al. 2022), appendix B.4: with P = softmax(scale·q·kᵀ) and the output
    o, dv = Pᵀ·do, dS = P∘(do·vᵀ − Σ do∘o), dq = scale·dS·k, dk = scale·dSᵀ·q. Products have the inputs' dtype; softmax
    and sums are float32.
    """

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        given: list[mx.array] = []
        for begin in range(0, q.shape[2], QUERIES):
            (queries,) = mx.depends([q[:, :, begin : begin + QUERIES]], given[-1:])
            given.append(attended(queries, k, v, scale))
        return mx.concatenate(given, axis=2)

    @attend.vjp
    def gradients(inputs: tuple[mx.array, ...], slope: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        q, k, v = inputs
        dtype, sums = q.dtype, [mx.array(0.0), mx.array(0.0)]
        slope = slope.astype(dtype)
        inner = (slope.astype(mx.float32) * output.astype(mx.float32)).sum(axis=-1, keepdims=True)
        of_queries: list[mx.array] = []
        for begin in range(0, q.shape[2], QUERIES):
            rows = (slice(None), slice(None), slice(begin, begin + QUERIES))
            # The next queries wait for these, so that the scores of few tokens are in memory.
            queries, given = mx.depends([q[rows], slope[rows]], of_queries[-1:] + sums)
            weights = mx.softmax(product(queries, k.swapaxes(2, 3)).astype(mx.float32) * scale, axis=-1)
            of_scores = weights * (product(given, v.swapaxes(2, 3)).astype(mx.float32) - inner[rows])
            of_scores = (of_scores * scale).astype(dtype)
            of_queries.append(product(of_scores, k))
            of_keys = product(of_scores.swapaxes(2, 3), queries).astype(mx.float32)
            of_values = product(weights.astype(dtype).swapaxes(2, 3), given).astype(mx.float32)
            sums = [sums[0] + of_keys, sums[1] + of_values]
        return mx.concatenate(of_queries, axis=2), sums[0].astype(dtype), sums[1].astype(dtype)

    return attend
