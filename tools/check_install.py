"""Ask pip for a wheel of everything that `make setup` installs, for every platform and Python; install nothing.

python tools/check_install.py                                    # benchmarks/results/DATE-install.json, about ten minutes
python tools/check_install.py --platform linux-aarch64 --python 3.14

A requirement's own requirements are asked for, too, by the markers of the platform in question. Versions are those that
pip takes for each package alone; a conflict between two packages would not show.
"""

import datetime
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.figures import commit
from calibration_store.files import atomic_file
from w4a8.cli import progress_bar, stage_command

ROOT = Path(__file__).resolve().parent.parent
LINUX = ["manylinux2014", "manylinux2010", "manylinux1", *(f"manylinux_2_{minor}" for minor in range(5, 36))]
PLATFORMS = {
    "linux-x86_64": ("Linux", "x86_64", [f"{tag}_x86_64" for tag in LINUX]),
    "linux-aarch64": ("Linux", "aarch64", [f"{tag}_aarch64" for tag in LINUX]),
    "macos-arm64": ("Darwin", "arm64", ["macosx_14_0_arm64"]),
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
FORMAT = "install_v1"
LISTED, WITHOUT_THEIRS = ("requirements.txt", "requirements-test.txt"), "requirements-diffusionkit.txt"


def requirements(*names: str) -> list[Requirement]:
    """Read requirement files, without those that they include."""
    lines = [line for name in names for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


def wanted_on(requirement: Requirement, target: dict[str, str], extras: Iterable[str] = ()) -> bool:
    """Return whether a requirement's marker is true on the target, for one of these extras of who requires it."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate(target | {"extra": extra}) for extra in (*extras, ""))


def without_marker(requirement: Requirement) -> str:
    """Return a requirement as text, for every environment."""
    requirement.marker = None
    return str(requirement)


def ask_pip(wanted: list[str], tags: list[str], python: str, binary: bool) -> list[dict[str, Any]] | None:
    """Return pip's entries for these requirements, and none of theirs; None where it finds no file for one of them."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--report", "-"]
    command += ["--target", "/nowhere", "--ignore-installed", "--python-version", python]
    command += [word for tag in tags for word in ("--platform", tag)]
    command += ["--only-binary", ":all:"] if binary else []
    done = subprocess.run([*command, *wanted], capture_output=True, text=True)
    if "connection broken" in done.stderr:
        raise click.ClickException("pip does not reach its package index")
    return json.loads(done.stdout)["install"] if done.returncode == 0 else None


def find_files(system: str, machine: str, tags: list[str], python: str) -> dict[str, str | None]:
    """Return the file that pip would take for every package, from the listed requirements on to theirs; None: it finds none."""
    target = {
        "sys_platform": system.lower(), "platform_system": system, "platform_machine": machine, "os_name": "posix",
        "python_version": python, "python_full_version": f"{python}.0", "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }  # fmt: skip
    found: dict[str, str | None] = {}
    for item in requirements(WITHOUT_THEIRS):  # pure Python; what they require is listed by hand
        entries = ask_pip([str(item)], tags, python, binary=False)
        found[item.name] = entries[0]["download_info"]["url"].rsplit("/", 1)[1] if entries else None
    frontier = [item for item in requirements(*LISTED) if wanted_on(item, target)]
    while frontier:
        asked = {canonicalize_name(item.name): item for item in frontier}
        texts = {name: without_marker(item) for name, item in asked.items()}
        entries = ask_pip(list(texts.values()), tags, python, binary=True)
        if entries is None:  # one of them has none: which?
            entries = [entry for text in texts.values() for entry in ask_pip([text], tags, python, binary=True) or ()]
        found |= dict.fromkeys(asked)
        frontier = []
        for entry in entries:
            name = canonicalize_name(entry["metadata"]["name"])
            found[name] = entry["download_info"]["url"].rsplit("/", 1)[1]
            needed = map(Requirement, entry["metadata"].get("requires_dist") or ())
            frontier += [
                item
                for item in needed
                if wanted_on(item, target, asked[name].extras) and canonicalize_name(item.name) not in found
            ]
    return found


@stage_command
@click.option(
    "--platform", "platforms", type=click.Choice(list(PLATFORMS)), multiple=True, help="One platform.  [default: all]"
)
@click.option("--python", "pythons", type=click.Choice(PYTHONS), multiple=True, help="One Python.  [default: all]")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON file.  [default: benchmarks/results/DATE-install.json]",
)
def main(platforms: tuple[str, ...], pythons: tuple[str, ...], output: Path | None) -> None:
    """Ask pip for a wheel of everything that is installed, and write a dated table."""
    cells = [(name, python) for name in platforms or PLATFORMS for python in pythons or PYTHONS]
    table: dict[str, dict[str, dict[str, str | None]]] = {}
    with progress_bar(len(cells), "asking pip", "environment") as bar:
        for name, python in cells:
            table.setdefault(name, {})[python] = find_files(*PLATFORMS[name], python)
            bar.update()
    today = datetime.date.today().isoformat()
    path = output or ROOT / f"benchmarks/results/{today}-install.json"
    requirement_files = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*LISTED, WITHOUT_THEIRS)}
    content = {"format": FORMAT, "commit": commit(), "date": today, "requirements": requirement_files, "files": table}
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
    for name, python in cells:
        files = table[name][python]
        missing = sorted(package for package, file in files.items() if file is None)
        built = sorted(package for package, file in files.items() if file and not file.endswith(".whl"))
        said = f"NO FILE for {', '.join(missing)}" if missing else "all there"
        click.echo(
            f"{name:14} Python {python}: {len(files)} packages, {said}"
            f"; from source: {', '.join(built) or 'none'}; FLIP {'yes' if 'flip-evaluator' in files else 'no'}"
        )
    if any(file is None for files in table.values() for found in files.values() for file in found.values()):
        raise click.ClickException(f"some packages have no file; {path} says which")


if __name__ == "__main__":
    main()
