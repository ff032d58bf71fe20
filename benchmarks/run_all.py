"""Every benchmark, one table: each figure beside its bound, with machine and versions.

python benchmarks/run_all.py                        # about three minutes on two CPU cores
python benchmarks/draw.py                           # draws what it wrote
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import orjson

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from w4a8.cli import stage_command

SCRIPTS = (
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


@stage_command
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "benchmarks/results/latest.json",
    help="JSON to write.",
)  # fmt: skip
def main(output: Path) -> None:
    """Run every benchmark and print one table."""
    import mlx.core as mx

    from calibration_store.files import write_json

    device = str(mx.default_device())
    gpu = "gpu" in device
    rows = []
    for script, *arguments in (*SCRIPTS, *(ON_A_GPU if gpu else ())):
        click.echo(f"running {script} {' '.join(arguments)} ...", err=True)
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "figures"
            command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
            done = subprocess.run(
                command, env=os.environ | {"BENCHMARK_FIGURES": str(figures)}, stdout=subprocess.PIPE, text=True
            )
            if done.returncode:
                raise click.ClickException(f"{script} failed with exit code {done.returncode}")
            rows += [{"script": script} | orjson.loads(line) for line in figures.read_bytes().splitlines()]
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "diffusionkit", "numpy")}
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}, Python {platform.python_version()}"
    click.echo(f"{machine}, " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    click.echo(f"{'figure':68} {'measured':>12} {'bound':>9}")
    for row in rows:
        bound = "" if row["bound"] is None else f"{row['bound']:g}"
        over = "  over" if row["bound"] is not None and row["value"] > row["bound"] else ""
        click.echo(f"{row['name']:68} {row['value']:9.3f} {row['unit']:2} {bound:>9}{over}")
    write_json(output, {"machine": machine, "versions": versions, "figures": rows})
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
