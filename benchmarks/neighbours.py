"""Stages beside each other, and beside busy processes; with BLAS threads that wait asleep, and spinning ones.

python benchmarks/neighbours.py        # the bundled model, about two minutes on two cores; nothing else should run
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.figures import record
from w4a8.cli import stage_command

BUSY = "import time\nend = time.time() + 600\nwhile time.time() < end: pass"


WAITING = {"asleep": "4", "spinning": "26"}  # OPENBLAS_THREAD_TIMEOUT: 2⁴ cycles, ours, and 2²⁶, OpenBLAS's own


def start(waiting: str, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"OPENBLAS_THREAD_TIMEOUT": WAITING[waiting]}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def seconds_of(waiting: str, *commands: list[str]) -> float:
    """Until all of these stages, started together, are finished."""
    begin = time.perf_counter()
    processes = [start(waiting, *command) for command in commands]
    for process in processes:
        if process.wait():
            raise click.ClickException(f"{process.args} failed")
    return time.perf_counter() - begin


@stage_command
@click.option("--images", type=click.IntRange(min=1), default=8, help="Images that both stages use.")
def main(images: int) -> None:
    """Stages 2W and 2A alone, together, and beside four busy processes; threads that wait asleep and spinning."""
    with tempfile.TemporaryDirectory() as temporary:
        where = ["--calib-dir", str(Path(temporary) / "run")]
        made = [
            "generate_calibration_data.py",
            "--model",
            "sd3-emoji",
            "--num-images",
            str(images),
            "--num-steps",
            "24",
        ]
        seconds_of("asleep", [*made, "--batch-size", "8", "--no-images", *where])
        few = ["--num-images", str(images), "--force", *where]
        cache = ["cache_adaround_data.py", "--stride", "2", *few]
        collect = ["collect_layer_activations.py", "--stride", "2", *few]
        for waiting in WAITING:
            alone = [min(seconds_of(waiting, command) for _ in range(2)) for command in (cache, collect)]
            together = min(seconds_of(waiting, cache, collect) for _ in range(2))
            busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(4)]
            try:
                crowded = seconds_of(waiting, cache)
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
            click.echo(
                f"{waiting:8} 2W {alone[0]:5.1f} s, 2A {alone[1]:5.1f} s alone; together {together:5.1f} s, "
                f"{together / sum(alone):.2f} x their sum; 2W beside four busy processes {crowded / alone[0]:.2f} x"
            )
            if waiting == "asleep":
                record("2W and 2A side by side ÷ the sum of each alone", together / sum(alone), 0.55)
                record("2W beside four busy processes ÷ alone", crowded / alone[0], 3.5)


if __name__ == "__main__":
    main()
