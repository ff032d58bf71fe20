"""Plan the road of SD3-Medium, or of another model of SD3's kind, and run it. runs/sd3_medium.sh says what the variables mean.

python tools/sd3_medium.py --plan                        # what it takes here: needs no model, writes nothing
EFFORT=fast MEMORY=24 MODEL=stabilityai/stable-diffusion-3.5-medium python tools/sd3_medium.py --plan
"""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from calibration_store.choices import EFFORTS
from calibration_store.sizes import format_bytes
from tools.road import SD3_MEDIUM, commands, refuse_another_run, run_commands
from w4a8.backend.words import format_seconds, interpreter
from w4a8.cli import stage_command
from w4a8.cli.options import LoraFile
from w4a8.effort import OF_LARGE_MODELS
from w4a8.model.catalog import ModelInfo, default_dtype, describe_model
from w4a8.model.dual_attention import TransformerSizes, empty_transformer
from w4a8.model.families import FOLDER_FAMILY, MODELS, family_of
from w4a8.model.layers import Block, model_blocks, model_layers, num_weights
from w4a8.model.memory_needs import DUAL_TOKEN_ARRAYS, TOKEN_ARRAYS
from w4a8.model.model_source import HUB_ID, lora_of
from w4a8.model.transformer import check_loras
from w4a8.rounding.iteration_bytes import TRAINING_SHARE, IterationBytes

STEPS, SAVED_EVERY, TEXT_TOKENS = 28, 3, 154  # tokens without T5
ENCODERS, T5_BYTES, BESIDE = 1.83e9, 9.5e9, 1.1e9  # CLIP and VAE; T5-XXL; what a stage takes beside weights and pass
# Ratios to a plain pass that were measured on an H200 with products in bfloat16, where a pass in float16 takes 0.018 s
# (benchmarks/results/2026-11-30-good-h200.txt): an iteration of 8 samples on one block takes 0.044 s, one of the last phase
# 0.052 s for every block, and 4.2 s for every block go into 2,048 samples' walk through it, its grids and its losses.
BLOCK_ITERATION, LAST_ITERATION, BETWEEN_BLOCKS = 0.044 / 0.018, 0.052 / 0.018, 4.2 / 0.018 / 2048
CACHING, COLLECTING = 1.15, 1.09  # stage 2A: benchmarks/results/2026-11-29-whole-runs-h200.txt
TOO_LONG = 14 * 24 * 3600  # seconds that nobody waits
USABLE = 0.7  # the share of a machine's memory that weights and a pass may take


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


