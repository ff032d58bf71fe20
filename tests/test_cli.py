"""What every stage's command line shares: prompt files, numbers, Ctrl-C at any moment, terminals, log files."""

import contextlib
import fcntl
import importlib
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import click
import pytest
from conftest import ROOT, generate, interruptible, invoke, start

from calibration_store.stage_folder import shown
from w4a8.backend.progress import BAR_FORMAT, Bar, ProgressLines, progress_bar
from w4a8.backend.words import interpreter
from w4a8.cli.command import resume_command

SCRIPTS = (
    "generate_calibration_data", "cache_adaround_data", "collect_layer_activations", "analyze_activations",
    "analyze_activations_multitier", "optimize_adaround", "evaluate_quantization",
)  # fmt: skip
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for a busy core make small models slow
STAGE = """
import sys, time
import click
from w4a8.cli import Interrupted, progress_bar, stage_command

@stage_command
def main():
{}

main()
"""


def start_stage(tmp_path, body: str, **options) -> subprocess.Popen:
    """Start a small stage of its own, whose `main` is `body`."""
    script = tmp_path / "stage.py"
    script.write_text(STAGE.format(re.sub("^", "    ", body.strip("\n"), flags=re.M)))
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, str(script)], env=environment, preexec_fn=interruptible, **options)


def wait_for(found, process):
    """Until found() is true, while the process runs."""
    while not found():
        assert process.poll() is None
        time.sleep(0.01)


# --- numbers ------------------------------------------------------------------------------------------------


def float_options():
    """(script, subcommand's name or none, option) of every option that takes a float."""
    for script in SCRIPTS:
        main = importlib.import_module(script).main
        commands = main.commands.items() if isinstance(main, click.Group) else [("", main)]
        for name, command in commands:
            for option in command.params:
                if isinstance(option.type, click.types.FloatParamType):
                    yield script, name, option.opts[0]


def test_every_numeric_option_refuses_what_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = list(float_options())
    assert len(options) >= 15
    for script, command, option in options:
        arguments = [command, "data", "output"] if command else []
        done = invoke(script, *arguments, option, "nan")
        assert (done.exit_code, done.stderr) == (2, f"Error: {option} nan: not a finite number\n"), script
        for value in ("inf", "-inf"):
            done = invoke(script, *arguments, f"{option}={value}")
            assert done.exit_code == 2 and done.stderr.count("\n") == 1, (script, done.stderr)
            assert re.search(
                rf"{option} {value}: not a finite number|'{option}': {value} is not in the range", done.stderr
            )


# --- Ctrl-C -------------------------------------------------------------------------------------------------


def own_lines(path) -> list[str]:
    """Return the lines of a stderr file that Python's PYTHONPROFILEIMPORTTIME did not write."""
    return [line for line in path.read_text().splitlines() if not line.startswith("import time:")]


def interrupt_imports(command, tmp_path, module: str, seconds: float) -> tuple[int, list[str]]:
    """Start a process, send SIGINT so many seconds after it has imported `module`: its exit code and stderr."""
    log = tmp_path / f"{module}-{seconds}.log"
    with log.open("w") as stderr:
        environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, env=environment, preexec_fn=interruptible
        )
        wait_for(lambda: f" {module}" in log.read_text(), process)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    return process.returncode, own_lines(log)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "seconds"),
    [("w4a8.cli.command", s) for s in (0, 0.15, 0.5, 1, 1.5, 2, 3)]
    + [("numpy", 0), ("mlx.core", 0), ("huggingface_hub", 0)],
)
def test_ctrl_c_while_a_stage_imports(tmp_path, module, seconds):
    script = [sys.executable, "generate_calibration_data.py", "--model", "sd3-emoji"]
    arguments = ["--num-images", "40", "--num-steps", "8", "--calib-dir", str(tmp_path / "run")]
    code, lines = interrupt_imports([*script, *arguments], tmp_path, module, seconds)
    assert code == 130
    assert lines == ["Interrupted."] or re.match(r"Error: interrupted: \d+ of 40 images", lines[-1])
    assert not any("Traceback" in line for line in lines)


def test_ctrl_c_while_a_script_imports_diffusionkit_itself(tmp_path):
    """As the benchmarks do."""
    code = "import w4a8.cli, w4a8.model.diffusionkit; print('goes on')"
    assert interrupt_imports([sys.executable, "-c", code], tmp_path, "mlx.core", 0) == (130, ["Interrupted."])


