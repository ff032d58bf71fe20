"""Fill .venv with this checkout and what requirements.txt names, and a browser for the report's tests. `make setup` runs this.

python tools/set_up.py cpu          # or cuda12, cuda13: MLX for an NVIDIA GPU (Linux)

It needs nothing but Python. The whole output of pip goes to .venv/setup.log; here a line comes every five seconds. Without
a browser it goes on: tools/browser.py says why there is none.
"""

import argparse
import errno
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON, LOG = VENV / "bin/python", VENV / "setup.log"
DIFFUSIONKIT = ROOT / "requirements-diffusionkit.txt"
GIGABYTES = {"cpu": 0.8, "cuda12": 4.0, "cuda13": 4.0}  # of disk while packages are installed
GLIBC = (2, 35)  # MLX's wheels for Linux want it
EVERY = 5  # seconds between two lines


class SetupError(Exception):
    """One line for the user: what is wrong, and what to do."""


def check_machine(mlx: str) -> None:
    """Raise SetupError where MLX has no wheel, or the disk has too little room."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) not in (("Darwin", "arm64"), ("Linux", "x86_64"), ("Linux", "aarch64")):
        raise SetupError(f"MLX runs on Apple silicon, and on Linux (x86-64, ARM); this is {system} on {machine}")
    if system == "Darwin" and mlx != "cpu":
        raise SetupError(f"MLX={mlx} is for NVIDIA GPUs on Linux; on a Mac leave it out: MLX uses Metal")
    libc, version = platform.libc_ver()
    if system == "Linux" and (libc != "glibc" or tuple(map(int, version.split(".")[:2])) < GLIBC):
        raise SetupError(
            f"MLX needs glibc 2.35 or newer (Ubuntu 22.04, Debian 12), and this is {libc or 'no glibc'} {version}"
        )
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < GIGABYTES[mlx] and not VENV.exists():
        raise SetupError(
            f"{VENV} takes up to {GIGABYTES[mlx]:.1f} GB, and the disk has {free:.1f} GB free: free some space"
        )


def make_environment() -> None:
    """Make .venv with this Python, anew where it has another version. Raises SetupError."""
    ask = [PYTHON, "-c", "import sys, pip; print(sys.version_info[:2] == " + repr(tuple(sys.version_info[:2])) + ")"]
    if PYTHON.exists() and subprocess.run(ask, capture_output=True, text=True).stdout == "True\n":
        return
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True)
    if done.returncode:
        said = done.stdout + done.stderr
        if "ensurepip" in said and not is_full(said):
            package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
            raise SetupError(f"{sys.executable} cannot make an environment: apt install {package} (Debian, Ubuntu)")
        raise SetupError(explanation(said))


def is_full(text: str) -> bool:
    return os.strerror(errno.ENOSPC) in text or os.strerror(errno.EDQUOT) in text


def explanation(log: str) -> str:
    """Return one line that says why pip or venv failed, from all that it said."""
    if is_full(log):
        return f"the disk is full ({ROOT} or {tempfile.gettempdir()}): free some space"
    if re.search(r"connection broken|Failed to establish a new connection|Max retries exceeded|timed out", log):
        return "pip does not reach its package index: is there a network? (a proxy: set HTTPS_PROXY)"
    version = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if missing := re.search(r"No matching distribution found for ([^\s;]+)", log):
        return f"no package {missing[1]} for {version}; the whole output is in {LOG}"
    errors = re.findall(r"^(?:ERROR|error): (.+)", log, re.MULTILINE) or log.strip().splitlines()[-1:]
    return f"installing failed: {' '.join(errors[-1].split())[:200] if errors else 'no reason given'}; the whole output is in {LOG}"


def doing(line: str) -> str | None:
    """Return what a line of pip's output says that it is doing, in a few words."""
    for pattern, words in (
        (r"Collecting ([\w.-]+)", "looking {} up"),
        (r"\s+(?:Downloading|Using cached) ([\w.-]+?)-\d\S* \((.+)\)", "getting {} ({})"),
        (r"\s*Building (?:wheel|editable) for (\S+)", "building {}"),
        (r"Installing collected packages: (.+)", "installing {} packages"),
        (r"WARNING: Retrying", "the package index does not answer, trying again"),
    ):
        if found := re.match(pattern, line):
            groups = found.groups()
            return words.format(len(groups[0].split(","))) if "packages" in words else words.format(*groups)
    return None


def pip(started: float, *arguments: str | Path) -> None:
    """Run pip in .venv. Raises SetupError."""
    code, said = watch(started, "pip starts", PYTHON, "-m", "pip", *arguments)
    if code:
        raise SetupError(explanation(said))


def watch(started: float, words: str, *command: str | Path) -> tuple[int, str]:
    """Run a command, with a line every few seconds that says what it is doing; return its exit code and output."""
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    try:
        while reader.is_alive():
            reader.join(EVERY)
            if reader.is_alive():
                latest = next(filter(None, map(doing, reversed(lines.copy()))), words)
                print(f"{time.monotonic() - started:4.0f} s  {latest}", flush=True)
    finally:
        if process.poll() is None and sys.exc_info()[0]:
            process.terminate()
        process.wait()
        with open(LOG, "a", encoding="utf-8") as log:
            log.writelines(lines)
    return process.returncode, "".join(lines)


def install(mlx: str) -> None:
    """Install everything into .venv, and note which MLX it has. Raises SetupError."""
    started = time.monotonic()
    print(
        f"Setting .venv up with {sys.executable}, Python {platform.python_version()}; a minute or two, once", flush=True
    )
    make_environment()
    for mark in VENV.glob("installed-*"):
        mark.unlink()
    LOG.unlink(missing_ok=True)
    if mlx != "cpu":
        pip(started, "uninstall", "--yes", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
    pip(started, "install", "--editable", f".[{mlx},test]")  # what requirements.txt names (tools/package_metadata.py)
    pip(started, "install", "--no-deps", "-r", DIFFUSIONKIT)
    _, said = watch(started, "getting a browser for the report's tests", PYTHON, ROOT / "tools/browser.py")
    print(f"{time.monotonic() - started:4.0f} s  {said.strip()}")
    (VENV / f"installed-{mlx}").touch()
    size = sum(path.lstat().st_size for path in VENV.rglob("*"))
    print(f"{time.monotonic() - started:4.0f} s  done, {size / 1e9:.2f} GB", flush=True)


def main() -> int:
    """Set up, or say in one line why that is not possible."""
    parser = argparse.ArgumentParser(description="Fill .venv with this checkout and what requirements.txt names.")
    parser.add_argument(
        "mlx", choices=list(GIGABYTES), nargs="?", default="cpu", help="MLX's build on Linux (default: cpu)"
    )
    mlx = parser.parse_args().mlx
    try:
        check_machine(mlx)
        install(mlx)
    except SetupError as error:
        print(f"Error: {error}; then make setup again (Issue 13)", file=sys.stderr)
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"the disk of {ROOT} is full: free some space" if full else f"{error.filename}: {error.strerror}"
        print(f"Error: {reason}; then make setup again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; make setup goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