class Model(NamedTuple):
    """The facts of a model that a plan needs: sizes, and tokens of an image at its usual size."""

    title: str
    config: TransformerSizes
    pixels: int
    steps: int
    guided: bool

    @classmethod
    def of_name(cls, name: str) -> "Model":
        """Return a hub model, or for a folder or a file SD3-Medium, whose size it is taken for. Raises UsageError for FLUX."""
        entry, family = MODELS.get(name, MODELS[SD3_MEDIUM]), family_of(name if name in MODELS else SD3_MEDIUM)
        if family.architecture != FOLDER_FAMILY.architecture:
            raise click.UsageError(f"MODEL={name}: the plan knows models of SD3's kind")
        side, guided = entry.latent_size[0] * family.latents.downscale, entry.cfg_weight > 1
        return cls(entry.title, family.config, side, STEPS if guided else entry.num_steps, guided)

    @property
    def rows(self) -> int:
        """Return the rows of an image in a pass: one more with guidance."""
        return 2 if self.guided else 1

    @property
    def tokens(self) -> int:
        """Return the number of image tokens."""
        return (self.pixels // 16) ** 2

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the transformer in 16 bits."""
        parameters: Any = tree_flatten(empty_transformer(self.config).parameters())
        return 2 * sum(array.size for _, array in parameters)

    @property
    def memory(self) -> float:
        """Return the bytes that a stage takes: the weights, and the activations of a pass in 16 bits."""
        arrays = DUAL_TOKEN_ARRAYS if self.config.dual_attention_blocks else TOKEN_ARRAYS
        activations = 2 * arrays * self.rows * (self.tokens + TEXT_TOKENS) * self.config.hidden_size
        return self.weight_bytes + activations + BESIDE

    def learning(self, memory: float) -> tuple[int, int]:
        """Return the samples at once of stage 3W's iterations in a memory of so many bytes, and the peak that they take."""
        layers = model_layers(empty_transformer(self.config)).values()
        blocks = model_blocks(empty_transformer(self.config))
        largest = max(num_weights(layer for layer in layers if layer.block == block) for block in blocks)
        arrays = int(self.rows * (self.tokens + TEXT_TOKENS) * self.config.hidden_size)
        need = IterationBytes.of_shapes(largest, arrays, 0, 0, 1, half=True)
        fitting = (each for each in (8, 4, 3, 2) if need.peak(each) <= TRAINING_SHARE * memory)
        at_once = next(fitting, 1)
        return at_once, need.peak(at_once)

    @property
    def sample_bytes(self) -> float:
        """Return the bytes of a sample of the ends in stage 2W's cache: tokens in float16 for each row, and the velocity."""
        return self.rows * (2 * (self.tokens + TEXT_TOKENS) * self.config.hidden_size + 128 * self.tokens)


class Gigabytes(click.ParamType):
    """A number of GB: 16, 16GB, 1.5 GB."""

    name = "GB"

    def __init__(self, least: float):
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail."""
        found = re.fullmatch(r"([0-9]+\.?[0-9]*) ?(GB?)?", str(value).strip(), re.IGNORECASE)
        if found is None or not self.least <= float(found[1]) <= 10_000:
            self.fail(f"{value!r} is not a number of GB from {self.least:g} to 10000, such as 16", param, ctx)
        return float(found[1])


class Row(NamedTuple):
    """A stage in the plan: what it does, bytes that it writes, seconds, and what its memory is."""

    what: str
    bytes_written: float
    seconds: float
    memory: str = ""


@stage_command
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default="calibration_data/sd3_medium")
@click.option("--plan", "plan_only", is_flag=True, help="Print the plan and the commands, and stop.")
@click.option(
    "--effort",
    envvar="EFFORT",
    show_envvar=True,
    type=click.Choice(EFFORTS),
    default="good",
    help="Images and iterations.",
)
@click.option(
    "--memory", envvar="MEMORY", show_envvar=True, type=Gigabytes(1), help="GB to plan for.  [default: this machine's]"
)
@click.option("--model", envvar="MODEL", show_envvar=True, default=SD3_MEDIUM, help="Another model of SD3's kind.")
@click.option(
    "--checkpoint",
    envvar="CHECKPOINT",
    show_envvar=True,
    type=click.Path(path_type=Path),
    help="A fine-tune's file or folder.",
)
@click.option("--lora", envvar="LORA", show_envvar=True, default="", help="A LoRA, FILE or FILE:SCALE.")
@click.option(
    "--pass-seconds",
    envvar="PASS_SECONDS",
    show_envvar=True,
    type=click.FloatRange(1e-4, 1e4),
    help="Of a plain pass at the model's size with guidance.  [default: timed]",
)
@click.option("--images", envvar="IMAGES", show_envvar=True, type=click.IntRange(1), help="Instead of the effort's.")
@click.option("--iters", envvar="ITERS", show_envvar=True, type=click.IntRange(10), help="Instead of the effort's.")
@click.option(
    "--steps", envvar="STEPS", show_envvar=True, type=click.IntRange(1), help="Of an image.  [default: 28; Turbo 4]"
)
@click.option(
    "--cache", envvar="CACHE", show_envvar=True, type=Gigabytes(0.01), help="GB of stage 2W, instead of all images."
)
@click.option(
    "--t5",
    envvar="T5",
    show_envvar=True,
    type=click.Choice(["--t5", "--no-t5"]),
    help="Instead of what the memory allows.",
)
@click.option(
    "--group-size",
    envvar="GROUP_SIZE",
    show_envvar=True,
    type=click.Choice(["32", "64", "128"]),
    help="32 for GGUF.  [default: 64]",
)
def main(
    folder: Path, plan_only: bool, effort: str, memory: float | None, model: str, checkpoint: Path | None, lora: str,
    pass_seconds: float | None, images: int | None, iters: int | None, steps: int | None, cache: float | None, t5: str | None,
    group_size: str | None,
) -> int:  # fmt: skip
    """Plan SD3-Medium's road for this machine; without --plan, run it."""
    if checkpoint is not None and not checkpoint.exists():
        raise click.UsageError(f"CHECKPOINT={checkpoint}: not found")
    if checkpoint is not None and model == SD3_MEDIUM:  # stage 1 finds out which model a file is
        model, checkpoint = str(checkpoint), None
    given = describe_model(model, (), checkpoint)  # a name that nobody knows, or no model's file, is one line
    if given.hub_id is None:
        raise click.UsageError(f"{given.title}: a model folder; run the stages one by one, as runs/emoji.sh does")
    check_parts(given, lora)
    known, plan_for = this_memory() if memory is None else memory, Model.of_name(given.hub_id)
    size = max((each for each in MACHINES if each <= known), default=None)
    least = next((each for each in MACHINES if each * 1e9 * USABLE >= plan_for.memory), None)
    if size is None or least is None or size < least:
        raise click.UsageError(f"{known:g} GB: {plan_for.title} needs {least or 'more than 128'} GB or more")
    steps = plan_for.steps if steps is None else steps
    machine, work = MACHINES[size], OF_LARGE_MODELS[effort]
    number, count = images or work.num_images, iters or work.iters
    last = work.end_to_end if iters is None else iters // 2
    size_2w = number * work.steps * plan_for.sample_bytes / 1e9 if cache is None else cache
    values = {
        "model": model, "checkpoint": checkpoint or "", "lora": lora, "images": number, "steps": steps, "t5": t5 or machine.t5,
        "effort": effort, "cache": "" if cache is None else f"{cache:g}GB", "statistics": machine.statistics, "iters": count, "batch": work.batch_size, "last": last, "judged": machine.judged,
        "group": group_size or "",
    }  # fmt: skip
    lines = commands("sd3_medium", folder, **values)
    if group_size == "32":
        at = next(number for number, line in enumerate(lines) if line[0] == "export_quantized_model.py")
        lines.insert(at + 1, [*lines[at], "--format", "gguf"])
    if not plan_only:
        refuse_another_run(folder, number, effort, OF_LARGE_MODELS)
        code = run_commands(lines)
        if not code:
            click.echo(
                f"\nDone. Open {folder}/report/index.html. Draw: {interpreter()} draw_images.py --model {folder}/quantized_model "
                '"your prompt"'
            )
        return code
    seconds = timed_pass(plan_for) if pass_seconds is None else pass_seconds
    rounded = "" if known == size else f" (of {known:.3g})"
    rounded += ", this machine's" if memory is None else ""
    how = (
        f"random blocks, timed here, for all {plan_for.config.depth_multimodal}"
        if pass_seconds is None
        else "as PASS_SECONDS says"
    )
    click.echo(
        f"{plan_for.title}, effort {effort}, planned for {size} GB{rounded}; a pass at {plan_for.pixels} px takes {seconds:.3g} s: {how}"
    )
    rows = planned(
        plan_for,
        given.checkpoint is not None,
        number,
        steps,
        size_2w,
        machine,
        count,
        last,
        values["t5"] == "--t5",
        seconds,
        size,
    )
    for row in rows:
        took = format_seconds(row.seconds) if row.seconds else ""
        click.echo(f"  {row.what:32} {row.bytes_written / 1e9:6.1f} GB  {took:>12}  {row.memory}")
    if size > least:
        click.echo(
            f"  With more memory more images are compared ({machine.judged} instead of {MACHINES[least].judged}), which takes longer."
        )
    total = sum(row.bytes_written for row in rows)
    click.echo(
        f"  {'in all, with the download':32} {total / 1e9:6.1f} GB  {format_seconds(sum(row.seconds for row in rows)):>12}"
    )
    if sum(row.seconds for row in rows) > TOO_LONG and pass_seconds is None:
        click.echo(
            "  That is too long for this machine: MEMORY=16 PASS_SECONDS=0.7 runs/sd3_medium.sh --plan is a plan for another one."
        )
    free = shutil.disk_usage(next(each for each in (folder, *folder.parents, Path()) if each.exists())).free
    if total > free:
        click.echo(f"  The disk has {free / 1e9:.1f} GB: give CACHE=… or EFFORT=fast, or another folder.")
    click.echo(
        "Times of stages are a pass times ratios that were measured on an H200 and an H100; on a Mac they were not measured.\nCommands:"
    )
    for line in lines:
        click.echo(f"  {interpreter()} {shlex.join(line)}")
    return 0


def check_parts(given: ModelInfo, lora: str) -> None:
    """Raise UsageError for a checkpoint that is not complete or is another model's, or a LoRA that does not fit.

    Headers decide. A LoRA of the hub that is not in its cache is left to stage 1, which fetches it.
    """
    try:
        found = LoraFile().convert(lora, None, None) if lora else None
        if found is not None and not (found.file.exists() or HUB_ID.fullmatch(str(found.file))):
            raise click.UsageError(f"{found.file} not found")
        local = (lora_of(found),) if found is not None and found.file.exists() else ()
        if local or given.checkpoint is not None:
            check_loras(dataclasses.replace(given, loras=local))
    except click.UsageError as error:
        raise click.UsageError(f"LORA={lora}: {error.message}") from None


def planned(
    model: Model,
    own_file: bool,
    images: int,
    steps: int,
    cache: float,
    machine: Machine,
    iters: int,
    last: int,
    t5: bool,
    seconds: float,
    size: float,
) -> list[Row]:
    """Return the rows of a plan; own_file: nothing of the transformer is downloaded; seconds: of one pass; size: GB of memory. Sizes were measured on SD3-Medium at 512 px with guidance."""
    samples, passes = int(cache * 1e9 / model.sample_bytes), machine.statistics * (steps // SAVED_EVERY // 2 + 1)
    latent, depth, weights = 128 * model.tokens, model.config.depth_multimodal, model.weight_bytes
    stored = images * ((steps // SAVED_EVERY + 1) * latent + 4.5 * latent)
    memory = f"{format_bytes(model.memory)} of memory"
    with_t5 = f"{format_bytes(max(model.memory, 10.8e9))} of memory" if t5 else memory
    blocks = depth * (iters * BLOCK_ITERATION + samples * BETWEEN_BLOCKS)
    learning = (blocks + depth * last * LAST_ITERATION) * seconds
    at_once, peak = model.learning(size * 1e9)
    return [
        Row("download", (0 if own_file else weights) + ENCODERS + (T5_BYTES if t5 else 0), 0, "with T5, 9.5 GB; the hub's cache keeps it" if t5 else "without T5"),
        Row(f"1   {images} images", stored, images * steps * seconds, with_t5),
        Row(f"2W  {samples} samples", cache * 1e9, samples * seconds * CACHING, memory),
        Row(f"2A  {passes} passes", passes * 8.4e6 + 90e6, passes * seconds * COLLECTING, memory),
        Row(f"3W  {depth} blocks, {iters} each, then {last}", 0.53 * weights, learning, f"{format_bytes(peak)} of memory, {at_once} samples at once"),
        Row("5   the 4-bit model", 0.55 * weights, 0, memory),
        Row(f"4   {machine.judged} images, 3 variants", machine.judged * 4 * (steps + 1) * 2 * latent,
            machine.judged * 4 * steps * seconds, memory),
    ]  # fmt: skip


def this_memory() -> float:
    """Return the GB of memory that the model can use: the GPU's where it has its own, else the machine's."""
    if shutil.which("nvidia-smi") and mx.default_device() != mx.Device(mx.cpu):
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        return (
            float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20 / 1e9
        )
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def timed_pass(model: Model) -> float:
    """Return the seconds of a pass: random blocks of the model's size, of each kind that it has, times their number."""
    dtype, config, dual = getattr(mx, default_dtype()), model.config, model.config.dual_attention_blocks
    width = config.hidden_size
    sizes = dataclasses.replace(
        config, depth_multimodal=2, hidden_size_override=width, dual_attention_blocks=min(1, dual)
    )
    transformer = empty_transformer(sizes)
    transformer.update(tree_map(lambda array: array.astype(dtype), transformer.parameters()))
    keys = mx.random.split(mx.random.key(0), 3)
    tokens = [
        mx.random.normal((model.rows, count, 1, width), key=key).astype(dtype)
        for count, key in zip((model.tokens, TEXT_TOKENS), keys, strict=False)
    ]
    modulation = mx.random.normal((model.rows, 1, 1, width), key=keys[2]).astype(dtype)
    first, last = model_blocks(transformer).values()

    def seconds_of(block: Block) -> float:
        found = []
        for _ in range(3):
            start = time.perf_counter()
            mx.eval(block.run(tokens, modulation))
            found.append(time.perf_counter() - start)
        return min(found)

    plain = config.depth_multimodal - dual
    return dual * seconds_of(first) + plain * seconds_of(last) if dual else plain * seconds_of(first)


if __name__ == "__main__":
    main()