CLEANING = """
try:
    print("on", flush=True)
    time.sleep(60)
finally:
    for _ in range(20):
        time.sleep(0.01)
"""


@pytest.mark.parametrize("gap", [0.001, 0.03, 0.1, 0.19, 0.2, 0.21, 0.22, 0.23])
def test_a_second_ctrl_c_ends_the_clean_up_at_once(tmp_path, gap):
    """At any moment after the first, until the process is gone; clean-up takes 0.2 s here."""
    process = start_stage(tmp_path, CLEANING)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(gap)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    lines = stderr.decode().splitlines()
    assert process.returncode == 130, stderr
    assert lines in (["Interrupted again: ended at once."], ["Interrupted."], ["Interrupted.", lines[-1]]), stderr


def test_a_third_and_a_hundredth_ctrl_c(tmp_path):
    process = start_stage(tmp_path, CLEANING)
    process.stdout.readline()
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    _, stderr = process.communicate()
    assert process.returncode == 130 and stderr == b"Interrupted again: ended at once.\n"


def test_an_inherited_sig_ign_stays(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(STAGE.format("    print('on', flush=True); time.sleep(0.3); print('done')"))
    command = ["sh", "-c", f"trap '' INT; exec {sys.executable} {script}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"done\n", b"") and process.returncode == 0


def test_the_handler_is_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    assert invoke("analyze_activations", "--calib-dir", tmp_path).exit_code == 2
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_second_ctrl_c_in_the_evaluation(tmp_path):
    calibration = tmp_path / "run"
    generate("--num-images", 1, "--num-steps", 1, "--no-images", "--calib-dir", calibration)
    runs = tmp_path / "evaluation" / "runs"
    arguments = ["--variants", "w4-rtn,w5-rtn,a8-dynamic", "--num-images", 2, "--output", tmp_path / "evaluation"]
    arguments += ["--calib-dir", calibration]
    process = start("evaluate_quantization", *arguments, preexec_fn=interruptible, env=ONE_THREAD)
    wait_for(lambda: runs.is_dir() and len(list(runs.glob("*.npz"))) > 1, process)  # all is imported by then
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, stderr = process.communicate()
    assert process.returncode == 130 and "Traceback" not in stderr
    assert re.search(r"(go on with: .*|Interrupted again: ended at once\.)\n\Z", stderr)


# --- terminals and log files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"2 ? 3 ? 4"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"2 ? 3 ? 4"),
        ({"PYTHONIOENCODING": "latin-1"}, b"2 \xd7 3 ? 4"),
        ({"PYTHONIOENCODING": "utf-8"}, "2 × 3 – 4".encode()),
    ],
)
def test_a_terminal_that_is_not_utf_8_gets_question_marks(tmp_path, environment, printed):
    body = 'click.echo("2 × 3 – 4")\nprint("2 × 3 – 4", file=sys.stderr)\nraise click.UsageError("2 × 3 – 4")'
    process = start_stage(tmp_path, body, env=environment)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stdout == printed + b"\n"
    assert stderr == printed + b"\nError: " + printed + b"\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stage_names_a_file_that_the_terminal_cannot_show(tmp_path, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    process = start("analyze_activations", "--stats", tmp_path / "2–3.json", env=environment)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and "2?3.json" in stderr and stderr.count("\n") == 1


def test_progress_in_a_log_file(capsys):
    with (
        contextlib.suppress(KeyboardInterrupt),
        ProgressLines(24, "images", "image", 10, interval=0) as bar,
    ):
        bar.set_postfix(loss="0.123", changed="1%", refresh=False)
        time.sleep(0.1)
        bar.update(1)  # kernels are compiled
        time.sleep(0.1)
        bar.update(1)
        bar.set_description("w4")
        bar.n = 20
        raise KeyboardInterrupt
    compiled, first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"images 11/24 \(45%\), 0\.\d s, loss=0.123, changed=1%", compiled)
    figures = re.fullmatch(
        r"images 12/24 \(50%\), (0\.\d) s, ([\d.]+) s to go, ([\d.]+) image/s, loss=0.123, changed=1%", first
    )
    _, left, rate = map(float, figures.groups())
    assert 5 < rate <= 10.1 and left == pytest.approx(
        12 / rate, rel=0.1
    )  # an image in 0.1 s, whatever was there before
    assert re.fullmatch(r"w4 20/24 \(83%\), 0\.\d s, 0\.\d s to go, [\d.]+ image/s, loss=0.123, changed=1%", last)


