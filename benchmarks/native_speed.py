"""Time packed weights beside dense ones, in every way to multiply them: whole passes, and single layers by rows; and compare the memory.

python benchmarks/native_speed.py                          # the bundled model, on a CPU too
python benchmarks/native_speed.py --size sd3-medium        # random weights, latents of 64 and 128: for a GPU
"""

import gc
from collections.abc import Callable

import click
import mlx.core as mx
import mlx.nn as nn

from benchmarks.figures import record
from benchmarks.pass_timing import compare, one_pass, weight_bytes
from w4a8.cli import format_bytes, stage_command
from w4a8.model.catalog import default_dtype, package_versions
from w4a8.model.layers import model_layers
from w4a8.model.packed import AUTO, DEQUANTIZE, QUANTIZED, NativeLinear, adopt, get_ready, resolve
from w4a8.quantized.layer import Packed

ROWS = (1, 8, 77, 154, 308, 1024, 4096)
BOUNDS = {"sd3-emoji": 1.3, "sd3-medium": 1.15}
BITS, GROUP = 4, 64
PLAIN = "plain"


@stage_command
@click.option("--size", type=click.Choice(list(BOUNDS)), default="sd3-emoji", help="Which model.")
@click.option("--repeats", type=click.IntRange(min=1), default=15, help="Passes of each kind; medians are printed.")
@click.option("--rows/--no-rows", default=True, help="Also time single layers by their number of rows.")
@click.option("--most-rows", type=click.IntRange(min=1), default=ROWS[-1], help="Largest number of rows.")
def main(size: str, repeats: int, rows: bool, most_rows: int) -> None:
    """Time packed weights beside dense ones."""
    click.echo(f"{size}, {mx.default_device()}, MLX {package_versions()['mlx']}")
    for latent in (16,) if size == "sd3-emoji" else (64, 128):
        time_passes(size, latent, repeats)
    if rows:
        time_layers(size, repeats, [count for count in ROWS if count <= most_rows])


def time_passes(size: str, latent: int, repeats: int) -> None:
    """Time a pass of the whole transformer, dense and packed in turns, and print the memory that each form holds."""
    with one_pass(size, 154, latent) as one:
        dtype, mmdit = one.pipeline.activation_dtype, one.pipeline.mmdit
        layers = list(model_layers(mmdit).values())
        dense = [layer.module for layer in layers]
        held = weight_bytes(mmdit)
        chosen = {id(module) for module in dense}
        nn.quantize(mmdit, GROUP, BITS, class_predicate=lambda path, module: id(module) in chosen)
        adopt(mmdit, AUTO)
        natives = [layer.module for layer in layers]
        packed = weight_bytes(mmdit)
        automatic = natives[0].way
        get_ready(mmdit)
        label = f"{size}, latent {latent}"
        click.echo(
            f"{label}, {dtype}: {format_bytes(held)} dense, {format_bytes(packed)} packed, {packed / held:.3f} x"
        )

        def forward(way: str) -> mx.array:
            for layer, plain, native in zip(layers, dense, natives, strict=True):
                native.way = way
                layer.parent[layer.key] = plain if way == PLAIN else native
            return one.forward()

        def timed(way: str) -> Callable[[], None]:
            return lambda: mx.eval(forward(way))

        reference = forward(PLAIN).astype(mx.float32)
        error = mx.abs(forward(automatic).astype(mx.float32) - reference).mean() / mx.abs(reference).mean()
        ways = dict.fromkeys((PLAIN, automatic, *((DEQUANTIZE, QUANTIZED) if size == "sd3-emoji" else ())))
        seconds, _ = compare({way: timed(way) for way in ways}, repeats)
        for way in ways:
            ratio = seconds[way] / seconds[PLAIN]
            mark = "  <- auto" if way == automatic else ""
            click.echo(f"  {way:11} {seconds[way] * 1e3:9.2f} ms  {ratio:6.3f} x{mark}")
            if way != PLAIN:
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


def time_layers(size: str, repeats: int, counts: list[int]) -> None:
    """Time single layers, 16 in a row so that launches count as in a model: the dense one beside every way."""
    dtype = getattr(mx, default_dtype())
    width = 192 if size == "sd3-emoji" else 1536
    for out, inner in ((width, width), (4 * width, width), (width, 4 * width)):
        native = packed_layer(out, inner, dtype)
        weight, bias = native.dense_weight(), native["bias"]
        mx.eval(weight, native.parameters())
        click.echo(f"layer {inner} -> {out}: µs dense, and each way ÷ dense (auto is {resolve(AUTO, 0)})")
        for rows in counts:
            x = mx.random.normal((rows, inner), key=mx.random.key(rows)).astype(dtype)
            mx.eval(x)

            def timed(
                way: str,
                x: mx.array = x,
                native: NativeLinear = native,
                weight: mx.array = weight,
                bias: mx.array = bias,
            ) -> Callable[[], None]:
                def run() -> None:
                    native.way = way
                    mx.eval([mx.addmm(bias, x + i, weight.T) if way == PLAIN else native(x + i) for i in range(16)])

                return run

            ways = [PLAIN, DEQUANTIZE, *([QUANTIZED] if rows <= 1024 or size == "sd3-emoji" else [])]
            seconds, _ = compare({way: timed(way) for way in ways}, max(3, repeats // 2))
            plain = seconds[PLAIN]
            shares = "  ".join(f"{way} {seconds[way] / plain:7.2f} x" for way in ways[1:])
            click.echo(f"  {rows:5} rows {plain / 16 * 1e6:9.1f} µs  {shares}")


def packed_layer(out: int, width: int, dtype: mx.Dtype) -> NativeLinear:
    """Return a packed layer with random weights."""
    weight = mx.random.normal((out, width), key=mx.random.key(out + width)).astype(dtype) * width**-0.5
    return NativeLinear(Packed(*mx.quantize(weight, GROUP, BITS), BITS, GROUP), mx.zeros((out,), dtype))


if __name__ == "__main__":
    main()
