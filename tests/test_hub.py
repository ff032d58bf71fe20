"""The hub's loading path: DiffusionKit's own loaders over a hub cache on disk, random weights, original keys."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    home = tmp_path_factory.mktemp("hf")
    subprocess.run(
        [sys.executable, "tests/hub_driver.py", "write", str(home)], cwd=ROOT, check=True, env=environment(home)
    )
    yield home
    shutil.rmtree(home)


def environment(home):
    return os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run(home, *arguments):
    command = [sys.executable, "tests/hub_driver.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True, text=True, check=False)


def test_the_default_model_from_a_hub_cache(hub, tmp_path):
    arguments = ["--no-t5", "--num-images", 1, "--num-steps", 2, "--latent-size", 8, 8, "--calib-dir", tmp_path / "a"]
    arguments += ["--prompts", tmp_path / "prompts.txt"]
    (tmp_path / "prompts.txt").write_text("a red rocket\n")
    done = run(hub, *arguments)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "a/manifest.json").read_bytes())
    assert manifest["model_version"] == "argmaxinc/mlx-stable-diffusion-3-medium"
    assert manifest["cfg_scale"] == 5.0 and manifest["use_t5"] is False and manifest["sampler_shift"] == 3.0
    x = np.load(tmp_path / "a/samples/0000_002.npz")["x"]
    assert x.shape == (1, 8, 8, 16) and np.isfinite(x).all()
    assert (tmp_path / "a/images/0000.png").exists()

    # the same file as --local-checkpoint: the same latents; a broken one: one line
    checkpoint = next(hub.rglob("sd3_medium.safetensors"))
    done = run(hub, *arguments[:-4], "--calib-dir", tmp_path / "b", *arguments[-2:], "--local-checkpoint", checkpoint)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "b/samples/0000_002.npz")["x"], x)
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    done = run(
        hub,
        *arguments[:-4],
        "--calib-dir",
        tmp_path / "c",
        *arguments[-2:],
        "--local-checkpoint",
        tmp_path / "broken.safetensors",
    )
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1 and "broken.safetensors" in done.stderr
    assert not (tmp_path / "c").exists()


def test_t5_is_on_by_default_and_missing_files_are_one_line(hub, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red rocket\n")
    arguments = ["--num-images", 2, "--num-steps", 2, "--latent-size", 8, 8, "--prompts", tmp_path / "prompts.txt"]
    done = run(hub, *arguments, "--calib-dir", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a/manifest.json").read_bytes())["use_t5"] is True
    without = run(hub, *arguments, "--calib-dir", tmp_path / "b", "--no-t5")
    assert without.returncode == 0, without.stderr
    with_t5, without_t5 = (np.load(tmp_path / name / "samples/0001_002.npz")["x"] for name in "ab")
    assert np.isfinite(with_t5).all() and not np.array_equal(with_t5, without_t5)

    next(hub.rglob("t5xxl.safetensors")).unlink()
    done = run(hub, *arguments, "--calib-dir", tmp_path / "c")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "hf auth login" in done.stderr
