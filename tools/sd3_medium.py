"""Plan SD3-Medium's road for this machine, and run it. runs/sd3_medium.sh calls this script, and says what its variables mean.

python tools/sd3_medium.py --plan                        # what it takes here: needs no model, writes nothing
EFFORT=fast MEMORY=24 python tools/sd3_medium.py --plan
"""

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import click
import mlx.core as mx

from benchmarks.pass_timing import random_transformer
from calibration_store.choices import EFFORTS
from tools.road import SD3_MEDIUM, commands, run_commands
from w4a8.backend.words import format_seconds, interpreter
from w4a8.cli import stage_command
from w4a8.effort import OF_LARGE_MODELS
from w4a8.model.catalog import default_dtype
from w4a8.model.layers import model_blocks
from w4a8.model.model_source import HUB_ID

BLOCKS, IMAGE_TOKENS, TEXT_TOKENS, WIDTH = 24, 1024, 154, 1536  # of SD3-Medium at 512 px
STEPS, SAVED_EVERY, SAMPLE_BYTES = 28, 3, 7.5e6  # a sample of the ends, in stage 2W's cache
# Ratios to a plain pass that were measured on an H200 with products in bfloat16, where a pass in float16 takes 0.018 s
# (benchmarks/results/2026-11-29-precision-h200.txt): an iteration of 16 samples on one block takes 0.073 s, one of the last
# phase 2.2 s, and 4 s for every block go into 2,048 samples' walk through it, its grids and its losses.
BLOCK_ITERATION, LAST_ITERATION, BETWEEN_BLOCKS = 0.073 / 0.018, 2.2 / 0.018, 4 / 0.018 / 2048
CACHING, COLLECTING = 1.15, 1.26


class Machine(NamedTuple):
    """The work for a machine of some memory: with T5-XXL or not, images for statistics, images to compare."""

    t5: str
    statistics: int
    judged: int


MACHINES = {
    16: Machine("--no-t5", 8, 8),
    24: Machine("--no-t5", 8, 16),
    32: Machine("--t5", 16, 16),
    36: Machine("--t5", 16, 16),
    48: Machine("--t5", 16, 32),
    64: Machine("--t5", 32, 32),
    96: Machine("--t5", 32, 32),
    128: Machine("--t5", 32, 32),
}


class Row(NamedTuple):
    """A stage in the plan: what it does, bytes that it writes, seconds, and what its memory is."""

    what: str
    bytes_written: float
    seconds: float
    memory: str = ""


@stage_command
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default="calibration_data/sd3_medium")
@click.option("--plan", "plan_only", is_flag=True, help="Print the plan and the commands, and stop.")
@click.option("--effort", envvar="EFFORT", type=click.Choice(EFFORTS), default="good", help="Images and iterations.")
@click.option(
    "--memory", envvar="MEMORY", type=click.FloatRange(1, 10_000), help="GB to plan for.  [default: this machine's]"
)
@click.option("--model", envvar="MODEL", default=SD3_MEDIUM, help="Another model of this size.")
@click.option(
    "--checkpoint", envvar="CHECKPOINT", type=click.Path(path_type=Path), help="A fine-tune's file or folder."
)
@click.option("--lora", envvar="LORA", default="", help="A LoRA, FILE or FILE:SCALE.")
@click.option(
    "--pass-seconds", envvar="PASS_SECONDS", type=click.FloatRange(1e-4, 1e4), help="Of a pass.  [default: timed]"
)
@click.option("--images", envvar="IMAGES", type=click.IntRange(1), help="Instead of the effort's.")
@click.option("--iters", envvar="ITERS", type=click.IntRange(10), help="Instead of the effort's.")
@click.option("--steps", envvar="STEPS", type=click.IntRange(1), default=STEPS, help="Steps of an image.")
@click.option("--cache", envvar="CACHE", type=click.FloatRange(0.01), help="GB of stage 2W, instead of all images.")
@click.option("--t5", envvar="T5", type=click.Choice(["--t5", "--no-t5"]), help="Instead of what the memory allows.")
def main(
    folder: Path, plan_only: bool, effort: str, memory: float | None, model: str, checkpoint: Path | None, lora: str,
    pass_seconds: float | None, images: int | None, iters: int | None, steps: int, cache: float | None, t5: str | None,
) -> int:  # fmt: skip
    """Plan SD3-Medium's road for this machine; without --plan, run it."""
    if checkpoint is not None and not checkpoint.exists():
        raise click.UsageError(f"CHECKPOINT={checkpoint}: not found")
    if lora and not (Path(lora_file := lora.rpartition(":")[0] or lora).exists() or HUB_ID.fullmatch(lora_file)):
        raise click.UsageError(f"LORA={lora}: {lora_file} not found")
    known = this_memory() if memory is None else memory
    size = max((each for each in MACHINES if each <= known), default=None)
    if size is None:
        raise click.UsageError(f"{known:g} GB: SD3-Medium needs 16 GB or more")
    machine, work = MACHINES[size], OF_LARGE_MODELS[effort]
    number, count = images or work.num_images, iters or work.iters
    last = work.end_to_end if iters is None else iters // 2
    size_2w = number * work.steps * SAMPLE_BYTES / 1e9 if cache is None else cache
    values = {
        "model": model, "checkpoint": checkpoint or "", "lora": lora, "images": number, "steps": steps, "t5": t5 or machine.t5,
        "effort": effort, "cache": "" if cache is None else f"{cache:g}GB", "statistics": machine.statistics, "iters": count, "last": last, "judged": machine.judged,
    }  # fmt: skip
    lines = commands("sd3_medium", folder, **values)
    if not plan_only:
        return run_commands(lines)
    seconds = timed_pass() if pass_seconds is None else pass_seconds
    rounded = "" if known == size else f" (of {known:.3g})"
    how = "one random block, timed here, times 24" if pass_seconds is None else "as PASS_SECONDS says"
    click.echo(
        f"SD3-Medium, effort {effort}, planned for {size} GB{rounded}; a pass at 512 px takes {seconds:.3g} s: {how}"
    )
    rows = planned(number, steps, size_2w, machine, count, last, values["t5"] == "--t5", seconds)
    for row in rows:
        took = format_seconds(row.seconds) if row.seconds else ""
        click.echo(f"  {row.what:32} {row.bytes_written / 1e9:6.1f} GB  {took:>12}  {row.memory}")
    total = sum(row.bytes_written for row in rows)
    click.echo(f"  {'in all':32} {total / 1e9:6.1f} GB  {format_seconds(sum(row.seconds for row in rows)):>12}")
    free = shutil.disk_usage(next(each for each in (folder, *folder.parents, Path()) if each.exists())).free
    if total > free:
        click.echo(f"  The disk has {free / 1e9:.1f} GB: give CACHE=… or EFFORT=fast, or another folder.")
    click.echo(
        "Times of stages are a pass times ratios that were measured on an H200 and an H100; on a Mac they were not measured.\nCommands:"
    )
    for line in lines:
        click.echo(f"  {interpreter()} {shlex.join(line)}")
    return 0


