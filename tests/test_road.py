"""Test tools/road.py: its commands, the run of a whole road, and the shell recipes that call it."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import click
import mlx.core as mx
import pytest
from click.testing import CliRunner
from conftest import ROOT, folder_bytes, interruptible
from test_limits import MANIFEST_PLAN

import tools.sd3_medium
from calibration_store.choices import EFFORTS
from tools.road import ROADS, again, commands, refuse_another_run
from w4a8.effort import OF_SMALL_MODELS

TINY = [line.split()[0] for line in ROADS["tiny"]]


def test_words_in_braces_take_values():
    generate, cache, *_, draw, _ = commands("tiny", "a folder", steps=7)
    assert generate == [
        "generate_calibration_data.py", "--calib-dir", "a folder", "--model", "sd3-emoji", "--num-images", "2", "--num-steps", "7",
    ]  # fmt: skip
    assert cache[-2:] == ["--boundaries", "ends"]
    assert draw == [
        "draw_images.py", "red heart", "--model", "a folder/quantized_model", "--num-steps", "1", "--output", "a folder/drawn",
    ]  # fmt: skip


def test_an_option_without_a_value_is_left_out():
    optimize = commands("tiny", "x")[5]
    assert "--blocks" not in optimize and "--micro-batch" not in optimize and optimize[-2:] == ["--unit", "block"]
    assert commands("tiny", "x", blocks="mm0,mm1")[5][-2:] == ["--blocks", "mm0,mm1"]
    values = {"side": "", "model": "sd3-emoji", "t5": "", "blocks": "", "batch": 4, "micro": ""}
    assert commands("memory", "x", **values)[0] == [
        "generate_calibration_data.py", "--calib-dir", "x", "--model", "sd3-emoji", "--num-images", "2", "--num-steps", "2",
        "--no-images", "--force",
    ]  # fmt: skip


def test_missing_and_unknown_values_are_named():
    with pytest.raises(click.UsageError, match=r"the road sd3_medium needs batch=…, cache=…, checkpoint=…"):
        commands("sd3_medium", "x")
    with pytest.raises(click.UsageError, match="the road demo knows no colour"):
        commands("demo", "x", colour="red")


def test_how_each_stage_goes_on():
    assert again("optimize_adaround.py") == ["--resume"] and again("export_quantized_model.py") == ["--force"]
    assert again("analyze_activations.py") == again("tools/contact_sheet.py") == []


def recipe(name, **environment):
    """Return the command line that a recipe runs, with `echo` in the place of Python."""
    command = [ROOT / "runs" / name, "/tmp/folder"]
    done = subprocess.run(command, env=os.environ | {"PYTHON": "echo"} | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("tools/road.py"))
    return line


def test_recipes_hand_their_values_on():
    assert recipe("emoji.sh") == "tools/road.py demo /tmp/folder"
    assert recipe("emoji_gpu.sh") == "tools/road.py emoji_gpu /tmp/folder"
    assert recipe("emoji_gpu.sh", ITERS="7") == "tools/road.py emoji_gpu /tmp/folder iters=7"
    assert recipe("emoji.sh", EFFORT="good") == "tools/road.py demo /tmp/folder effort=good"


def sd3_medium(*words, **environment):
    """Return what tools/sd3_medium.py gives, without the variables of the shell that runs the tests."""
    names = (
        "EFFORT",
        "MEMORY",
        "MODEL",
        "CHECKPOINT",
        "LORA",
        "PASS_SECONDS",
        "IMAGES",
        "ITERS",
        "STEPS",
        "CACHE",
        "T5",
        "GROUP_SIZE",
    )
    return CliRunner(env=dict.fromkeys(names) | environment).invoke(tools.sd3_medium.main, [*words, "--plan"])


@pytest.mark.parametrize(
    "memory, planned, t5", [("16", "16 GB;", False), ("40", "36 GB (of 40);", True), ("400", "128 GB (of 400);", True)]
)
def test_the_plan_of_sd3_medium(memory, planned, t5):
    """Rows add up, the commands are the road's, and every effort takes longer than the one before."""
    hours = []
    for effort in EFFORTS:
        done = sd3_medium("here", EFFORT=effort, MEMORY=memory, PASS_SECONDS="0.045")
        assert done.exit_code == 0 and f"effort {effort}, planned for {planned}" in done.stdout, done.output
        rows = [float(size) for size in re.findall(r"([\d.]+) GB  ", done.stdout)]
        assert sum(rows[:-1]) == pytest.approx(rows[-1], abs=0.5)
        assert done.stdout.count(".py --calib-dir here") == 8 and ("--stride 3 --t5\n" in done.stdout) == t5
        hours.append(re.search(r"in all, with the download +[\d.]+ GB +(.+)", done.stdout)[1])
    assert hours[0].startswith("1") and "min" in hours[0] and len(set(hours)) == 3


