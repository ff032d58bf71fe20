"""Test stages under MLX's own launcher, as a user starts them: the same bytes, a lost rank named."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import folder_bytes

from tools.road import commands

pytestmark = pytest.mark.slow


ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = Path(sys.executable).with_name("mlx.launch")
FOLDER = "THE FOLDER"
ROAD = commands("tiny", FOLDER, images=3, steps=3, used=3, batch=3, micro=1, blocks="mm0")
GENERATE, CACHE, COLLECT, ANALYZE, _, OPTIMIZE, _, EVALUATE, *_ = ROAD
EVALUATE += ["--num-images", "3", "--batch-size", "2"]
STAGES = (GENERATE, CACHE, COLLECT, OPTIMIZE, EVALUATE)


def command(stage, folder, ranks):
    launcher = [LAUNCHER, "-n", str(ranks), "--python", sys.executable] if ranks else [sys.executable]
    return [*map(str, launcher), *(str(folder) if word == FOLDER else word for word in stage)]


def run(stage, folder, ranks=0):
    return subprocess.run(
        command(stage, folder, ranks), cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "alone"
    for stage in STAGES:
        assert run(stage, folder).returncode == 0
    return folder


def test_two_ranks_leave_the_files_of_one(alone, tmp_path):
    for stage in STAGES:
        found = run(stage, tmp_path / "two", 2)
        assert "wrote" in found.stdout and found.stdout.count("to do:") <= 1, found.stderr
    assert folder_bytes(tmp_path / "two") == folder_bytes(alone)


def test_a_dry_run_says_each_ones_share_and_writes_nothing(alone):
    before = folder_bytes(alone)
    found = run([*COLLECT, "--force", "--dry-run"], alone, 2)
    assert "2 ranks: 4, 5 passes" in found.stdout
    assert folder_bytes(alone) == before and not (alone / ".ranks").exists()


@pytest.mark.parametrize("lost", [1])
def test_a_lost_rank_ends_the_others_and_one_process_goes_on(alone, tmp_path, lost):
    folder = tmp_path / "killed"
    shutil.copytree(alone, folder, ignore=shutil.ignore_patterns("activations"))
    process = subprocess.Popen(
        command(COLLECT, folder, 2), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while not (signs := [path for path in folder.glob(f".ranks/*_{lost}.json") if path.read_bytes().endswith(b"}")]):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(json.loads(signs[0].read_bytes())["pid"], signal.SIGKILL)
    start = time.monotonic()
    _, errors = process.communicate(timeout=90)
    assert time.monotonic() - start < 60
    assert errors.count("Error: ") == 1 and f"rank {lost} (" in errors and "has ended" in errors
    assert run([*COLLECT, "--resume"], folder).returncode == 0
    shutil.rmtree(folder / ".ranks", ignore_errors=True)
    assert folder_bytes(folder) == folder_bytes(alone)


def test_an_error_of_all_is_said_once(alone):
    found = run(COLLECT, alone, 2)
    assert found.stderr.count("holds a run already") == 1


def test_blocks_are_shared_out_where_all_boundaries_are_cached(alone, tmp_path):
    """Kill the ranks when each is at a block of its own; let one process go on."""
    folder, stage = tmp_path / "one", [*OPTIMIZE, "--blocks", "mm0,mm1,mm2"]
    shutil.copytree(alone, folder, ignore=shutil.ignore_patterns(".ranks", "activations", "adaround_*", "evaluation"))
    assert run([*CACHE, "--boundaries", "all"], folder).returncode == 0
    killed = shutil.copytree(folder, tmp_path / "killed")
    assert run(stage, folder).returncode == 0
    assert "2 ranks: 2, 1 blocks" in run([*stage, "--dry-run"], killed, 2).stdout
    process = subprocess.Popen(
        command([*stage, "--checkpoint-seconds", "0.05"], killed, 2), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    while not (killed / "adaround_weights/checkpoint_mm1.npz").exists():
        assert process.poll() is None
        time.sleep(0.01)
    for path in killed.glob(".ranks/*.json"):
        with contextlib.suppress(ProcessLookupError):  # the launcher ends the second one itself
            os.kill(json.loads(path.read_bytes())["pid"], signal.SIGKILL)
    process.communicate(timeout=90)
    shutil.rmtree(killed / ".ranks")
    assert run([*stage, "--resume"], killed).returncode == 0
    assert folder_bytes(killed) == folder_bytes(folder)


def test_other_stages_are_for_one_process(alone):
    found = run(ANALYZE, alone, 2)
    assert "is for one process: run it without mlx.launch" in found.stderr
