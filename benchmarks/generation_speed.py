"""Time stage 1 beside DiffusionKit's own loop, in turns in one process.

python benchmarks/generation_speed.py
"""

import contextlib
import functools
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx

from benchmarks.figures import record
from w4a8.cli import stage_command
from w4a8.model.catalog import default_dtype, describe_model
from w4a8.model.loading import TEXT, TRANSFORMER, load_pipeline
from w4a8.model.prompt_encoder import encode_prompts
from w4a8.model.sampling import euler_steps, initial_noise

ROOT = Path(__file__).resolve().parent.parent
MATMUL = """
import time
{first}
import mlx.core as mx
a, b = (mx.random.normal((1024, 1024)) for _ in range(2))
mx.eval(a @ b)
times = []
for _ in range({repeats}):
    start = time.perf_counter()
    mx.eval(a @ b)
    times.append(time.perf_counter() - start)
print(2 * 1024**3 / sorted(times)[{repeats} // 2] / 1e9)
"""


@stage_command
@click.option("--model", default="sd3-emoji", help="As in generate_calibration_data.py.")
@click.option("--num-steps", type=click.IntRange(min=1), default=50, help="Euler steps per image.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, help="Pairs of runs; medians are printed.")
@click.option("--batch-sizes", default="2,4,8,16", help="Batch sizes to try, comma-separated.")
@click.option("--t5/--no-t5", "use_t5", default=False, help="Use the T5 text encoder.")
def main(model: str, num_steps: int, repeats: int, batch_sizes: str, use_t5: bool) -> None:
    """Time stage 1's sampling beside DiffusionKit's own loop."""
    if mx.default_device() == mx.Device(mx.cpu):
        stock, fast = (matmul_gflops(first, repeats) for first in ("", "import w4a8"))
        click.echo(f"float32 matmul: stock MLX wheel {stock:.1f} GFLOP/s, with w4a8 {fast:.0f}: {fast / stock:.0f} x")

    info = describe_model(model)
    pipeline = load_pipeline(info, {TRANSFORMER: default_dtype(), TEXT: default_dtype()}, use_t5)
    cfg_weight, size = info.cfg_weight, info.latent_size
    text = encode_prompts(pipeline, ["rocket"], cfg_weight)

    def diffusionkit() -> None:
        pipeline.denoise_latents(text.tokens, text.pooled, num_steps, cfg_weight, size, seed=42)
        pipeline.mmdit.clear_modulation_params_cache()
        pipeline.mmdit.pop("to_offload")

    def ours(batch: int) -> None:
        many = encode_prompts(pipeline, ["rocket"] * batch, cfg_weight)
        noise = mx.concatenate([initial_noise(42 + image, size) for image in range(batch)])
        for _ in euler_steps(pipeline, many, noise, num_steps, cfg_weight):
            pass

    seconds(diffusionkit), seconds(lambda: ours(1))
    pairs = [(seconds(lambda: ours(1)), seconds(diffusionkit)) for _ in range(repeats)]
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    one_at_a_time = statistics.median(theirs for _, theirs in pairs)
    click.echo(
        f"{model}, {num_steps} steps, one image: DiffusionKit {one_at_a_time / num_steps * 1e3:.1f} ms a step, "
        f"ours ÷ DiffusionKit {ratio:.3f}"
    )
    record(f"stage 1: time per step ÷ DiffusionKit's loop, {model}", ratio, 1.05)
    for batch in map(int, batch_sizes.split(",")):
        turns = range(max(1, repeats // 2))
        per_image = statistics.median(seconds(functools.partial(ours, batch)) for _ in turns) / batch
        record(f"stage 1: time per image ÷ DiffusionKit's, batch {batch}", per_image / one_at_a_time)
        click.echo(
            f"batch {batch:2d}: {1 / per_image:.3f} images/s, {one_at_a_time / per_image:.2f} x DiffusionKit's one at a time"
        )


def matmul_gflops(first: str, repeats: int) -> float:
    """Return GFLOP/s of a float32 1024³ product in a fresh process, the median of some, after running `first`."""
    command = [sys.executable, "-c", MATMUL.format(first=first, repeats=repeats)]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def seconds(function: Callable[[], None]) -> float:
    """Return the seconds that a function takes; hide DiffusionKit's progress bar."""
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