@pytest.mark.parametrize("memory", ["16", "24"])
def test_the_plan_of_another_model(memory):
    """SD3.5-Medium fits 16 GB; its images have 1024 px, so a cached sample has four times the tokens. Turbo takes 4 steps."""
    done = sd3_medium(MEMORY=memory, PASS_SECONDS="1", MODEL="stabilityai/stable-diffusion-3.5-medium")
    assert f"SD3.5-Medium, effort good, planned for {memory} GB; a pass at 1024 px" in done.stdout, done.output
    cached = float(re.search(r"2W  2048 samples +([\d.]+) GB", done.stdout)[1])
    rows, tokens = 2, 4096 + 154
    assert cached == pytest.approx(2048 * rows * (2 * tokens * 1536 + 2 * 64 * 4096) / 1e9, rel=0.01)
    weights = 2 * 2.47e9  # the published model has 2.5 B
    assert float(re.search(r"5   the 4-bit model +([\d.]+) GB", done.stdout)[1]) == pytest.approx(
        0.55 * weights / 1e9, abs=0.1
    )
    turbo = sd3_medium(MEMORY="48", PASS_SECONDS="1", MODEL="stabilityai/stable-diffusion-3.5-large-turbo")
    assert "--num-steps 4" in turbo.stdout
    refused = sd3_medium(MEMORY=memory, PASS_SECONDS="1", MODEL="argmaxinc/mlx-stable-diffusion-3.5-large")
    assert refused.exit_code == 2 and f"{memory} GB: SD3.5-large needs 32 GB or more" in refused.stderr


