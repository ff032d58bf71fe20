"""Damage every kind of file that the stages read, one at a time, and see what they do with it.

python tools/corruption_campaign.py                 # every mutation: about 15 minutes on two cores
python tools/corruption_campaign.py --limit 60      # an even spread of 60

The mutations are derived from the formats as calibration_store declares them (tools/mutations.py): every JSON entry
missing, of another type, out of its range; every array missing, of another dtype or shape, not finite, or breaking the
rule that it must keep; every file truncated, empty, flipped in a bit, a folder, a link to itself, a pipe, endless; files
of another image or step under this one's name. tools/border_cases.py adds what no declaration thinks of: files of another
run with the same shapes, archives that unpack to gigabytes, numbers that no file can hold, full and closed streams.

A case is lost when a stage ends with a traceback, takes the file as good (exit code 0), keeps it under --resume, changes
a file where it must refuse, refuses what means nothing, or runs longer than the limit. Each runs in a forked process of
its own with 6 GB of address space, so that a crash is seen as one, and endless input does not take the machine.
"""

import contextlib
import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.cases import Case, Target
from w4a8.cli import progress_bar, stage_command
from w4a8.cli.command import open_standard_streams

CLEAN = [  # what makes the clean folder, small
    ("generate_calibration_data", "--num-images", "2", "--num-steps", "3"),
    ("cache_adaround_data", "--num-images", "2", "--stride", "1"),
    ("collect_layer_activations", "--num-images", "2", "--stride", "1"),
    ("analyze_activations",),
    ("analyze_activations_multitier",),
    ("optimize_adaround", "--iters", "10", "--batch-size", "2", "--unit", "block"),
    ("export_quantized_model", "--weights", "w4-rtn", "--activations", "a8"),
    ("evaluate_quantization", "--num-images", "1", "--num-steps", "1", "--variants", "w4-rtn"),
]
OTHER = {  # options of the stages that make a second run, whose files take the places of the clean run's
    "generate_calibration_data": ("--seed", "7"), "cache_adaround_data": (), "collect_layer_activations": (),
    "optimize_adaround": ("--blocks", "mm0"),
}  # fmt: skip
ADDRESS_SPACE = 6 * 10**9  # bytes that a stage may map


def closed_streams() -> None:
    for number in range(3):
        os.close(number)
    open_standard_streams()  # what importing w4a8.cli does in a process that starts this way


SURROUNDINGS = {  # what is done to a process before its stage begins
    "no temporary folder": lambda: os.environ.update(TMPDIR="/nonexistent"),
    "a full standard output": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
    "no standard streams": closed_streams,
}


class Result(NamedTuple):
    """What became of a case: fine, or one of the ways to lose it; and the stage's last line."""

    case: Case
    fate: str
    line: str


