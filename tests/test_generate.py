"""generate_calibration_data.py as a user runs it: files against their contract, resume, refusals, errors."""

import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, folder_bytes, generate, interruptible, invoke, start
from PIL import Image

from calibration_store.manifest import run_identity
from w4a8.model.catalog import default_dtype, describe_model
from w4a8.model.prompt_encoder import encode_prompts
from w4a8.model.prompt_files import read_prompt_file
from w4a8.model.prompts import BUILTIN_PROMPTS, draw_builtin_prompts
from w4a8.model.sampling import decode_latents, euler_steps, initial_noise

SMALL = ["--num-images", 3, "--num-steps", 4]


@pytest.fixture(scope="module")
def clean_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean") / "run"
    done = generate(*SMALL, "--calib-dir", folder)
    assert done.exit_code == 0, done.stderr
    return folder


def copy_of(clean_run, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(clean_run), str(folder)], check=True)
    return folder


def test_files_keep_their_contract(clean_run):
    manifest = json.loads((clean_run / "manifest.json").read_bytes())
    assert manifest["format"] == "calibration_manifest_v1"
    expected = {"model_version": "sd3-emoji", "num_steps": 4, "cfg_scale": 4.0, "latent_size": [16, 16], "use_t5": False,
                "sampler_shift": 3.0, "seed_base": 42, "num_images": 3, "n_completed": 3, "batch_size": 1, "stride": 1}  # fmt: skip
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["activation_dtype"] == default_dtype()
    assert manifest["package_versions"]["diffusionkit"] == "0.5.2"
    for image_id, image in enumerate(manifest["images"]):
        assert image["image_id"] == image_id and image["seed"] == 42 + image_id and image["num_steps"] == 4
        assert image["cfg_weight"] == 4.0 and image["negative_prompt"] == "" and image["prompt"]
        with Image.open(clean_run / image["filename"]) as picture:
            assert picture.size == (64, 64) and picture.mode == "RGB"
    names = sorted(path.name for path in (clean_run / "samples").iterdir())
    assert names == [f"{image:04d}_{step:03d}.npz" for image in range(3) for step in range(5)]
    for name in names:
        sample = np.load(clean_run / "samples" / name, allow_pickle=False)
        image, step = map(int, re.findall(r"\d+", name)[:2])
        assert sorted(sample.files) == [
            "calibration_run",
            "image_id",
            "is_final",
            "sigma",
            "step_index",
            "timestep",
            "x",
        ]
        assert sample["x"].shape == (1, 16, 16, 16) and sample["x"].dtype == manifest["activation_dtype"]
        assert sample["timestep"].dtype == sample["x"].dtype and sample["timestep"].shape == ()
        assert (
            sample["sigma"].dtype == np.float32 and sample["step_index"].dtype == sample["image_id"].dtype == np.int32
        )
        assert (int(sample["image_id"]), int(sample["step_index"])) == (image, step)
        assert str(sample["calibration_run"]) == run_identity(manifest, [image])
        assert bool(sample["is_final"]) == (step == 4) and sample["is_final"].dtype == bool
        assert (float(sample["sigma"]) == 0) == (step == 4)
    assert sorted(path.name for path in clean_run.iterdir()) == ["history.jsonl", "images", "manifest.json", "samples"]


def test_samples_are_what_the_model_is_given(clean_run, emoji):
    image = json.loads((clean_run / "manifest.json").read_bytes())["images"][2]
    text = encode_prompts(emoji, [image["prompt"]], 4.0)
    states = list(euler_steps(emoji, text, initial_noise(44, (16, 16)), 4, 4.0))
    for step, state in enumerate(states):
        sample = np.load(clean_run / f"samples/0002_{step:03d}.npz")
        assert np.array_equal(sample["x"], np.array(state.x))
        assert sample["timestep"].item() == state.timestep.item() and sample["sigma"].item() == state.sigma.item()
    picture = decode_latents(emoji, mx.array(sample["x"]))[0]
    assert np.array_equal(np.array(picture), np.array(Image.open(clean_run / "images/0002.png")))


