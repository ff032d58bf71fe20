"""make setup: which Python it takes, and what it says when it cannot go on."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from tools import set_up

STUB = """#!/bin/sh
[ "$1" = -c ] || {{ echo "STARTED $0 $*"; exit 0; }}
case "$2" in *python_version*) echo {version} ;; *) exit {fits} ;; esac
"""


def make_python(folder, name, version, fits):
    path = folder / name
    path.write_text(STUB.format(version=version, fits=0 if fits else 1))
    path.chmod(0o755)
    return path


def find_python(folder, python=""):
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/none", "PYTHON": str(python)}
    command = ["sh", ROOT / "tools/set_up.sh", "cpu"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_python3_that_fits_is_taken_without_a_word(tmp_path):
    python = make_python(tmp_path, "python3", "3.12.1", fits=True)
    assert find_python(tmp_path).stdout == f"STARTED {python} tools/set_up.py cpu\n"


def test_another_python_is_taken_and_named_where_python3_does_not_fit(tmp_path):
    make_python(tmp_path, "python3", "3.9.18", fits=False)
    other = make_python(tmp_path, "python3.13", "3.13.0", fits=True)
    first, second = find_python(tmp_path).stdout.splitlines()
    assert first == "python3 is 3.9.18, which does not fit: taking python3.13"
    assert second == f"STARTED {other} tools/set_up.py cpu"


def test_a_python_that_was_named_is_taken_or_refused(tmp_path):
    make_python(tmp_path, "python3", "3.12.1", fits=True)
    old = make_python(tmp_path, "old", "3.9.18", fits=False)
    done = find_python(tmp_path, old)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"Error: Python 3.10 to 3.14 is needed, and {old} is 3.9.18\n"
    assert find_python(tmp_path, "/none").stderr.endswith("and /none is not found\n")


def test_the_real_check_takes_this_python():
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["sh", ROOT / "tools/set_up.sh", "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "{cpu,cuda12,cuda13}" in done.stdout


RETRY = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('Failed to establish')': /simple/numpy/\n"
NONE = "ERROR: No matching distribution found for mlx[cpu]<0.33,>=0.32.4\n"
OF_EXTRA = 'ERROR: No matching distribution found for mlx[cpu]<0.33,>=0.32.4; extra == "cpu"\n'
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (RETRY + NONE, "pip does not reach its package index"),
        (NONE, "no package mlx[cpu]<0.33,>=0.32.4 for Python"),
        (OF_EXTRA, "no package mlx[cpu]<0.33,>=0.32.4 for Python"),
        ("Collecting numpy\n" + FULL, "the disk is full"),
        ("ERROR: something\n  else\nerror: subprocess-exited-with-error\n", "installing failed: subprocess-exited"),
        ("", "installing failed: no reason given"),
    ],
)
def test_pips_output_becomes_one_line(log, words):
    assert set_up.explanation(log).startswith(words) and "\n" not in set_up.explanation(log)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Collecting numpy>=1.26 (from -r x)\n", "looking numpy up"),
        ("  Downloading scipy-1.17.1-cp311-cp311-manylinux_2_28_x86_64.whl (35.0 MB)\n", "getting scipy (35.0 MB)"),
        ("Installing collected packages: a, b, c\n", "installing 3 packages"),
        ("  Building editable for w4a8-mlx (pyproject.toml): started\n", "building w4a8-mlx"),
        ("Requirement already satisfied: pip\n", None),
    ],
)
def test_what_pip_is_doing(line, words):
    assert set_up.doing(line) == words


def test_a_long_command_is_never_silent(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(set_up, "EVERY", 0.2)
    monkeypatch.setattr(set_up, "LOG", tmp_path / "log")
    code, said = set_up.watch(
        0.0, "waiting", sys.executable, "-c", "import time; print('Collecting x'); time.sleep(0.7)"
    )
    assert code == 0 and said == "Collecting x\n" == (tmp_path / "log").read_text()
    assert capfd.readouterr().out.count("looking x up") >= 2


def test_other_machines_are_refused(monkeypatch):
    monkeypatch.setattr(set_up.platform, "libc_ver", lambda: ("glibc", "2.31"))
    monkeypatch.setattr(set_up.platform, "system", lambda: "Linux")
    monkeypatch.setattr(set_up.platform, "machine", lambda: "x86_64")
    with pytest.raises(set_up.SetupError, match=r"needs glibc 2.35 or newer .*, and this is glibc 2.31"):
        set_up.check_machine("cpu")
    monkeypatch.setattr(set_up.platform, "system", lambda: "Darwin")
    with pytest.raises(set_up.SetupError, match="this is Darwin on x86_64"):
        set_up.check_machine("cpu")


def listed(name):
    lines = (ROOT / name).read_text().splitlines()
    return {Requirement(line) for line in lines if line and not line.startswith(("#", "-"))}


def required(*extras, system):
    """Return {package: (extras, versions)} of what the installed package requires on a system, with these extras."""
    try:
        requirements = map(Requirement, importlib.metadata.requires("w4a8-mlx"))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("this Python has no w4a8-mlx: make setup")
    wanted: dict[str, set] = {}
    for one in requirements:
        if one.marker is None or any(
            one.marker.evaluate({"extra": extra, "platform_system": system}) for extra in (*extras, "")
        ):
            wanted.setdefault(one.name, set()).update(one.extras)
    return wanted


def on(requirements, system):
    return {
        one.name: one.extras
        for one in requirements
        if one.marker is None or one.marker.evaluate({"platform_system": system})
    }


@pytest.mark.parametrize("system", ["Linux", "Darwin"])
def test_the_package_requires_what_the_files_list(system):
    by_hand = listed("requirements.txt") | listed("requirements-test.txt")
    assert required("cpu", "test", system=system) == on(by_hand, system)
    assert "-r requirements-test.txt" in (ROOT / "requirements.txt").read_text()
    assert not required("cpu", system=system).keys() & on(listed("requirements-test.txt"), system).keys()


def test_mlx_builds_do_not_come_together():
    for build in ("cuda12", "cuda13"):
        found = required(build, "test", system="Linux")
        assert found["mlx"] == {build} and "scipy-openblas32" not in found
    assert required("cuda13", system="Darwin")["mlx"] == set()


def test_editing_what_is_installed_sets_up_again():
    (rule,) = re.findall(r"^\$\(INSTALLED\): (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(rule.split()) == {"pyproject.toml", *(path.name for path in ROOT.glob("requirements*.txt"))}
