"""Run every benchmark, and the tools that have no test file of their own, at a tiny size."""

import json
import math
import os
import re
import subprocess
import sys
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT, invoke
from PIL import Image

from benchmarks import peer_ways, peers, random_model, rounding_cost, run_all
from benchmarks.figures import commit
from benchmarks.peak_memory import PROMISE
from tools import check_install, contact_sheet, folder_digest


def started(script, *arguments, **environment):
    """Run a script in a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def succeed(script, *arguments, **environment):
    """Run a script in a process of its own; return its output."""
    done = started(script, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def called(main, *arguments):
    """Run a command line in this process; return its result."""
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Make a folder of stages 1 and 2W: two images, three steps."""
    folder = tmp_path_factory.mktemp("benchmarks") / "run"
    for script, *arguments in (
        ("generate_calibration_data", "--model", "sd3-emoji", "--num-images", 2, "--num-steps", 3, "--batch-size", 2),
        ("cache_adaround_data", "--num-images", 2, "--stride", 1),
    ):
        done = invoke(script, *arguments, "--calib-dir", folder)
        assert done.exit_code == 0, done.output
    return folder


# --- benchmarks ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_benchmarks_at_their_smallest_size(tmp_path):
    """The figures of each script are in the table and in the file, which says where they were measured."""
    output = succeed("benchmarks/run_all.py", "--quick", "--output", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_bytes())
    figures = {row["name"]: row["value"] for row in found["figures"]}
    assert {row["script"] for row in found["figures"]} == {script for script, *_ in run_all.QUICK}
    assert all(math.isfinite(value) for value in figures.values())
    assert all(re.search(rf"^{re.escape(name)} +-?[0-9.]+ ", output, re.MULTILINE) for name in figures)
    assert figures["stage 2W: bytes ÷ inputs and outputs stored apart, sd3-emoji"] == pytest.approx(0.554, abs=0.002)
    assert figures["stage 2A: plain ÷ plain pass, sd3-emoji"] == 1
    assert 0.1 < figures["analyze_activations.py: JSON"] < 0.3
    assert figures["stage 1: time per step ÷ DiffusionKit's loop, sd3-emoji"] > 0
    assert {"dense", "dequantize", "quantized"} <= {name.split(", ")[1] for name in figures if "native pass" in name}
    assert figures["stage 3W: projected time for 24 blocks"] > 0
    machine = found["machine"]
    assert machine["commit"] == commit() and {"mlx", "w4a8", "device", "python"} <= machine.keys()


def test_rounding_cost_says_where_the_time_goes():
    sizes = ("--hidden", 64, "--tokens", 16, "--text-tokens", 8, "--samples", 8, "--batch-size", 2, "--timed", 1)
    done = called(rounding_cost.main, *sizes)
    assert done.exit_code == 0, done.output
    assert len(re.findall(r"(?:rounding|with inputs|tuning) +[0-9.]+ ms an iteration\n", done.output)) == 3
    shares = re.findall(r"([a-zA-Z() ]+) (\d+)%", done.output)
    assert [name.strip() for name, _ in shares] == [
        "reading the batch", "quantizing weights", "forward", "rounding variables (Adam)", "backward",
    ]  # fmt: skip
    assert sum(int(share) for _, share in shares) == pytest.approx(100, abs=3)
    assert re.search(r"400 iterations: .* a block, .* for 24 blocks", done.output)


@pytest.mark.slow
def test_peak_memory_of_a_stage():
    """Stage 1 runs for its files alone; the stages after 2W do not run."""
    lines = succeed("benchmarks/peak_memory.py", "--only", "2W").splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["bare pass", "2W"]
    ratio = float(re.search(r"[kM]B +([0-9.]+) +[0-9.]+ +[0-9.]+ MB", lines[-1])[1])
    assert 1 / PROMISE < ratio < PROMISE


@pytest.mark.slow
def test_memory_fits_of_a_single_size():
    output = succeed("benchmarks/peak_memory.py", "--fit", "--sizes", 1)
    assert output.count("foreseen ÷ measured 1.00") == 2
    sample, weights = re.search(r"hidden 192, 64 tokens, 1 blocks: ([0-9.]+) MB a sample, ([0-9.]+) x", output).groups()
    assert 5 < float(sample) < 100 and 3 < float(weights) < 30


@pytest.mark.slow
def test_peers_draw_with_every_way(run, tmp_path, monkeypatch):
    sizes = ("--iters", 3, "--batch-size", 2, "--num-images", 1, "--num-steps", 1, "--blocks", "mm7")
    monkeypatch.setattr(peers, "OURS", ((4, 64),))
    done = called(peers.main, "--calib-dir", run, "--plot", tmp_path / "peers.png", *sizes)
    assert done.exit_code == 0, done.output
    psnr = {
        name: float(re.search(rf"^{re.escape(name)} +[0-9.]+ +[0-9.]+ +([0-9.]+)dB", done.stdout, re.MULTILINE)[1])
        for name in [*peers.PEERS, "SVDQuant, rank 16", "3W, 4 bits, groups of 64"]
    }
    assert all(20 < value < 80 for value in psnr.values()) and len(set(psnr.values())) > 3, psnr
    assert Image.open(tmp_path / "peers.png").size[0] > 500
    assert "the model has mm0" in called(peers.main, "--calib-dir", run, *sizes[:-1], "mm9").stderr


