"""The workflows of .github call what there is: targets of the Makefile, and Pythons that the package takes."""

import itertools
import re

import pytest
import yaml
from conftest import ROOT
from packaging.specifiers import SpecifierSet

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def jobs_of(path):
    return yaml.safe_load(path.read_text())["jobs"]


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def machines_of(job):
    """Yield every combination of a job's matrix, its expressions filled in: {"runs-on": …, "python-version": …}."""
    matrix = job.get("strategy", {}).get("matrix", {})
    (python,) = (step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    for values in itertools.product(*matrix.values()):
        filled = dict(zip(matrix, values, strict=True))
        found = {"runs-on": job["runs-on"], "python-version": python}
        yield {
            key: re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda name, filled=filled: filled[name[1]], value)
            for key, value in found.items()
        }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_call_targets_that_there_are(path):
    for name, job in jobs_of(path).items():
        called = [target for line in commands(job) for target in re.findall(r"\bmake ([a-z]+)", line)]
        assert called and set(called) <= TARGETS, name
        assert all(line.endswith(" PYTHON=python") for line in commands(job)), "setup-python's, not another one"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_pythons_are_those_of_the_package(path):
    (said,) = re.findall(r'^requires-python = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for name, job in jobs_of(path).items():
        for machine in machines_of(job):
            version = machine["python-version"]
            assert isinstance(version, str), f"{name}: {version} without quotes is a number, and 3.10 is 3.1"
            assert re.fullmatch(r"3\.\d+", version) and f"{version}.0" in SpecifierSet(said), name


def test_changes_are_checked_on_a_mac_and_on_linux_with_the_oldest_python():
    (path,) = WORKFLOWS
    workflow, jobs = yaml.safe_load(path.read_text()), jobs_of(path)
    machines = {(found["runs-on"], found["python-version"]) for found in machines_of(jobs["check"])}
    assert machines == {(system, python) for system in ("macos-14", "ubuntu-latest") for python in ("3.10", "3.13")}
    assert commands(jobs["check"]) == ["make check PYTHON=python"] and commands(jobs["nightly"]) == [
        "make test PYTHON=python"
    ]
    assert {"push", "pull_request", "schedule"} <= workflow[True].keys()  # YAML 1.1 reads `on` as true
