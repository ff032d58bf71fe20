"""From the command to the first pass: every stage, in a process of its own, beside reading the files that it needs.

python benchmarks/startup.py                                          # the bundled model
python benchmarks/startup.py --hf-home /tmp/hf --latent-size 16       # a random SD3-Medium (random_model.py)

The files are in the page cache: each stage runs after they were read once. `cat` reads the same ones.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.figures import record
from benchmarks.peak_memory import run, stages
from w4a8.cli import stage_command

UNTIL_FIRST_PASS = """
import sys, time, os, importlib
stage = importlib.import_module(sys.argv[1])
import w4a8.model.layers as layers
from w4a8.model.diffusionkit import MMDiT
def first(*arguments, **options):
    print(f"[first] {time.time() - float(os.environ['STARTED']):.3f}", flush=True)
    os._exit(0)
MMDiT.__call__ = layers.Block.run = first
stage.main(sys.argv[2:])
"""


def first_pass(environment: dict[str, str], stage: str, *arguments: str) -> float:
    """Seconds from the command to the first pass."""
    command = [sys.executable, "-c", UNTIL_FIRST_PASS, Path(stage).stem, *arguments]
    started = {"STARTED": str(time.time())}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment | started, capture_output=True, text=True)
    if "[first]" not in done.stdout:
        raise click.ClickException(f"{stage}: {done.stderr.strip()[-400:]}")
    return float(done.stdout.split("[first]")[1].split()[0])


def read_files(files: list[Path]) -> float:
    start = time.perf_counter()
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


@stage_command
@click.option("--hf-home", type=click.Path(path_type=Path, file_okay=False, exists=True), help="A random SD3-Medium.")
@click.option("--latent-size", type=click.IntRange(min=8), default=64, help="With --hf-home: height and width.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, help="Starts of each stage; medians are printed.")
def main(hf_home: Path | None, latent_size: int, repeats: int) -> None:
    """Seconds from the command to the first pass."""
    size = "sd3-medium" if hf_home else "sd3-emoji"
    environment = {"HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1"} if hf_home else {}
    folder = hf_home or ROOT.parent / "shared/models/sd3-emoji"
    weights = sorted(folder.rglob("*.safetensors")) if folder.exists() else []
    transformer = [path for path in weights if path.name in ("sd3_medium.safetensors", "mmdit.safetensors")]
    with tempfile.TemporaryDirectory() as temporary:
        for name, command in stages(size, latent_size, False, 2, None):
            if name == "1, no images":
                continue
            where = ["--calib-dir", str(Path(temporary) / "run")]
            run(environment, *command, *where)
            if name == "1":
                where = ["--calib-dir", str(Path(temporary) / "other")]
            if name != "3A":
                anew = {"1": [], "4": ["--seed", "1"]}.get(name, ["--force"])  # nothing is taken over
                arguments = [*command, *where, *anew]
                seconds = median(first_pass(environment, *arguments) for _ in range(repeats))
                files = transformer if name == "3W" else weights
                cat = median(read_files(files) for _ in range(repeats)) if files else 0
                click.echo(f"{name:4} {seconds:6.2f} s to the first pass; cat of its files {cat:5.2f} s")
                record(f"start of stage {name}, {size}", seconds, 2.5 if not hf_home else 1.3 * cat + 4, "s")


if __name__ == "__main__":
    main()
