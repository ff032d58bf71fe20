"""Run the toolkit's road, stage by stage. The commands of every road stand here: recipes, proofs, benchmarks and tests read them.

python tools/road.py demo calibration_data/demo          # what `make demo` runs; called again, it goes on
python tools/road.py tiny /tmp/road                      # every stage in seconds
python tools/road.py tiny /tmp/road blocks=mm0            # with other values for the words in braces
"""

import contextlib
import os
import shlex
import signal
import string
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import click

from calibration_store.errors import StoreError
from calibration_store.layout import CalibrationPaths, runs_nearby
from calibration_store.manifest import read_manifest
from w4a8.cli import interpreter, stage_command
from w4a8.cli.stages import IN_A_ROAD
from w4a8.effort import OF_SMALL_MODELS, Effort

ROOT = Path(__file__).resolve().parent.parent
SD3_MEDIUM = "argmaxinc/mlx-stable-diffusion-3-medium"

# A word in braces takes a value. An option whose value is empty is left out.
ROADS = {
    "tiny": (  # for tests: seconds
        "generate_calibration_data.py --model {model} --num-images {images} --num-steps {steps}",
        "cache_adaround_data.py --num-images {used} --stride {stride} --boundaries {boundaries}",
        "collect_layer_activations.py --num-images {used} --stride {stride}",
        "analyze_activations.py --plot",
        "analyze_activations_multitier.py",
        "optimize_adaround.py --iters 10 --batch-size {batch} --micro-batch {micro} --no-tune-rest --unit block --blocks {blocks}",
        "export_quantized_model.py --weights w4-rtn --activations a8",
        "evaluate_quantization.py --num-images 1 --num-steps 1 --variants w4-rtn",
        "draw_images.py 'red heart' --model {dir}/quantized_model --num-steps 1 --output {dir}/drawn",
        "report_calibration.py",
    ),
    "demo": (  # runs/emoji.sh: 6 minutes on two cores, twice as long on slow ones
        "generate_calibration_data.py --model sd3-emoji --effort {effort} --num-steps 20 --seed 3",
        "tools/contact_sheet.py --columns 8 --size 96",
        "cache_adaround_data.py --effort {effort}",
        "collect_layer_activations.py --num-images 6 --stride 2",
        "analyze_activations.py --plot",
        "optimize_adaround.py --effort {effort} --group-size {group}",
        "export_quantized_model.py",
        "evaluate_quantization.py --num-images 32 --num-steps 20 --batch-size 16 --variants w4-rtn,native,native+a8-token --step-effects 2",
        "draw_images.py 'red heart' 'police car' mango --model {dir}/quantized_model --compare sd3-emoji --num-steps 20 --output {dir}/drawn",
        "report_calibration.py",
    ),
    "emoji_gpu": (  # runs/emoji_gpu.sh: ten minutes on an H200
        "generate_calibration_data.py --model sd3-emoji --num-images 3200 --num-steps 20 --stride 2 --batch-size 100 --no-images",
        "cache_adaround_data.py --num-images 3200 --steps 8,12,14,16,18",
        "optimize_adaround.py --iters {iters} --batch-size 64 --no-alpha --activation-rule block --end-to-end 350 --unrolled 150",
        "evaluate_quantization.py --num-images 64 --num-steps 20 --batch-size 64 --variants w4-rtn,w4-adaround,a8-block,w4-adaround+a8-block",
    ),
    "sd3_medium": (  # runs/sd3_medium.sh, which chooses the values
        "generate_calibration_data.py --model {model} --local-checkpoint {checkpoint} --lora {lora} --num-images {images} --num-steps {steps} --stride 3 {t5}",
        "cache_adaround_data.py --effort {effort} --num-images {images} --max-bytes {cache}",
        "collect_layer_activations.py --num-images {statistics} --stride 2",
        "analyze_activations.py",
        "optimize_adaround.py --iters {iters} --batch-size {batch} --end-to-end {last} --no-alpha --group-size {group}",
        "export_quantized_model.py",
        "evaluate_quantization.py --num-images {judged} --variants w4-rtn,native,native+a8-token --batch-size 2",
        "report_calibration.py",
    ),
    "rehearsal": (  # tools/prove.py rehearsal
        "generate_calibration_data.py --model {model} {t5} --num-images 8 --num-steps 20 --batch-size {drawn}",
        "cache_adaround_data.py --num-images 8 --stride 4",
        "collect_layer_activations.py --num-images 4 --stride {stride}",
        "analyze_activations.py",
        "optimize_adaround.py --iters {iters} --no-alpha --unit {unit} --end-to-end {last}",
        "export_quantized_model.py",
        "evaluate_quantization.py --num-images 4 --num-steps 20 --batch-size {judged} --variants w4-rtn,native",
        "draw_images.py 'red heart' --model {dir}/quantized_model --num-steps 20 {t5} --output {dir}/drawn",
        "report_calibration.py",
    ),
    "reliability": (  # tools/prove.py reliability, which kills each of them
        "generate_calibration_data.py --model sd3-emoji --num-images 6 --num-steps 6 --batch-size 2",
        "collect_layer_activations.py --num-images 6 --stride 1",
        "analyze_activations.py",
        "cache_adaround_data.py --num-images 6 --stride 1",
        "optimize_adaround.py --iters 12 --batch-size 4 --checkpoint-seconds 0.3",
        "export_quantized_model.py",
        "evaluate_quantization.py --num-images 2 --num-steps 3 --batch-size 2 --variants w4-rtn,native",
        "optimize_adaround.py --iters 10 --batch-size 4 --unit block --end-to-end 4 --checkpoint-seconds 0.3",
    ),
    "memory": (  # benchmarks/peak_memory.py, which runs each of them twice
        "generate_calibration_data.py --latent-size {side} {side} --model {model} {t5} --num-images 2 --num-steps 2 --no-images --force",
        "generate_calibration_data.py --latent-size {side} {side} --model {model} {t5} --num-images 2 --num-steps 2 --force",
        "cache_adaround_data.py --num-images 2 --stride 1 --blocks {blocks}",
        "collect_layer_activations.py --num-images 2 --stride 1",
        "analyze_activations.py",
        "optimize_adaround.py --blocks {blocks} --iters 10 --batch-size {batch} --micro-batch {micro} --unit block",
        "evaluate_quantization.py --num-images 1 --num-steps 2 --variants w4-rtn,a8",
    ),
}  # fmt: skip
VALUES: dict[str, dict[str, object]] = {  # of the words in braces, where a caller gives no other one
    "tiny": {
        "model": "sd3-emoji",
        "images": 2,
        "steps": 3,
        "used": 2,
        "stride": 1,
        "boundaries": "ends",
        "batch": 2,
        "micro": "",
        "blocks": "",
    },
    "demo": {"effort": "fast", "group": ""},
    "emoji_gpu": {"iters": 700},
}
DONE = """
Done. Open {dir}/report/index.html: what was measured, every image beside its original, and how to go on.
The quantized model is {dir}/quantized_model; draw with it: {python} draw_images.py --model {dir}/quantized_model "red heart"
It knows captions of emoji in lower case, without commas: models/sd3-emoji/captions.txt has all 3,764.
{dir}/drawn/compare.png has images of it beside the original's; docs/formats.md explains every file."""  # of the demo
DOES = {  # what a script does, for the line before its command
    "generate_calibration_data.py": "stage 1, draw prompts and keep the latents",
    "tools/contact_sheet.py": "put the pictures on one sheet",
    "cache_adaround_data.py": "stage 2W, keep what the blocks see",
    "collect_layer_activations.py": "stage 2A, measure every layer's inputs",
    "analyze_activations.py": "stage 3A, choose 8-bit ranges",
    "analyze_activations_multitier.py": "stage 3A', choose 4, 6 or 8 bits",
    "optimize_adaround.py": "stage 3W, learn the rounding",
    "export_quantized_model.py": "stage 5, write the 4-bit model",
    "evaluate_quantization.py": "stage 4, compare images with the original's",
    "draw_images.py": "draw with the 4-bit model and with the original",
    "report_calibration.py": "put it all on one page",
}
AGAIN = {  # the option with which a stage goes on after an interruption; the others take --resume
    "export_quantized_model.py": "--force",
    **dict.fromkeys(("analyze_activations.py", "analyze_activations_multitier.py", "tools/contact_sheet.py"), ""),
    **dict.fromkeys(("draw_images.py", "report_calibration.py"), ""),
}


