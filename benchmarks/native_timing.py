"""What native_speed.py times: single packed layers, whole passes."""

import gc

import click
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from benchmarks.figures import record
from benchmarks.pass_timing import compare, one_pass
from w4a8.cli import format_bytes
from w4a8.model.catalog import default_dtype
from w4a8.model.layers import model_layers
from w4a8.model.packed import AUTO, DEQUANTIZE, QUANTIZED, NativeLinear, adopt, get_ready, resolve
from w4a8.quantized.layer import Packed

ROWS = (1, 8, 77, 154, 308, 1024, 4096)
BOUNDS = {"sd3-emoji": 1.3, "sd3-medium": 1.15}
BITS, GROUP = 4, 64


def packed_layer(out: int, width: int, dtype: mx.Dtype) -> NativeLinear:
    weight = mx.random.normal((out, width), key=mx.random.key(out + width)).astype(dtype) * width**-0.5
    return NativeLinear(Packed(*mx.quantize(weight, GROUP, BITS), BITS, GROUP), mx.zeros((out,), dtype))


def time_passes(size: str, latent: int, repeats: int) -> None:
    """A pass of the whole transformer, dense and packed in turns, and what the packed one holds in memory."""
    with one_pass(size, 154, latent) as one:
        dtype, mmdit = one.pipeline.activation_dtype, one.pipeline.mmdit
        layers = list(model_layers(mmdit).values())
        dense = [layer.module for layer in layers]
        held = sum(array.nbytes for _, array in tree_flatten(mmdit.parameters()))
        chosen = {id(module) for module in dense}
        nn.quantize(mmdit, GROUP, BITS, class_predicate=lambda path, module: id(module) in chosen)
        adopt(mmdit, AUTO)
        natives = [layer.module for layer in layers]
        packed = sum(array.nbytes for _, array in tree_flatten(mmdit.parameters()))
        automatic = natives[0].way
        get_ready(mmdit)
        label = f"{size}, latent {latent}"
        click.echo(
            f"{label}, {dtype}: {format_bytes(held)} dense, {format_bytes(packed)} packed, {packed / held:.3f} x"
        )

        def forward(way: str) -> mx.array:
            for layer, plain, native in zip(layers, dense, natives, strict=True):
                native.way = way
                layer.parent[layer.key] = plain if way == "plain" else native
            return one.forward()

        reference = forward("plain").astype(mx.float32)
        error = mx.abs(forward(automatic).astype(mx.float32) - reference).mean() / mx.abs(reference).mean()
        ways = ("plain", automatic, *((DEQUANTIZE, QUANTIZED) if size == "sd3-emoji" else ()))
        seconds, _ = compare({way: lambda way=way: mx.eval(forward(way)) for way in ways}, repeats)
        for way in ways:
            ratio = seconds[way] / seconds["plain"]
            mark = "  <- auto" if way == automatic else ""
            click.echo(f"  {way:11} {seconds[way] * 1e3:9.2f} ms  {ratio:6.3f} x{mark}")
            if way != "plain":
                record(f"native pass ÷ dense, {way}, {label}", ratio, BOUNDS[size] if way == automatic else None)
        forward(automatic)
        dense.clear()
        del reference
        mx.synchronize()
        gc.collect()
        mx.clear_cache()
        click.echo(
            f"  relative difference {error.item():.3f}; active memory with the packed one alone {format_bytes(mx.get_active_memory())}"
        )


def time_layers(size: str, repeats: int) -> None:
    """Single layers, 16 in a row so that launches count as in a model: float dense beside every way."""
    dtype = getattr(mx, default_dtype())
    width = 192 if size == "sd3-emoji" else 1536
    for out, inner in ((width, width), (4 * width, width), (width, 4 * width)):
        native = packed_layer(out, inner, dtype)
        weight, bias = native.dense_weight(), native["bias"]
        mx.eval(weight, native.parameters())
        click.echo(f"layer {inner} -> {out}: µs dense, and each way ÷ dense (auto is {resolve(AUTO, 0)})")
        for rows in ROWS:
            x = mx.random.normal((rows, inner), key=mx.random.key(rows)).astype(dtype)
            mx.eval(x)

            def run(way: str, x: mx.array = x, native: NativeLinear = native, weight=weight, bias=bias) -> None:
                native.way = way
                call = (lambda y: mx.addmm(bias, y, weight.T)) if way == "plain" else native
                mx.eval([call(x + i) for i in range(16)])

            ways = ["plain", DEQUANTIZE, *([QUANTIZED] if rows <= 1024 or size == "sd3-emoji" else [])]
            seconds, _ = compare({way: lambda way=way: run(way) for way in ways}, max(3, repeats // 2))
            plain = seconds["plain"]
            shares = "  ".join(f"{way} {seconds[way] / plain:7.2f} x" for way in ways[1:])
            click.echo(f"  {rows:5} rows {plain / 16 * 1e6:9.1f} µs  {shares}")