@pytest.mark.slow
def test_resume_makes_what_is_missing_or_damaged_anew(clean_run, tmp_path):
    folder = copy_of(clean_run, tmp_path)
    (folder / "samples/0001_002.npz").unlink()
    (folder / "samples/0002_000.npz").write_bytes((clean_run / "samples/0002_000.npz").read_bytes()[:1000])
    (folder / "images/0000.png").write_bytes(b"\x89PNG")
    (folder / "samples/.0000_001.npz.abc_.tmp").write_bytes(b"half")
    done = generate(*SMALL, "--calib-dir", folder, "--resume")
    assert done.exit_code == 0, done.stderr
    assert folder_bytes(folder) == folder_bytes(clean_run)
    again = generate(*SMALL, "--calib-dir", folder, "--resume")
    assert again.exit_code == 0 and "nothing to do" in again.stdout
    assert folder_bytes(folder) == folder_bytes(clean_run)


@pytest.mark.slow
def test_a_run_grows_by_adding(clean_run, tmp_path):
    folder = tmp_path / "run"
    generate("--num-images", 2, "--num-steps", 4, "--calib-dir", folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    done = generate(*SMALL, "--calib-dir", folder, "--resume")
    assert done.exit_code == 0, done.stderr
    assert folder_bytes(folder) == folder_bytes(clean_run)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    shrunk = generate("--num-images", 2, "--num-steps", 4, "--calib-dir", folder, "--resume")
    assert shrunk.exit_code == 2 and "--num-images 3; it can grow, not shrink" in shrunk.stderr


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--num-steps", 5], "--num-steps 4, not 5"),
        (["--seed", 1], "--seed 42, not 1"),
        (["--cfg-weight", 3], "--cfg-weight 4.0, not 3.0"),
        (["--stride", 2], "--stride 1, not 2"),
        (["--batch-size", 2], "--batch-size 1, not 2"),
        (["--latent-size", 8, 8], "--latent-size [16, 16], not [8, 8]"),
        (["--no-images"], "--images/--no-images True, not False"),
        (["--dtype", "float16"], "--dtype float32, not float16"),
        (["--negative-prompt", "red"], "--negative-prompt"),
        (["--prompts", "prompts.txt"], "started with other --prompts"),
    ],
)
def test_resume_refuses_another_run_by_the_options_name(clean_run, tmp_path, monkeypatch, arguments, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("rocket\nswan\nhamster\n")
    before = folder_bytes(clean_run)
    done = generate(*SMALL, *arguments, "--calib-dir", clean_run, "--resume")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "--resume: " in done.stderr and option in done.stderr
    assert folder_bytes(clean_run) == before


def test_resume_goes_on_with_the_runs_model(clean_run, tmp_path):
    """Without --model, whose default is another one."""
    done = invoke("generate_calibration_data", *SMALL, "--calib-dir", copy_of(clean_run, tmp_path), "--resume")
    assert done.exit_code == 0 and "nothing to do" in done.output, done.output


def test_a_used_folder_needs_resume_or_force(clean_run, tmp_path):
    folder = copy_of(clean_run, tmp_path)
    done = generate(*SMALL, "--calib-dir", folder)
    assert (
        done.exit_code == 2 and "--resume" in done.stderr and "--force" in done.stderr and done.stderr.count("\n") == 1
    )
    both = generate(*SMALL, "--calib-dir", folder, "--resume", "--force")
    assert both.exit_code == 2 and "give one of them" in both.stderr
    (folder / "mine.txt").write_text("kept")
    done = generate("--num-images", 1, "--num-steps", 2, "--no-images", "--calib-dir", folder, "--force")
    assert done.exit_code == 0, done.stderr
    assert sorted(folder_bytes(folder)) == ["manifest.json", "mine.txt", *(f"samples/0000_00{s}.npz" for s in range(3))]
    assert json.loads((folder / "manifest.json").read_bytes())["images"][0]["filename"] is None
    (folder / "manifest.json").unlink()
    done = generate(*SMALL, "--calib-dir", folder, "--resume")
    assert done.exit_code == 2 and "samples without manifest.json; use --force" in done.stderr


@pytest.mark.slow
def test_stride_and_batches(clean_run, tmp_path):
    done = generate(*SMALL, "--stride", 3, "--batch-size", 2, "--calib-dir", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    steps = sorted({path.name[5:8] for path in (tmp_path / "run/samples").iterdir()})
    assert steps == ["000", "003", "004"]
    for path in (tmp_path / "run/samples").iterdir():
        expected = np.load(clean_run / "samples" / path.name)["x"]  # one by one: its sums are in another order
        np.testing.assert_allclose(np.load(path)["x"], expected, rtol=1e-5, atol=1e-4)
    assert json.loads((tmp_path / "run/manifest.json").read_bytes())["batch_size"] == 2
    whole = folder_bytes(tmp_path / "run")
    (tmp_path / "run/samples/0001_003.npz").unlink()
    generate(*SMALL, "--stride", 3, "--batch-size", 2, "--calib-dir", tmp_path / "run", "--resume")
    assert folder_bytes(tmp_path / "run") == whole


@pytest.mark.slow
def test_a_run_grown_from_a_short_batch_is_that_of_one_go(tmp_path):
    arguments = ["--num-steps", 3, "--batch-size", 2, "--calib-dir"]
    generate("--num-images", 3, *arguments, tmp_path / "grown")
    done = generate("--num-images", 5, *arguments, tmp_path / "grown", "--resume")
    assert done.exit_code == 0, done.stderr
    generate("--num-images", 5, *arguments, tmp_path / "whole")
    assert folder_bytes(tmp_path / "grown") == folder_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_a_batch_larger_than_the_run_has_no_empty_rows(tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(
        "w4a8.generation.euler_steps",
        lambda p, text, noise, *rest: rows.append(len(noise)) or euler_steps(p, text, noise, *rest),
    )
    done = generate("--num-images", 2, "--num-steps", 2, "--batch-size", 16, "--calib-dir", tmp_path / "run")
    assert done.exit_code == 0 and rows == [2], done.output
    before = folder_bytes(tmp_path / "run/samples")
    done = generate(
        "--num-images", 5, "--num-steps", 2, "--batch-size", 16, "--calib-dir", tmp_path / "run", "--resume"
    )
    assert done.exit_code == 0 and rows == [2, 2, 2], done.output  # it goes on with as many rows as it began with
    assert before.items() <= folder_bytes(tmp_path / "run/samples").items()


def test_dry_run_writes_nothing_and_its_bytes_are_right(clean_run, tmp_path):
    done = generate(*SMALL, "--calib-dir", tmp_path / "run", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert not (tmp_path / "run").exists()
    size = sum(path.stat().st_size for path in (clean_run / "samples").iterdir())
    assert f"12 forward passes; 15 samples ({size / 1000:.1f} kB), 3 images" in done.stdout
    assert re.search(r"to do: 3 of 3 images, about [\d.]+ m?s on this machine", done.stdout)


@pytest.mark.slow
def test_sd3_mediums_size_is_known_without_its_weights(tmp_path):
    def figures(*arguments):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        command = [sys.executable, str(ROOT / "generate_calibration_data.py"), "--dtype", "float16", "--dry-run"]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "HF_HOME" in done.stderr
        return done.stdout

    assert "500 forward passes; 510 samples (67.9 MB)" in figures("--num-images", "10")
    assert "26000 samples (3.46 GB)" in figures("--num-images", "1000", "--stride", "2")
    assert "latents 128 x 128" in figures("--model", "argmaxinc/mlx-stable-diffusion-3.5-large")


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_text("rocket\n\n  clown   face \n")
    assert read_prompt_file(tmp_path / "p.txt") == ["rocket", "clown face"]
    (tmp_path / "p.csv").write_text('id,prompt\n1,"a, b"\n2,swan\n')
    assert read_prompt_file(tmp_path / "p.csv") == ["a, b", "swan"]
    (tmp_path / "q.csv").write_text("prompt\nswan\n")
    done = generate(
        "--prompts", tmp_path / "q.csv", "--num-images", 2, "--num-steps", 1, "--calib-dir", tmp_path / "run2"
    )
    assert done.exit_code == 0 and "used again with other seeds" in done.stdout
    images = json.loads((tmp_path / "run2/manifest.json").read_bytes())["images"]
    assert [(image["prompt"], image["seed"]) for image in images] == [("swan", 42), ("swan", 43)]


def test_builtin_prompts_are_many_distinct_diverse_and_drawn_by_seed():
    with BUILTIN_PROMPTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["prompt"].lower() for row in rows}) == len(rows) >= 1024
    assert all(row["prompt"].isascii() and row["prompt"] == row["prompt"].strip() for row in rows)
    drawn = draw_builtin_prompts(None, 42)
    category = {row["prompt"]: row["category"] for row in rows}
    assert sorted(drawn) == sorted(category) and len({category[prompt] for prompt in drawn[:12]}) == 12
    assert drawn == draw_builtin_prompts(None, 42) != draw_builtin_prompts(None, 43)
    captions = draw_builtin_prompts(describe_model("sd3-emoji").captions, 42)
    assert len(captions) == len(set(captions)) == 3764


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "none.txt"], "Path 'none.txt' does not exist"),
        (["--prompts", "empty.txt"], "empty.txt: holds no prompt"),
        (
            ["--prompts", "other.csv"],
            "other.csv: no column 'prompt', 'caption', 'text' or 'prompts' (columns: id, note)",
        ),
        (["--prompts", "binary.txt"], "binary.txt: not UTF-8 text"),
        (["--latent-size", 15, 16], "--latent-size 15 16: both sides must be multiples of 2 from 2 to 16"),
        (["--latent-size", 32, 16], "both sides must be multiples of 2 from 2 to 16 for sd3-emoji"),
        (["--num-steps", 0], "'--num-steps': 0 is not in the range 1<=x<=100000"),
        (["--num-images", 0], "'--num-images': 0 is not in the range"),
        (["--model", ""], "--model ''"),
        (["--model", "m" * 300], "no such folder, and not one of sd3-emoji"),
        (["--model", "sd4"], "--model sd4: no such folder, and not one of sd3-emoji"),
        (["--t5"], "--t5: sd3-emoji has no T5"),
        (["--calib-dir", "empty.txt"], "Folder 'empty.txt' is a file"),
        (["--calib-dir", "empty.txt/run"], "cannot write to empty.txt/run: Not a directory"),
        (["--calib-dir", "/proc/run"], "cannot write to /proc/run: "),
        (["--num-images", 10**5, "--num-steps", 1000, "--prompts", "one.txt"], " GB, the disk has "),
        (["--cfg-weight", 1, "--negative-prompt", "red"], "--negative-prompt needs --cfg-weight above 1"),
        (["--cfg-weight", "nan"], "--cfg-weight nan: not a finite number"),
        (["--cfg-weight", "inf"], "inf is not in the range 0<=x<=100"),
        (["--prompts", "broken.csv"], "broken.csv: not valid CSV (unexpected end of data)"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("empty.txt", "\n \n"),
        ("other.csv", "id,note\n1,a\n"),
        ("one.txt", "swan\n"),
    ):
        (tmp_path / name).write_text(content)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.csv").write_text('prompt\n"unclosed\nb\n')
    before = folder_bytes(tmp_path)
    done = generate(*arguments, *([] if "--calib-dir" in arguments else ["--calib-dir", "out"]))
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("Error: ") and message in done.stderr
    assert folder_bytes(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_a_resumable_folder(clean_run, tmp_path):
    """RLIMIT_FSIZE refuses the manifest once it lists an image, as a full disk would."""
    limit = 1100
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(clean_run), str(folder)], check=True)
    (folder / "samples/0002_001.npz").unlink()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = ["--model", "sd3-emoji", *SMALL, "--calib-dir", folder, "--resume"]
    process = start("generate_calibration_data", *arguments, preexec_fn=limited)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1 and f"cannot write {folder}" in stderr and "Traceback" not in stderr
    done = generate(*SMALL, "--calib-dir", folder, "--resume")
    assert done.exit_code == 0 and folder_bytes(folder) == folder_bytes(clean_run)


@pytest.mark.slow
def test_ctrl_c_says_what_was_left_and_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    arguments = ["--model", "sd3-emoji", "--num-steps", 8, "--num-images", 40, "--calib-dir", folder]

    process = start("generate_calibration_data", *arguments, preexec_fn=interruptible)
    while not (folder / "samples/0001_000.npz").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    last = stderr.strip().splitlines()[-1]
    assert re.search(
        r"interrupted: \d+ of 40 images are complete in .*; go on with: .*python[0-9.]* .*generate_calibration_data.py --model .* --resume$",
        last,
    )
    assert "Traceback" not in stderr
    assert not list(folder.rglob("*.tmp"))


def test_help_answers_without_loading_anything():
    code = (
        "import runpy, sys; sys.argv = ['generate_calibration_data.py', '-h']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: print([m for m in ('numpy', 'mlx', 'torch', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")
    done = generate("-h")
    assert done.exit_code == 0 and "--latent-size" in done.stdout, done.output
