"""What the benchmarks share: a figure is printed, and kept for run_all.py when that asks for it."""

import os
from pathlib import Path

import orjson


def record(name: str, value: float, bound: float | None = None, unit: str = "×") -> None:
    """Note a figure in the file that BENCHMARK_FIGURES names; bound is what it should stay below."""
    target = os.environ.get("BENCHMARK_FIGURES")
    if target:
        with Path(target).open("ab") as file:
            file.write(orjson.dumps({"name": name, "value": value, "bound": bound, "unit": unit}) + b"\n")