def test_a_plan_takes_the_words_that_people_give(tmp_path):
    lora, empty, other = tmp_path / "style.safetensors", tmp_path / "empty", tmp_path / "other.safetensors"
    for path, layer in ((lora, "transformer_blocks.0.attn.to_q"), (other, "double_blocks.0.img_attn.proj")):
        down, up = mx.zeros((4, 1536)), mx.zeros((1536, 4))
        mx.save_safetensors(
            str(path), {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
        )
    (junk := tmp_path / "junk.safetensors").touch()
    empty.mkdir()
    done = sd3_medium(
        MEMORY="32GB",
        PASS_SECONDS="1",
        LORA=f"{lora}:0.8",
        IMAGES="5",
        ITERS="40",
        CACHE="1",
        GROUP_SIZE="32",
    )
    assert f"--lora {lora}:0.8 --num-images 5 --num-steps 28" in done.stdout, done.output
    assert (
        "--iters 40 --batch-size 8 --end-to-end 20 --no-alpha --group-size 32\n" in done.stdout
        and "--max-bytes 1GB" in done.stdout
    )
    for variables, message in (
        ({"LORA": f"{lora}x:0.8"}, f"LORA={lora}x:0.8: '{lora}x': no such file"),
        ({"LORA": f"{lora}:0,8"}, "'0,8' is no scale such as 0.8"),
        ({"LORA": str(junk)}, "junk.safetensors: truncated or damaged"),
        ({"LORA": str(other)}, "2 of its keys are no layer of this model's transformer"),
        ({"CHECKPOINT": "models/sd3-emoji"}, "sd3-emoji: a model folder; run the stages one by one"),
        ({"MODEL": "sd3-emoji"}, "sd3-emoji: a model folder; run the stages one by one"),
        ({"MEMORY": "16x"}, "(env var: 'MEMORY'): '16x' is not a number of GB from 1 to 10000"),
        ({"CHECKPOINT": "nowhere.safetensors"}, "CHECKPOINT=nowhere.safetensors: not found"),
        ({"CHECKPOINT": str(empty)}, f"--model {empty}: the folder holds no model, neither a checkpoint"),
        ({"MODEL": "no/such/model"}, "no such folder, and not one of"),
        ({"MEMORY": "8"}, "8 GB: SD3-Medium needs 16 GB or more"),
        ({"EFFORT": "most"}, "'most' is not one of"),
    ):
        done = sd3_medium(**{"MEMORY": "16", "PASS_SECONDS": "1"} | variables)
        assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.output


@pytest.mark.slow
def test_a_plan_times_a_block_of_this_machine():
    done = sd3_medium(MEMORY="16")
    assert (
        0.001
        < float(re.search(r"a pass at 512 px takes ([\d.]+) s: random blocks, timed here, for all 24", done.stdout)[1])
        < 1000
    )


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Rehearse the tiny road; return the folder that holds its run, and the dated file."""
    base = tmp_path_factory.mktemp("road")
    command = [
        sys.executable,
        "tools/prove.py",
        "rehearsal",
        "--size",
        "tiny",
        "--keep",
        base,
        "--output",
        base / "found.json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return base, json.loads((base / "found.json").read_bytes()), done.stdout


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage(rehearsed):
    base, found, output = rehearsed
    assert [row["stage"].split()[0] for row in found["rows"]] == TINY
    for row in found["rows"]:
        assert re.search(rf"^{re.escape(row['stage'].split()[0])} +{row['seconds']:.1f} ", output, re.MULTILINE)
        assert row["resident_peak"] > 10**7 and row["seconds"] > 0 and not row["resumed"]
    written = sum(row["bytes"] for row in found["rows"])
    assert written == sum(path.stat().st_size for path in (base / "run").rglob("*") if path.is_file())
    assert 20 < found["psnr"]["w4-rtn"] < 60
    assert found["machine"].keys() >= {"commit", "w4a8", "device"} and found["format"] == "rehearsal_v1"


@pytest.mark.slow
def test_a_finished_road_goes_on_without_changing_its_files(rehearsed):
    base, *_ = rehearsed
    before = folder_bytes(base / "run")
    command = [sys.executable, "tools/road.py", "tiny", base / "run", "blocks=mm0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\$ \S+ (\S+)", done.stdout, re.MULTILINE) == TINY
    steps = [line.partition(":") for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [number for number, *_ in steps] == [f"step {i} of 10" for i in range(1, 11)]
    assert steps[5][2] == " stage 3W, learn the rounding"
    after = folder_bytes(base / "run")
    card = before["quantized_model/README.md"].decode()  # stage 4 put its figures there, as a new export does
    assert "| w4-rtn | " in card and "(comparison.png)" in card and card == after["quantized_model/README.md"].decode()
    assert before.keys() == after.keys()
    data = [name for name in before if name.endswith((".npz", ".safetensors"))]
    assert len(data) > 20 and [name for name in data if before[name] != after[name]] == []


def begun_road(folder, *values):
    """Start the road "tiny" in a session of its own, and return its process when stage 1 has begun."""
    command = [sys.executable, "tools/road.py", "tiny", folder, *values]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True, preexec_fn=interruptible
    )
    while not (folder / "samples").exists():
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_ctrl_c_is_the_stages(tmp_path):
    """The stage says what it keeps; the road ends with its exit code, and begins no other stage."""
    process = begun_road(tmp_path / "run", "images=60", "steps=20")
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.count("Error: interrupted: ") == 1 and output.count("\n$ ") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "images"), [(signal.SIGTERM, 600), (signal.SIGINT, 2)])
def test_a_signal_for_the_road_alone(tmp_path, number, images):
    """SIGTERM ends the stage with it, at once; SIGINT lets the stage finish. No other stage begins."""
    process = begun_road(tmp_path / "run", f"images={images}", "steps=20")
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)  # a stage that is left would keep the pipes open
    assert process.returncode == 128 + number and output.count("\n$ ") == 1
    assert errors.endswith("Stopped: the same command goes on where it was.\n"), errors


@pytest.mark.slow
def test_a_stage_that_fails_ends_the_road(tmp_path):
    command = [sys.executable, "tools/road.py", "tiny", tmp_path / "run", "model=/nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.count("\n$ ") == 1 and done.stderr.count("Error: ") == 1, done.stderr


def test_a_recipe_leaves_a_run_of_another_effort_alone_and_announces_a_new_one(tmp_path, capsys):
    (tmp_path / "good").mkdir()
    (tmp_path / "good/manifest.json").write_text(json.dumps({**MANIFEST_PLAN, "num_images": 240}))

    def recipe(*words, **variables):
        environment = {**os.environ, "PYTHON": sys.executable, **variables}
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)

    before = folder_bytes(tmp_path)
    done = recipe("runs/emoji.sh", tmp_path / "good")
    where = f"give another folder, such as {tmp_path}/fast"
    assert done.returncode == 2 and f"another effort (EFFORT=good goes on with it); {where}" in done.stderr
    done = recipe("runs/sd3_medium.sh", tmp_path / "good", MEMORY="16", EFFORT="fast")
    assert done.returncode == 2 and f"it has 240 images, and effort fast 128); {where}" in done.stderr
    done = recipe("runs/emoji.sh", tmp_path / "x", EFFORT="most")
    assert done.returncode == 2 and done.stderr == "Error: EFFORT=most: one of fast, good, best\n"
    for name in ("MODEL", "CHECKPOINT", "LORA"):
        done = recipe("runs/emoji.sh", tmp_path / "x", **{name: "mine"})
        assert done.returncode == 2 and f"Error: {name}=mine: this recipe takes the bundled model" in done.stderr
    assert folder_bytes(tmp_path) == before
    refuse_another_run(tmp_path / "godo", 128, "fast", OF_SMALL_MODELS)
    assert capsys.readouterr().out == f"A new run in {tmp_path}/godo; there are {tmp_path}/good.\n"
