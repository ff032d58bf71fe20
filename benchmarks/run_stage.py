"""Run a stage in this process, then print its seconds, MLX's peak memory, and the process's.

python benchmarks/run_stage.py collect_layer_activations.py --calib-dir calibration_data/demo

Nothing heavy is imported here, because its memory would count as the stage's.
"""

import importlib
import resource
import runpy
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--tiny", is_flag=True, help="Hub models are at the size of random_model.py --size tiny.")
@click.option("--depth", type=click.IntRange(2), help="Hub models are at the depth of random_model.py --depth.")
@click.argument("stage")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(tiny: bool, depth: int | None, stage: str, arguments: tuple[str, ...]) -> None:
    """Run STAGE, a script of this toolkit, with its ARGUMENTS; print seconds, MLX's peak and the process's."""
    if tiny:
        importlib.import_module("benchmarks.random_model").make_tiny()
    if depth is not None:
        importlib.import_module("benchmarks.random_model").make_depth(depth)
    started, code = time.perf_counter(), None
    sys.argv = [stage, *arguments]
    try:
        runpy.run_path(str(ROOT / stage), run_name="__main__")
    except SystemExit as end:
        code = end.code
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    mlx = sys.modules.get("mlx.core")  # the analyzers need none
    peak = mlx.get_peak_memory() if mlx else 0
    click.echo(f"\n[took] {time.perf_counter() - started:.2f} s, {peak} bytes MLX, {resident} bytes resident")
    sys.exit(code)


if __name__ == "__main__":
    main()