def words(line: str, folder: str | Path, **values: object) -> list[str]:
    """Return the words of a road's line in a folder: the script, --calib-dir, and the options, with their values."""
    script, *rest = shlex.split(line)
    found = [script] if script == "draw_images.py" else [script, "--calib-dir", str(folder)]
    for word in rest:
        filled = word.format(dir=folder, **values)
        if filled:
            found.append(filled)
        elif found[-1].startswith("--"):
            found.pop()
    return found


def commands(road: str, folder: str | Path, **values: object) -> list[list[str]]:
    """Return the command lines of a road, each as its words. Raises UsageError where a value is missing."""
    given = {**VALUES.get(road, {}), **values}
    named = {name for line in ROADS[road] for _, name, _, _ in string.Formatter().parse(line) if name} - {"dir"}
    if missing := sorted(named - given.keys()):
        raise click.UsageError(f"the road {road} needs {', '.join(f'{name}=…' for name in missing)}")
    if unknown := sorted(given.keys() - named):
        raise click.UsageError(f"the road {road} knows no {', '.join(unknown)}")
    return [words(line, folder, **given) for line in ROADS[road]]


def again(script: str) -> list[str]:
    """Return the options with which a stage goes on after an interruption."""
    return AGAIN.get(script, "--resume").split()