def test_gptq_spreads_errors():
    """On correlated inputs the layer's output error is well below that of rounding to nearest."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 64)) @ rng.standard_normal((64, 64))
    weight, gram = rng.standard_normal((8, 64)), x.T @ x
    scale, zero_point = np.full((8, 1), 0.4), np.full((8, 1), 7.5)

    def error(codes):
        difference = (codes - zero_point) * scale - weight
        return np.trace(difference @ gram @ difference.T)

    codes = peer_ways.gptq_codes(weight, gram, scale, zero_point)
    nearest = np.clip(np.rint(weight / scale + zero_point), 0, 15)
    assert codes.dtype == np.uint8 and error(codes) < 0.6 * error(nearest)


@pytest.mark.slow
def test_a_random_model_with_outliers_runs(tmp_path):
    """Its weights read narrow channels where adaLN widens them; a stage runs on it, and says its peak."""
    where = succeed("benchmarks/random_model.py", "--hf-home", tmp_path / "hf", "--size", "tiny", "--outliers")
    (path,) = (tmp_path / "hf").rglob("sd3_medium.safetensors")
    assert where.startswith(f"wrote {path} (")
    weights = mx.load(str(path))
    block = "model.diffusion_model.joint_blocks.1.x_block"
    narrow = np.linalg.norm(np.array(weights[f"{block}.mlp.fc1.weight"], np.float32), axis=0)
    wide = np.linalg.norm(np.array(weights[f"{block}.adaLN_modulation.1.weight"], np.float32), axis=1).reshape(6, -1)[4]
    channel = np.argmin(narrow)
    assert 6 < np.median(narrow) / narrow[channel] < 40 and 6 < wide[channel] / np.median(wide) < 40
    stage = (
        "generate_calibration_data.py",
        "--num-images",
        1,
        "--num-steps",
        1,
        "--latent-size",
        8,
        8,
        "--no-t5",
        "--no-images",
    )
    where = ("--calib-dir", tmp_path / "run")
    output = succeed(
        "benchmarks/run_stage.py", "--tiny", *stage, *where, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1"
    )
    peak = int(re.search(r"\[took\] [0-9.]+ s, (\d+) bytes MLX, \d+ bytes resident", output)[1])
    assert 10**7 < peak < 10**9 and np.isfinite(np.load(tmp_path / "run/samples/0000_001.npz")["x"]).all()
    refused = called(random_model.main, "--hf-home", tmp_path, "--model", "flux-dev", "--outliers")
    assert refused.exit_code == 2 and "known of SD3-Medium alone" in refused.stderr


# --- tools --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_contact_sheet_and_digests(run):
    done = called(contact_sheet.main, "--calib-dir", run, "--columns", 2, "--size", 32)
    assert done.exit_code == 0 and done.output == f"wrote {run / 'contact_sheet.png'}\n"
    sheet = np.asarray(Image.open(run / "contact_sheet.png"))
    assert sheet.shape == (32 + 40 + 2 * 12, 2 * 32 + 3 * 12, 3) and len(np.unique(sheet)) > 50
    lines = called(folder_digest.main, run).output.splitlines()
    assert len(lines) == sum(path.is_file() for path in run.rglob("*"))
    (manifest,) = (line for line in lines if line.startswith("manifest.json "))
    assert re.fullmatch(r"manifest.json [0-9a-f]{32} format,.*images.*", manifest)
    (run / "manifest.json").write_bytes((run / "manifest.json").read_bytes() + b"\n")
    assert manifest not in called(folder_digest.main, run).output.splitlines()


@pytest.mark.slow
def test_installation_is_asked_of_pip(tmp_path, monkeypatch):
    """Pip finds made-up wheels in a folder, where one is missing."""
    requirements = check_install.requirements(*check_install.LISTED, check_install.WITHOUT_THEIRS)
    for requirement in requirements:
        version = next((each.version for each in requirement.specifier if each.operator in ("==", ">=")), "1.0")
        name = requirement.name.replace("-", "_")
        if name != "argmaxtools":
            with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
                info = f"{name}-{version}.dist-info"
                wheel.writestr(
                    f"{info}/METADATA",
                    f"Metadata-Version: 2.1\nName: {requirement.name}\nVersion: {version}\nProvides-Extra: cpu\n",
                )
                wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    where = ("--platform", "linux-x86_64", "--python", "3.13", "--output", tmp_path / "table.json")
    done = called(check_install.main, *where)
    assert done.exit_code == 1 and "some packages have no file" in done.stderr, done.output
    table = json.loads((tmp_path / "table.json").read_bytes())
    files = table["files"]["linux-x86_64"]["3.13"]
    assert table["commit"] == commit()
    assert re.search(
        rf"Python 3.13: {len(files)} packages, NO FILE for argmaxtools; from source: none; FLIP yes", done.stdout
    )
    assert files["diffusionkit"].startswith("diffusionkit-") and files["numpy"].endswith(".whl") and len(files) > 15
