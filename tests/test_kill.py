"""kill -9 at random moments, then --resume: the very bytes of one clean run, and nothing else in the folder.

KILLS=20 make test   kills each stage twenty times (the default is two, to keep the suite short).
"""

import contextlib
import os
import random
import shutil
import time

import pytest
from conftest import folder_bytes, generate, start

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "2"))


def newest(folder) -> int:
    """Time of the last change below `folder`, ns."""
    times = [0]
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a temporary file that has just been renamed
            times.append(path.stat().st_mtime_ns)
    return max(times)


def kill_and_resume(script, arguments, folder, rng) -> int:
    """Start the run again and again, killed each time; returns how often it was killed before it was done."""
    for kill in range(KILLS):
        before = newest(folder)
        process = start(script, *arguments, "--resume")
        if kill % 5 != 2:  # one in five dies while it starts, the others at a random moment after their first write
            while newest(folder) == before and process.poll() is None:
                time.sleep(0.005)
        time.sleep(rng.uniform(0, 1))
        if process.poll() is not None:
            process.communicate()
            return kill
        process.kill()
        process.communicate()
    return KILLS


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill") / "run"
    done = generate(
        "--num-images", 4 + KILLS, "--num-steps", 8, "--no-images", "--batch-size", 4, "--calib-dir", folder
    )
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("script", "output"), [("collect_layer_activations", "activations"), ("cache_adaround_data", "adaround_cache")]
)
def test_collection_survives_kill_9(calibration, tmp_path, script, output):
    arguments = ["--num-images", 4 + KILLS, "--stride", 1, "--calib-dir"]
    for name in ("clean", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples").symlink_to(calibration / "samples")
        shutil.copy(calibration / "manifest.json", tmp_path / name)
    clean = start(script, *arguments, tmp_path / "clean")
    _, stderr = clean.communicate(timeout=600)
    assert clean.returncode == 0, stderr
    killed = kill_and_resume(script, [*arguments, tmp_path / "killed"], tmp_path / "killed" / output, random.Random(3))
    assert killed >= 1
    last = start(script, *arguments, tmp_path / "killed", "--resume")
    _, stderr = last.communicate(timeout=600)
    assert last.returncode == 0, stderr
    assert folder_bytes(tmp_path / "killed" / output) == folder_bytes(tmp_path / "clean" / output)


@pytest.mark.parametrize("batch_size", [1, 4] if KILLS > 3 else [4])
def test_generation_survives_kill_9(tmp_path, batch_size):
    size = ["--num-images", 5 * KILLS, "--num-steps", 6]
    arguments = ["--model", "sd3-emoji", *size, "--batch-size", batch_size, "--calib-dir"]
    clean = start("generate_calibration_data", *arguments, tmp_path / "clean")
    _, stderr = clean.communicate(timeout=600)
    assert clean.returncode == 0, stderr

    killed = kill_and_resume(
        "generate_calibration_data", [*arguments, tmp_path / "killed"], tmp_path / "killed", random.Random(batch_size)
    )
    assert killed >= 1
    last = start("generate_calibration_data", *arguments, tmp_path / "killed", "--resume")
    _, stderr = last.communicate(timeout=600)
    assert last.returncode == 0, stderr
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "clean")