def planned(
    images: int, steps: int, cache: float, machine: Machine, iters: int, last: int, t5: bool, seconds: float
) -> list[Row]:
    """Return the rows of a plan; seconds: of one pass. Sizes were measured at 512 px with guidance (README)."""
    samples, passes = int(cache * 1e9 / SAMPLE_BYTES), machine.statistics * (steps // SAVED_EVERY // 2 + 1)
    stored = images * ((steps // SAVED_EVERY + 1) * 0.131e6 + 0.6e6)
    blocks = BLOCKS * (iters * BLOCK_ITERATION + samples * BETWEEN_BLOCKS)
    learning = (blocks + last * LAST_ITERATION) * seconds
    return [
        Row("download", 15.5e9 if t5 else 6.0e9, 0, "with T5, 9.5 GB; the hub's cache keeps it" if t5 else "without T5"),
        Row(f"1   {images} images", stored, images * steps * seconds, f"{10.8 if t5 else 5.4} GB of memory"),
        Row(f"2W  {samples} samples", cache * 1e9, samples * seconds * CACHING, "5.4 GB of memory"),
        Row(f"2A  {passes} passes", passes * 8.4e6 + 90e6, passes * seconds * COLLECTING, "5.4 GB of memory"),
        Row(f"3W  24 blocks, {iters} each, then {last}", 2.2e9, learning, "5 to 16 GB of memory, and the samples where they fit"),
        Row("5   the 4-bit model", 2.3e9, 0, "5.4 GB of memory"),
        Row(f"4   {machine.judged} images, four ways", machine.judged * 4 * (steps + 1) * 0.262e6,
            machine.judged * 4 * steps * seconds, "5.4 GB of memory"),
    ]  # fmt: skip


def this_memory() -> float:
    """Return the GB of memory that the model can use: the GPU's where it has its own, else the machine's."""
    if shutil.which("nvidia-smi") and mx.default_device() != mx.Device(mx.cpu):
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        return (
            float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20 / 1e9
        )
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def timed_pass() -> float:
    """Return the seconds of a pass of SD3-Medium with guidance, from one random block of its size."""
    dtype = getattr(mx, default_dtype())
    block = next(
        iter(
            model_blocks(
                random_transformer(dtype, depth_multimodal=2, num_heads=WIDTH // 64, hidden_size_override=WIDTH)
            ).values()
        )
    )
    keys = mx.random.split(mx.random.key(0), 3)
    tokens = [
        mx.random.normal((2, count, 1, WIDTH), key=key).astype(dtype)
        for count, key in zip((IMAGE_TOKENS, TEXT_TOKENS), keys, strict=False)
    ]
    modulation = mx.random.normal((2, 1, 1, WIDTH), key=keys[2]).astype(dtype)
    found = []
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(block.run(tokens, modulation))
        found.append(time.perf_counter() - start)
    return BLOCKS * min(found)


if __name__ == "__main__":
    main()
