"""Fixtures and helpers that many test files share."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import mlx.core as mx
import numpy as np
import processor_time
import pytest
import worker_cores
from click.testing import CliRunner

from w4a8.model.catalog import describe_model
from w4a8.model.loading import load_pipeline, whole_model

ROOT = Path(__file__).resolve().parent.parent
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would compile the package, each anew
pytest_configure = processor_time.pytest_configure
pytest_runtest_protocol = worker_cores.pytest_runtest_protocol


@pytest.fixture(scope="session")
def emoji():
    """Return the bundled model, float32, for the tests that leave it as they found it."""
    return load_pipeline(describe_model("sd3-emoji"), whole_model("float32"))


def made_once(base: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that the first of the test processes makes, and that all of them read.

    base: the session's temporary folder; the folders of pytest-xdist's workers lie in one folder.
    """
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with filelock.FileLock(f"{folder}.lock"):
        if not Path(f"{folder}.made").exists():
            make(folder)
            Path(f"{folder}.made").touch()
    return folder


@contextlib.contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Compute on the CPU in the block, with a memory limit for MLX of `num_bytes`."""
    device, before = mx.default_device(), mx.set_memory_limit(num_bytes)
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(device)
        mx.set_memory_limit(before)


def invoke(script: str, *arguments):
    """Run a stage's command line in this process; return its exit_code, stdout and stderr."""
    return CliRunner().invoke(importlib.import_module(script).main, list(map(str, arguments)))


def start(script: str, *arguments, **options) -> subprocess.Popen:
    """Start a stage in a process of its own. options: those of subprocess.Popen."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def interruptible() -> None:
    """Let Ctrl-C reach a process whose preexec_fn this is; a suite that runs in the background inherits SIG_IGN."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def generate(*arguments):
    """Run stage 1 with the bundled model in this process; return the result of `invoke`."""
    return invoke("generate_calibration_data", "--model", "sd3-emoji", *arguments)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return {path below `folder`: content} of every file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "history.jsonl"
    }


def on_grid(codes, scale, zero_point):
    """scale·(code − zero point) in float64, as FORMATS has it."""
    grouped = codes.astype(np.float64).reshape(*scale.shape, -1) - zero_point.astype(np.float64)[..., None]
    return (grouped * scale.astype(np.float64)[..., None]).reshape(codes.shape)
