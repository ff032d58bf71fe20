"""kill -9 at random moments, then --resume: the very bytes of one clean run, and nothing else in the folder.

KILLS=20 make test   kills each stage twenty times (the default is five, to keep the suite short).
"""

import os
import random
import shutil
import time

import pytest
from conftest import folder_bytes, generate, start

KILLS = int(os.environ.get("KILLS", "5"))


def kill_after(process, seconds: float) -> bool:
    """kill -9 after `seconds`; False when the process had ended by itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    alive = process.poll() is None
    if alive:
        process.kill()
    process.communicate()
    return alive


def kill_and_resume(script, arguments, folder, rng, until_working: float) -> int:
    """Start the run again and again, killed each time; returns how often it was killed before it was done."""
    for kill in range(KILLS):
        process = start(script, *arguments, "--resume")
        # one in five dies while it starts; the others while they write
        if not kill_after(
            process, rng.uniform(0, until_working) if kill % 5 == 4 else until_working + rng.uniform(0, 1.5)
        ):
            return kill
        for path in folder.rglob("*"):
            assert path.is_dir() or path.stat().st_size > 0 or path.suffix == ".tmp"
    return KILLS


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill") / "run"
    done = generate(
        "--num-images", 4 + KILLS, "--num-steps", 12, "--no-images", "--batch-size", 4, "--calib-dir", folder
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
    began = time.monotonic()
    clean = start(script, *arguments, tmp_path / "clean")
    while not list((tmp_path / "clean").glob(f"{output}/*/*.npz")):
        assert clean.poll() is None
        time.sleep(0.01)
    until_working = time.monotonic() - began
    _, stderr = clean.communicate(timeout=600)
    assert clean.returncode == 0, stderr
    killed = kill_and_resume(
        script, [*arguments, tmp_path / "killed"], tmp_path / "killed" / output, random.Random(3), until_working
    )
    assert killed >= min(KILLS, 3)
    last = start(script, *arguments, tmp_path / "killed", "--resume")
    _, stderr = last.communicate(timeout=600)
    assert last.returncode == 0, stderr
    assert folder_bytes(tmp_path / "killed" / output) == folder_bytes(tmp_path / "clean" / output)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_survives_kill_9(tmp_path, batch_size):
    size = ["--num-images", 5 * KILLS, "--num-steps", 6]
    arguments = ["--model", "sd3-emoji", *size, "--batch-size", batch_size, "--calib-dir"]
    began = time.monotonic()
    clean = start("generate_calibration_data", *arguments, tmp_path / "clean")
    while not (tmp_path / "clean" / "manifest.json").exists():
        time.sleep(0.01)
    until_working = time.monotonic() - began
    _, stderr = clean.communicate(timeout=600)
    assert clean.returncode == 0, stderr

    killed = kill_and_resume(
        "generate_calibration_data",
        [*arguments, tmp_path / "killed"],
        tmp_path / "killed",
        random.Random(batch_size),
        until_working,
    )
    assert killed >= min(KILLS, 3)
    last = start("generate_calibration_data", *arguments, tmp_path / "killed", "--resume")
    _, stderr = last.communicate(timeout=600)
    assert last.returncode == 0, stderr
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "clean")