def stage_process(script: str, arguments: list[str], log: str | Path, surroundings: str | None = None) -> int:
    """Fork a process that runs a stage, its output to `log`; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv, code = [f"{script}.py", *arguments], 70
    try:  # whatever happens, the parent's clean-up must not run here
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        if surroundings is not None:
            SURROUNDINGS[surroundings]()
        importlib.import_module(script).main(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run_stage(
    script: str, arguments: list[str], log: Path, limit: float, surroundings: str | None = None
) -> tuple[int | None, str]:  # fmt: skip
    """Run a stage in a forked process: (exit code; None: killed after `limit` seconds), and all that it printed."""
    pid = stage_process(script, arguments, log, surroundings)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, log.read_text(errors="replace")


def fate_of(target: Target, folder: Path, clean: Path, code: int | None, output: str) -> str:
    """Return fine, traceback, accepted, kept, changed, refused or hung."""
    if code is None:
        return "hung"
    if code < 0 or "Traceback" in output or (code and output.count("Error: ") != 1):
        return "traceback"
    if target.expects == "success":
        return "refused" if code else "fine"
    if code and target.expects == "untouched" and tree(folder) != tree(clean / target.base):
        return "changed"
    if code:
        return "fine"
    if not target.resume:
        return "accepted"
    result = target.result or target.file
    return "fine" if (folder / result).read_bytes() == (clean / target.base / result).read_bytes() else "kept"


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the inode and time of every file below a folder: a hard link that nobody changed keeps both."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def run_case(case: Case, clean: Path, limit: float) -> Result:
    """Copy the clean folder (by hard links), damage one file, run the stage."""
    target = case.target
    with tempfile.TemporaryDirectory(prefix="campaign") as work:
        folder = Path(work) / target.base
        shutil.copytree(clean / target.base, folder, copy_function=os.link)
        case.mutation.apply(folder / target.file)
        for extra in target.without:
            (folder / extra).unlink(missing_ok=True)
        script, *given = target.command
        arguments = [word.replace("{run}", str(folder)).replace("{root}", str(clean)) for word in given]
        if "--calib-dir" not in arguments and script != "draw_images":
            arguments += ["--calib-dir", str(folder)]
        code, output = run_stage(script, arguments, Path(work) / "log", limit, target.surroundings)
        lines = output.replace("\r", "\n").strip().splitlines()
        return Result(case, fate_of(target, folder, clean, code, output), lines[-1] if lines else "")


def make_clean(root: Path) -> None:
    """Make the folders that the cases start from.

    model/ is a copy of the bundled model, run/ has every stage once, other/ is a run with another seed, and half/ has stage
    3W of a block with its checkpoint.
    """
    shutil.copytree(Path(__file__).resolve().parent.parent / "models/sd3-emoji", root / "model")
    log = root / "log"

    def run(script: str, *arguments: str) -> None:
        code, output = run_stage(script, list(arguments), log, 600)
        if code:
            raise click.ClickException(f"the clean run failed: {script}: {output[-400:]}")

    for script, *arguments in CLEAN:
        model = ["--model", str(root / "model")] if script == "generate_calibration_data" else []
        run(script, *arguments, *model, "--calib-dir", str(root / "run"))
        if script in OTHER:
            run(script, *arguments, *model, *OTHER[script], "--calib-dir", str(root / "other"))
    for part in ("manifest.json", "samples", "adaround_cache"):
        copy = shutil.copytree if (root / "run" / part).is_dir() else shutil.copy
        (root / "half").mkdir(exist_ok=True)
        copy(root / "run" / part, root / "half" / part)
    block = [
        "--iters",
        "10",
        "--batch-size",
        "2",
        "--unit",
        "block",
        "--blocks",
        "mm0",
        "--calib-dir",
        str(root / "half"),
    ]
    checkpoint = root / "half/adaround_weights/checkpoint.npz"
    pid = stage_process("optimize_adaround", [*block, "--checkpoint-seconds", "0"], os.devnull)
    while not checkpoint.exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kept = checkpoint.read_bytes()
    run("optimize_adaround", *block, "--resume")
    checkpoint.write_bytes(kept)
    log.unlink()


def spread(cases: list[Case], limit: int | None) -> list[Case]:
    """At most `limit` cases, evenly over all of them."""
    return cases if limit is None or limit >= len(cases) else [cases[i * len(cases) // limit] for i in range(limit)]


@stage_command
@click.option("--limit", type=click.IntRange(min=1), help="Run only so many cases, evenly spread.  [default: all]")
@click.option("--match", help="Only cases whose line holds this text.")
@click.option("--seconds", type=click.FloatRange(min=1), default=60, help="How long a stage may take.")
@click.option("--workers", type=click.IntRange(1, 64), default=os.cpu_count(), help="Stages that run at a time.")
def main(limit: int | None, match: str | None, seconds: float, workers: int) -> None:
    """Damage files and see what the stages do with them."""
    import w4a8.model.loading  # noqa: F401  (loaded once; every case is forked from here, before MLX has computed anything)
    from tools.border_cases import all_cases

    with tempfile.TemporaryDirectory(prefix="campaign") as root:
        make_clean(Path(root))
        cases = spread([case for case in all_cases(Path(root)) if match is None or match in str(case)], limit)
        results = []
        with ThreadPoolExecutor(workers) as pool, progress_bar(len(cases), "cases", "case") as bar:
            for result in pool.map(lambda case: run_case(case, Path(root), seconds), cases):
                results.append(result)
                bar.update()
    lost = [result for result in results if result.fate != "fine"]
    for result in lost:
        click.echo(f"{result.fate:10} {result.case}: {result.line[:200]}")
    counts = Counter(result.fate for result in results)
    click.echo(
        f"{len(results)} damaged files: {counts['traceback']} tracebacks, {counts['accepted']} accepted, "
        f"{counts['kept']} kept by --resume, {counts['hung']} above {seconds:g} s"
        + "".join(f", {counts[fate]} {fate}" for fate in ("changed", "refused") if counts[fate])
    )
    if lost or not results:
        raise click.ClickException(f"{len(lost)} of {len(results)} cases are lost")


if __name__ == "__main__":
    main()