@stage_command
@click.argument("road", type=click.Choice(["tiny", "demo", "emoji_gpu", "sd3_medium"]))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.argument("values", nargs=-1, metavar="[NAME=VALUE]...")
def main(road: str, folder: Path, values: tuple[str, ...]) -> int:
    """Run a ROAD in FOLDER, and print each command before it runs. Called again, the road goes on where it was."""
    if wrong := [value for value in values if "=" not in value]:
        raise click.UsageError(f"{wrong[0]}: not NAME=VALUE")
    given = dict(value.split("=", 1) for value in values)
    lines = commands(road, folder, **given)
    if road == "demo":
        effort = given.get("effort", str(VALUES[road]["effort"]))
        if effort not in OF_SMALL_MODELS:
            raise click.UsageError(f"EFFORT={effort}: one of {', '.join(OF_SMALL_MODELS)}")
        refuse_another_run(folder, OF_SMALL_MODELS[effort].num_images, effort, OF_SMALL_MODELS)
    code = run_commands(lines)
    if road == "demo" and not code:
        click.echo(DONE.format(dir=folder, python=interpreter()))
    return code


def refuse_another_run(folder: Path, images: int, effort: str, efforts: Mapping[str, Effort]) -> None:
    """Raise UsageError for a folder with a run of another number of images, which a recipe cannot go on with.

    Where there is no run, but there are some nearby, say that a new one begins. efforts: those of the recipe's model.
    """
    if not CalibrationPaths(folder).manifest.exists():
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
        if foreign := sorted(set(others) - {"samples", "images", "history.jsonl"}):
            raise click.UsageError(f"{folder}: holds {foreign[0]} and no run; give a new folder{runs_nearby(folder)}")
        click.echo(f"A new run in {folder}{runs_nearby(folder)}.")
        return
    with contextlib.suppress(StoreError):  # stage 1 tells what is wrong with the file
        found = read_manifest(folder)["num_images"]
        if found != images:
            other = next((name for name, one in efforts.items() if one.num_images == found), None)
            way = f"EFFORT={other} goes on with it" if other else f"it has {found} images, and effort {effort} {images}"
            raise click.UsageError(
                f"{folder}: holds a run of another effort ({way}); give another folder, such as {folder.parent / effort}"
            )


def run_commands(lines: list[list[str]]) -> int:
    """Run a road's commands, each printed before, and return the first code that is not 0.

    Ctrl-C is the stage's, which finishes and says how to go on; where this process alone gets SIGINT, it begins no other
    stage. SIGTERM ends the stage, too.
    """
    signals: list[int] = []
    running: list[subprocess.Popen] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if number == signal.SIGTERM and running:
            running[0].terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)
    for position, line in enumerate(lines, 1):
        click.echo(f"step {position} of {len(lines)}: {DOES[line[0]]}", err=True)
        command = [*line, *again(line[0])]
        click.echo(f"\n$ {interpreter()} {shlex.join(command)}")
        running = [subprocess.Popen([sys.executable, *command], cwd=ROOT, env=os.environ | {IN_A_ROAD: "1"})]
        if signal.SIGTERM in signals:  # it came before there was a stage to end
            running[0].terminate()
        code = running[0].wait()
        code = code if code >= 0 else 128 - code
        if signals and not code:
            code = 128 + signals[0]
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            click.echo("Stopped: the same command goes on where it was.", err=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    main()
