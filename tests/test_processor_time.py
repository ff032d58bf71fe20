"""A test that takes long is marked, or `make check` fails."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

TESTS = """
import time, pytest

def work(seconds=0.3):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture(scope="module")
def shared():
    work()

@pytest.fixture
def own():
    work()

def test_shared(shared): pass
def test_setup(own): pass
def test_call(): work()
def test_wrong(): work(); assert False, "its own fault"
@pytest.mark.slow
def test_marked(): work()
def test_child():
    import subprocess, sys
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.3: pass"])
def test_sleeping(): time.sleep(0.3)
"""
PLUGIN = "import processor_time\nprocessor_time.LIMIT = 0.2\nfrom processor_time import *\n"


def run(tmp_path, *arguments, **environment):
    (tmp_path / "conftest.py").write_text(PLUGIN)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: long\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SLOW_MACHINE"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = clean | {"PYTHONPATH": str(ROOT / "tests")} | environment
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout


QUICK = ("-m", "not slow")
LISTED = {("test_setup", "setup"), ("test_call", "call"), ("test_child", "call")}


def listed(output):
    return set(
        re.findall(
            r"^test_some.py::(\w+): its (\w+) takes 0\.\d s of processor time, more than 0.2$", output, re.MULTILINE
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_a_quick_run_fails_for_tests_that_are_not(tmp_path, workers):
    output = run(tmp_path, *QUICK, *workers)
    assert "3 failed, 2 passed" in output and "1 error" in output and "its own fault" in output
    assert output.count(": mark it with @pytest.mark.slow, or set SLOW_MACHINE=1 on a slow machine") >= 3
    assert listed(output) == LISTED


@pytest.mark.slow
def test_other_runs_list_them(tmp_path):
    for output in (run(tmp_path), run(tmp_path, *QUICK, SLOW_MACHINE="1")):
        assert "1 failed" in output and "error" not in output and listed(output) == LISTED
