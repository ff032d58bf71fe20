"""Run every benchmark, and print one table: each figure beside its bound, with the machine, versions and commit.

python benchmarks/run_all.py                        # about three minutes on two CPU cores
python benchmarks/run_all.py --quick                # the smallest sizes, to see that everything runs
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import mlx.core as mx
import orjson

from benchmarks.figures import provenance
from calibration_store.files import write_json
from w4a8.cli import stage_command

ROOT = Path(__file__).resolve().parent.parent
ON_A_CPU = (
    ["generation_speed.py", "--repeats", "3"],
    ["collection_cost.py"],
    ["analysis_speed.py"],
    ["native_speed.py", "--no-rows"],
)
ON_A_GPU = (
    ["collection_cost.py", "--size", "sd3-medium"],
    ["native_speed.py", "--size", "sd3-medium"],
    ["rounding_cost.py", "--samples", "32"],
)
QUICK = (
    ["generation_speed.py", "--num-steps", "2", "--repeats", "1", "--batch-sizes", "2"],
    ["collection_cost.py", "--repeats", "1", "--samples", "1"],
    ["analysis_speed.py", "--repeats", "1", "--blocks", "1", "--steps", "2"],
    ["native_speed.py", "--repeats", "1", "--most-rows", "1"],
    ["rounding_cost.py", "--hidden", "64", "--tokens", "16", "--text-tokens", "8", "--samples", "8", "--batch-size", "2", "--timed", "1"],
)  # fmt: skip


@stage_command
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "benchmarks/results/latest.json",
    help="JSON to write.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Run the smallest sizes: the figures are of no worth.")
def main(output: Path, quick: bool) -> None:
    """Run every benchmark and print one table."""
    gpu = "gpu" in str(mx.default_device())
    rows = []
    for script, *arguments in QUICK if quick else (*ON_A_CPU, *(ON_A_GPU if gpu else ())):
        click.echo(f"running {script} {' '.join(arguments)} ...", err=True)
        rows += [{"script": script, **row} for row in figures_of(script, arguments)]
    machine = provenance()
    click.echo(", ".join(f"{name} {value}" for name, value in machine.items()))
    click.echo(f"{'figure':68} {'measured':>12} {'bound':>9}")
    for row in rows:
        bound = "" if row["bound"] is None else f"{row['bound']:g}"
        over = "  over" if row["bound"] is not None and row["value"] > row["bound"] else ""
        click.echo(f"{row['name']:68} {row['value']:9.3f} {row['unit']:2} {bound:>9}{over}")
    write_json(output, {"machine": machine, "figures": rows})
    click.echo(f"wrote {output}")


def figures_of(script: str, arguments: list[str]) -> list[dict]:
    """Run a benchmark, and return the figures that it recorded. Raises ClickException when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures"
        command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
        environment = os.environ | {"BENCHMARK_FIGURES": str(figures)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise click.ClickException(f"{script} failed with exit code {done.returncode}")
        return [orjson.loads(line) for line in figures.read_bytes().splitlines()]


if __name__ == "__main__":
    main()
