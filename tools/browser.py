"""Find a headless Chromium for the report's tests: the one that is installed, or npm's build of it in .venv/browser.

python tools/browser.py        # say which one there is, or fetch it (Linux on x86-64, 65 MB, no root)

The npm package @sparticuz/chromium brings Chromium and the libraries and fonts that a bare machine lacks, compressed.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".venv"
FETCHED = VENV / "browser"
PACKAGE = "@sparticuz/chromium@147.0.0"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ON_MACOS = ("Google Chrome", "Chromium")
UNPACK = """
const { readFileSync, writeFileSync } = require("fs"), { brotliDecompressSync } = require("zlib");
const [folder, output] = process.argv.slice(1);
for (const name of ["chromium", "al2023.tar", "fonts.tar"])
  writeFileSync(`${output}/${name}`, brotliDecompressSync(readFileSync(`${folder}/${name}.br`)));
"""


class NoBrowser(Exception):
    """There is no browser; the message says why in one line."""


def find_browser() -> tuple[str, dict[str, str]] | None:
    """Return (program, the environment to run it in) of an installed or fetched Chromium; None where there is none.

    $CHROMIUM names one that is elsewhere.
    """
    apps = [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ON_MACOS]
    for name in (os.environ.get("CHROMIUM"), *NAMES, *apps):
        if name and (program := shutil.which(name)) and works(program, dict(os.environ)):
            return program, dict(os.environ)
    fetched, environment = FETCHED / "chromium", dict(os.environ)
    environment["LD_LIBRARY_PATH"] = f"{FETCHED / 'lib'}:{environment.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    if not Path("/etc/fonts").exists():
        environment["FONTCONFIG_PATH"] = str(FETCHED)
    return (str(fetched), environment) if fetched.exists() and works(str(fetched), environment) else None


def works(program: str, environment: dict[str, str]) -> bool:
    """Return whether a program starts and says its version; Ubuntu has one that only tells to install another."""
    return not subprocess.run([program, "--version"], env=environment, capture_output=True).returncode


def fetch_browser() -> None:
    """Fetch Chromium into .venv/browser. Raises NoBrowser."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise NoBrowser("npm has one for Linux on x86-64 alone: install Chromium or Chrome")
    if not (shutil.which("npm") and shutil.which("node")):
        raise NoBrowser("install Chromium or Chrome, or npm, which can fetch one")
    VENV.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=VENV) as temporary:
        quiet = ("--no-save", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error")
        run("npm", "install", "--prefix", temporary, *quiet, PACKAGE)
        unpacked = Path(temporary) / "browser"
        unpacked.mkdir()
        run("node", "-e", UNPACK, f"{temporary}/node_modules/{PACKAGE.rpartition('@')[0]}/bin", str(unpacked))
        for archive in ("al2023.tar", "fonts.tar"):
            run("tar", "-xf", str(unpacked / archive), "-C", str(unpacked))
        (unpacked / "chromium").chmod(0o755)
        shutil.rmtree(FETCHED, ignore_errors=True)
        unpacked.rename(FETCHED)


def run(*command: str) -> None:
    """Run a command. Raises NoBrowser with its first line of errors."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise NoBrowser(f"{command[0]} failed ({lines[0].strip()[:160]})")


def main() -> int:
    """Find a browser, fetch one where there is none, and say in one line what there is."""
    try:
        if find_browser() is None:
            fetch_browser()
        found = find_browser()
        if found is None:
            raise NoBrowser(f"{FETCHED} does not start")
    except NoBrowser as error:
        print(f"No browser: {error}. Tests of the report's page that need one are skipped.")
        return 1
    print(f"Browser for the report's tests: {found[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
