"""Time, memory and file size of stages 3A and 3A' on statistics of SD3-Medium's size, each in a process of its own.

python benchmarks/analysis_speed.py                       # makes the statistics in a temporary folder (250 MB)
python benchmarks/analysis_speed.py --keep /tmp/medium    # and keeps them, --calib-dir of the analyzers
"""

import contextlib
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
from w4a8.cli import format_bytes, stage_command


def measure(arguments: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a stage's process; raises CalledProcessError when it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@stage_command
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep the statistics in this folder.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, help="Runs of each; the median is printed.")
def main(keep: Path | None, repeats: int) -> None:
    """Stages 3A and 3A' on statistics of SD3-Medium's size."""
    from benchmarks.medium_statistics import STEPS, layer_names, write_medium_statistics
    from calibration_store.layout import ActivationPaths

    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        size = write_medium_statistics(folder)
        click.echo(f"statistics: {len(layer_names())} layers × {STEPS} steps, {format_bytes(size)}")
        paths = ActivationPaths(folder)
        for arguments, output in (
            (["analyze_activations.py"], paths.quant_config),
            (["analyze_activations.py", "--use-hist-p999"], paths.quant_config),
            (["analyze_activations_multitier.py"], paths.multitier_config),
            (["analyze_activations_multitier.py", "--policy", "sqnr", "--average-bits", "6"], paths.multitier_config),
        ):
            runs = sorted(measure([*arguments, "--calib-dir", str(folder)]) for _ in range(repeats))
            seconds, peak = runs[len(runs) // 2]
            written = format_bytes(output.stat().st_size)
            name, bounds = (
                " ".join(arguments),
                (3, 400, 90) if arguments[0] == "analyze_activations.py" else (2, 400, None),
            )
            record(f"{name}: time", seconds, bounds[0], "s")
            record(f"{name}: peak memory", peak / 1e6, bounds[1], "MB")
            record(f"{name}: JSON", output.stat().st_size / 1e6, bounds[2], "MB")
            click.echo(f"{' '.join(arguments):65} {seconds:5.2f} s  {format_bytes(peak)} peak  {written} of JSON")


if __name__ == "__main__":
    main()