def test_the_time_to_go_follows_the_last_minute(capsys, monkeypatch):
    """A hundred fast iterations, then slow ones: the line says what is left at the slow rate, the last one the mean."""
    now = 1000.0
    monkeypatch.setattr("w4a8.backend.progress.time.monotonic", lambda: now)
    bar = ProgressLines(150, "model", "it")
    for count, seconds in ((100, 1.0), (20, 5.0)):
        for _ in range(count):
            now += seconds
            bar.update()
    fast, *_, slow = capsys.readouterr().err.splitlines()
    assert "2 min 20 s to go, 1.0 s/it" in fast, fast
    assert "2 min 30 s to go, 5.0 s/it" in slow, slow
    now += 200.0  # a single step that takes longer than a minute
    bar.update()
    assert "1 h 36 min to go, 200.0 s/it" in capsys.readouterr().err
    bar.n = 150
    bar.close()
    assert "s to go" not in capsys.readouterr().err


def test_the_time_to_go_knows_what_later_phases_cost(capsys, monkeypatch):
    """Ten iterations of a second, then ten of five seconds."""
    now = 1000.0
    monkeypatch.setattr("w4a8.backend.progress.time.monotonic", lambda: now)
    bar = ProgressLines(20, "mm0", "it", interval=0)
    for later, seconds in ((40.0, 1.0), (0.0, 5.0)):
        bar.begin_phase(later)
        for _ in range(10):
            now += seconds
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert "mm0 2/20 (10%), 2.0 s, 58 s to go, 1.0 s/it" in lines
    assert "mm0 10/20 (50%), 10 s, 50 s to go, 1.0 s/it" in lines
    assert "mm0 12/20 (60%), 20 s, 40 s to go, 5.0 s/it" in lines
    in_terminal = Bar(total=20, desc="mm0", file=io.StringIO(), bar_format=BAR_FORMAT)
    shown_later = []
    for later, seconds in ((40.0, 1.0), (0.0, 5.0)):
        in_terminal.begin_phase(later)
        for _ in range(10):
            now += seconds
            in_terminal.update()
            shown_later.append(in_terminal.format_dict["to_go"])
    assert shown_later[:3] == ["?", "00:58", "00:57"] and shown_later[9:12] == ["00:50", "?", "00:40"]
    assert shown_later[-1] == "00:00" and "20/20 [" in str(in_terminal)
    in_terminal.close()


def test_progress_without_anything_to_do_and_slow_progress(capsys):
    with progress_bar(3, "images", "image", initial=3):
        pass
    with progress_bar(0, "images", "image"):
        pass
    bar = ProgressLines(1, "units", "unit")
    bar._begin -= 75.0
    bar.update()
    bar.close()
    bar.close()
    with progress_bar(8, "steps", "step", leave=False) as steps:
        steps.update(8)
    assert capsys.readouterr().err.splitlines() == [
        "images 3/3 (100%), 0.0 s", "images 0/0 (100%), 0.0 s", "units 1/1 (100%), 1 min 15 s, 75.0 s/unit",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_log_file_gets_whole_lines(tmp_path):
    arguments = ["--model", "sd3-emoji", "--num-images", 2, "--num-steps", 2, "--calib-dir", tmp_path / "run"]
    process = start("generate_calibration_data", *arguments, env=ONE_THREAD)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    line = r"images \d/2 \(\d+%\), [\d.]+ s(, [\d.]+ s to go)?, [\d.]+ (s/image|image/s)\n"
    assert re.fullmatch(rf"({line})+", stderr) and "images 2/2 (100%), " in stderr


def test_a_terminal_keeps_its_bar(tmp_path):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    body = "with progress_bar(4, 'images', 'image') as bar:\n    time.sleep(0.2); bar.update(4)"
    process = start_stage(tmp_path, body, stderr=terminal)
    assert process.wait(timeout=60) == 0
    os.close(terminal)
    shown = os.read(controller, 10_000)
    os.close(controller)
    assert b"\rimages: 100%" in shown and "█".encode() in shown


# --- messages -----------------------------------------------------------------------------------------------


def test_an_empty_value_is_shown(monkeypatch):
    assert [shown(value) for value in ("", "red", 0, None, [])] == ["''", "red", "0", "None", "[]"]
    monkeypatch.setattr(sys, "argv", ["/x/generate.py", "--negative-prompt", "", "--prompts", "a b.txt", "--force"])
    assert resume_command() == f"{interpreter()} /x/generate.py --negative-prompt '' --prompts 'a b.txt' --resume"
