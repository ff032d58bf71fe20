"""What every stage's command line shares: prompt files, numbers, Ctrl-C at any moment, terminals, log files."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from conftest import ROOT, generate, invoke

import cli_options
from cli_options import read_prompt_file

SCRIPTS = (
    "generate_calibration_data", "cache_adaround_data", "collect_layer_activations", "analyze_activations",
    "analyze_activations_multitier", "optimize_adaround", "evaluate_quantization", "tools.train_sd3_emoji",
)  # fmt: skip
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for a busy core make small models slow
STAGE = """
import sys, time
import click
from cli_options import Interrupted, progress_bar, stage_command

@stage_command
def main():
{}

main()
"""


def interruptible():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite that runs in the background inherits SIG_IGN


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


# --- prompt files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id, Caption \n1,rocket\n2,swan\n"),
        ("a.tsv", "id\tprompt\n1\trocket\n2\t swan \n"),
        ("a.TSV", '"PROMPT"\tid\n"rocket"\t1\n\n""\t2\nswan\n'),
        ("a.csv", "caption,prompt\nno,rocket\nno,swan\nno\n"),
        ("a.csv", "\ufeffprompt\nrocket\nswan\n"),
        ("a.csv", "\n\nprompt\nrocket\nswan\n"),
        ("a.txt", "\ufeffrocket\r\n\r\n  swan\n"),
    ],
)
def test_prompt_files(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompt_file(tmp_path / name) == ["rocket", "swan"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".yaml", ".yml", ".JSON"])
def test_structured_files_are_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"prompts{suffix}"
    path.write_text(json.dumps(["rocket"]))
    done = generate("--prompts", path, "--calib-dir", tmp_path / "run")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert f"--prompts {path}: {suffix.lower()} files are not read; give text (one prompt a line), .csv" in done.stderr


def refusal(path) -> str:
    with pytest.raises(click.UsageError) as refused:
        read_prompt_file(path)
    return refused.value.format_message()


def test_files_that_cannot_be_read_say_why(tmp_path):
    assert refusal(tmp_path) == f"--prompts {tmp_path}: Is a directory"
    assert refusal(tmp_path / "none.txt") == f"--prompts {tmp_path}/none.txt: No such file or directory"
    assert refusal(Path("/proc/self/mem")) == "--prompts /proc/self/mem: Input/output error"
    (tmp_path / "a.tsv").write_text("id\ttext\n")
    assert (
        refusal(tmp_path / "a.tsv")
        == f"--prompts {tmp_path}/a.tsv: no column 'prompt' or 'caption' (columns: id, text)"
    )
    (tmp_path / "b.tsv").write_text('prompt\n"open\n')
    assert refusal(tmp_path / "b.tsv") == f"--prompts {tmp_path}/b.tsv: not valid TSV (unexpected end of data)"


def test_files_without_permission_say_so(tmp_path):
    (tmp_path / "a.txt").touch(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        assert refusal(tmp_path / "a.txt") == f"--prompts {tmp_path}/a.txt: Permission denied"
    finally:
        os.seteuid(user)


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


# --- messages -----------------------------------------------------------------------------------------------


def test_an_empty_value_is_shown(monkeypatch):
    assert [cli_options.show(value) for value in ("", "red", 0, None, [])] == ["''", "red", "0", "None", "[]"]
    monkeypatch.setattr(sys, "argv", ["/x/generate.py", "--negative-prompt", "", "--prompts", "a b.txt", "--force"])
    assert cli_options.resume_command() == "python generate.py --negative-prompt '' --prompts 'a b.txt' --resume"
