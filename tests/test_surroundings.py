"""Runs in odd surroundings: umask, names that are not UTF-8, files that a kill left, terminals, very large numbers."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, invoke, memory_limit
from finished_run import finished_run, one_line
from safetensors.numpy import save_file

from w4a8.backend.words import format_seconds
from w4a8.cli.command import LONGEST_LINE, LONGEST_WORD
from w4a8.cli.command import one_line as as_one_line
from w4a8.evaluation.gate import ONLY_IMAGES_ARE_EQUAL
from w4a8.model import packed as native
from w4a8.report.tables import print_variants


@pytest.fixture
def run(tmp_path_factory, tmp_path):
    return shutil.copytree(finished_run(tmp_path_factory.getbasetemp()), tmp_path / "run")


@pytest.mark.slow
def test_umask_decides_who_may_read(run):
    before = os.umask(0o027)
    try:
        assert invoke("analyze_activations", "--calib-dir", run, "--plot").exit_code == 0
        assert invoke("report_calibration", "--calib-dir", run).exit_code == 0
    finally:
        os.umask(before)
    for name in ("activations/quant_config.json", "activations/scale_map.png", "report/index.html"):
        assert (run / name).stat().st_mode & 0o777 == 0o640, name


@pytest.mark.slow
def test_every_writer_clears_what_a_kill_left(run, tmp_path):
    drawn, packed = tmp_path / "drawn", run / "packed"
    commands = (
        ("analyze_activations", "--calib-dir", run, "--plot"),
        ("analyze_activations_multitier", "--calib-dir", run, "--plot"),
        (
            "export_quantized_model",
            "--calib-dir",
            run,
            "--weights",
            "w4-rtn-g32",
            "--format",
            "gguf",
            "--output",
            packed,
        ),
        ("evaluate_quantization", "--calib-dir", run, "--num-images", 1, "--num-steps", 1, "--variants", "w4-rtn"),
        ("report_calibration", "--calib-dir", run),
        ("draw_images", "red heart", "--num-steps", 1, "--output", drawn),
    )
    for script, *arguments in commands:
        done = invoke(script, *arguments)
        assert done.exit_code == 0, done.output
    folders = (run / "activations", packed, run / "evaluation", run / "evaluation/runs", run / "report", drawn)
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    made = [path for path in files if path.name not in ("layer_statistics.json", "mmdit.safetensors")]
    left = [path.with_name(f".{path.name}.abcd1234.tmp") for path in made]
    foreign = run / "report/.other.html.abcd1234.tmp"
    for path in (*left, foreign):
        path.write_text("half")
    for script, *arguments in commands:
        force = ("--force",) if script == "export_quantized_model" else ()
        done = invoke(script, *arguments, *force)
        assert done.exit_code == 0, done.output
    assert len(left) > 10 and [path.name for path in left if path.exists()] == [] and foreign.exists()


def test_names_that_are_not_utf_8_are_refused(tmp_path):
    folder = tmp_path / "x\udcff"
    folder.mkdir()
    for script, *arguments in (
        ("report_calibration", "--calib-dir", folder),
        ("generate_calibration_data", "--model", folder, "--calib-dir", tmp_path / "run"),
        ("draw_images", "a\udcff", "--output", tmp_path / "run"),
        ("draw_images", "cat", "--output", folder),
    ):
        command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, check=False)
        said = done.stderr.decode()
        assert done.returncode == 2 and said.count("\n") == 1 and "\\udcff: not UTF-8" in said, said
    assert list(folder.iterdir()) == [] and not (tmp_path / "run").exists()


def test_what_would_steer_the_terminal_is_escaped_and_long_names_are_cut(tmp_path):
    assert as_one_line("a\x1b]0;x\x07b\nc") == "a\\x1b]0;x\\x07b c"
    assert as_one_line("é×–") == "é×–"
    assert len(as_one_line("k" * 10**6)) == LONGEST_WORD + 1 and len(as_one_line("k " * 10**6)) == LONGEST_LINE + 1
    path = "/folder" * 60  # 420 characters that people can paste
    assert as_one_line(f"{path}: gone") == f"{path}: gone" and as_one_line("k" * 10**6, whole=True) == "k" * 10**6
    save_file({"\x1b]0;owned\x07" + "k" * 10**5: np.zeros((4, 192), np.float32)}, tmp_path / "lora.safetensors")
    done = invoke("draw_images", "cat", "--lora", tmp_path / "lora.safetensors", "--output", tmp_path / "out")
    one_line(done, "\\x1b]0;owned\\x07kkk")
    assert len(done.stderr) < 1000 and "\x1b" not in done.stderr


def test_a_batch_is_no_larger_than_the_cache(run):
    start = time.monotonic()
    done = invoke("optimize_adaround", "--calib-dir", run, "--batch-size", 10**6, "--unit", "block", "--blocks", "mm0", "--force", "--dry-run")  # fmt: skip
    assert done.exit_code == 0 and "260 iterations of 4 (" in done.stdout, done.output  # cached samples
    assert time.monotonic() - start < 60


def test_more_than_a_year_is_said_so():
    assert format_seconds(364 * 86400) == "8736 h 00 min"
    assert format_seconds(1e20) == format_seconds(float("inf")) == "a year or more"


def test_no_infinite_psnr_without_its_reason(capsys):
    row = {
        "psnr": {"mean": None, "median": None, "worst": None, "interval": [None, None]}, "ssim": {"mean": 1.0},
        "flip": {"mean": 0.0}, "share_above_40_db": 1.0, "share_below_30_db": 0.0, "step_error": {"mean": [0.1]},
        "max_step_error": 0.1, "worst_image": 0, "worst_prompts": [{"prompt": "a", "psnr": None}],
    }  # fmt: skip
    print_variants({"w4-rtn": row}, simulated=False)
    assert f"w4-rtn: {ONLY_IMAGES_ARE_EQUAL}" in capsys.readouterr().out
    print_variants({"fp": row | {"max_step_error": 0.0}}, simulated=False)
    assert ONLY_IMAGES_ARE_EQUAL not in capsys.readouterr().out


def test_dense_copies_fit_the_memory_limit():
    """Judge dense copies by the limit of the process, which is below the machine's memory."""
    with memory_limit(10**9):
        assert native.resolve("auto", 2 * 10**8) == "dense"
        assert native.resolve("auto", 3 * 10**8) == "dequantize"


def test_ranges_of_a_hundred_million_are_analyzed(run):
    """Analyze statistics with ranges of 1e8, which stage 2A writes without a complaint."""
    layer, factor = "mm1.txt.mlp.fc2", np.float32(1e8)
    folder = run / "activations/timestep_stats"
    for path in folder.glob("*.npz"):
        arrays = dict(np.load(path))
        for key in [key for key in arrays if key.startswith("mm1_txt_mlp_fc2__") and not key.endswith("counts")]:
            arrays[key] = arrays[key] * (factor * factor if key.endswith("square") else factor)
        np.savez(path, **arrays)
        index = json.loads((folder / f"{path.stem}_index.json").read_bytes())
        index[layer] = {k: v * float(factor) if isinstance(v, float) else v for k, v in index[layer].items()}
        (folder / f"{path.stem}_index.json").write_text(json.dumps(index))
    done = invoke("analyze_activations", "--calib-dir", run)
    assert done.exit_code == 0, done.output
    config = json.loads((run / "activations/quant_config.json").read_bytes())
    assert config["per_timestep"]["0"][layer]["scale"] > 1e7
