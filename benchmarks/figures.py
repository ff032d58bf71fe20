"""Keep the figures that benchmarks measure, and say on which machine and with which versions."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import orjson

from w4a8.model.catalog import package_versions

ROOT = Path(__file__).resolve().parent.parent


def record(name: str, value: float, bound: float | None = None, unit: str = "×") -> None:
    """Append a figure to the file that BENCHMARK_FIGURES names; bound is the value that it should stay below."""
    target = os.environ.get("BENCHMARK_FIGURES")
    if target:
        with Path(target).open("ab") as file:
            file.write(orjson.dumps({"name": name, "value": value, "bound": bound, "unit": unit}) + b"\n")


def provenance() -> dict[str, Any]:
    """Return the machine, the versions of Python, the toolkit and its packages, and the commit."""
    return {
        "system": platform.platform(),
        "device": mx.device_info()["device_name"],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **package_versions(),
        "commit": commit(),
    }


def commit() -> str:
    """Return git's short name of the commit, with `-dirty` where tracked files differ from it; "unknown" outside of git."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
