"""Damage every kind of file that the stages read, one at a time, and see how the stages react.

python tools/corruption_campaign.py                 # every mutation: about 15 minutes on two cores
python tools/corruption_campaign.py --limit 60      # an even spread of 60

The mutations are derived from the formats as calibration_store declares them (tools/mutations.py): every JSON entry
missing, of another type, out of its range; every array missing, of another dtype or shape, not finite, or breaking the
rule that it must keep; every file truncated, empty, flipped in a bit, a folder, a link to itself, a pipe, endless; files
of another image or step under this one's name. Some cases here are implied by no declaration: files of another run with
the same shapes, archives that unpack to gigabytes, numbers that no file can hold, full and closed streams.

A case is lost when a stage ends with a traceback, takes the file as good (exit code 0), keeps it under --resume, changes
a file where it must refuse, refuses what means nothing, or runs longer than the limit. Each runs in a forked process of
its own with 6 GB of address space, so that a crash is seen as one, and endless input does not take the machine.
"""

import contextlib
import itertools
import os
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

import w4a8.model.loading  # noqa: F401  (loaded once: every case is forked from here, before MLX has computed anything)
from calibration_store.npz import write_npz
from tools.campaign_cases import (
    ANALYZE,
    CACHE,
    CLEAN,
    COLLECT,
    DRAW,
    EVALUATE,
    EVALUATE_AGAIN,
    EVALUATED,
    GENERATE,
    HALF,
    OPTIMIZE,
    Cases,
    Expectation,
    Target,
    every_format,
    exported,
    forced,
    resumed,
)
from tools.mutations import Mutation, copied, npz_bombs, npz_oddities
from w4a8.cli import progress_bar, stage_command
from w4a8.cli.command import open_standard_streams

ROOT = Path(__file__).resolve().parent.parent
HUGE = "99999999999999999999"  # more than 64 bits
LEARNED = (*EVALUATE, "--variants", "w4-adaround")
REPORT = ("report_calibration", "--output", "{run}/new")
OTHER = {  # options of the stages that make a second run, whose files take the places of the clean run's
    "generate_calibration_data": ("--seed", "7"), "cache_adaround_data": (), "collect_layer_activations": (),
    "optimize_adaround": ("--blocks", "mm0"),
}  # fmt: skip
ADDRESS_SPACE = 6 * 10**9  # bytes that a stage may map


def closed_streams() -> None:
    """Close the standard streams, as a process that starts without them."""
    for number in range(3):
        os.close(number)
    open_standard_streams()  # what importing w4a8.cli does in a process that starts this way


SURROUNDINGS = {  # what is done to a process before its stage begins
    "no temporary folder": lambda: os.environ.update(TMPDIR="/nonexistent"),
    "a full standard output": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
    "no standard streams": closed_streams,
}


class Case(NamedTuple):
    """One damaged file and one stage."""

    target: Target
    mutation: Mutation

    def __str__(self) -> str:
        how = "--resume" if self.target.resume else "reads it"
        how += "" if self.target.expects == "refusal" else f", {self.target.expects} expected"
        return f"{self.target.base}/{self.target.file} [{self.mutation.name}] {self.target.command[0]} {how}"


class Result(NamedTuple):
    """The fate of a case, fine or one of the ways to lose it, and the stage's last line."""

    case: Case
    fate: str
    line: str


def stage_process(script: str, arguments: list[str], log: str | Path, surroundings: str | None = None) -> int:
    """Fork a process that runs a stage, its output to `log`; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [f"{script}.py", *arguments]
    code: str | int | None = 70
    try:  # whatever happens, the parent's clean-up must not run here
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        if surroundings is not None:
            SURROUNDINGS[surroundings]()
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def run_stage(
    script: str, arguments: list[str], log: Path, limit: float, surroundings: str | None = None
) -> tuple[int | None, str]:  # fmt: skip
    """Run a stage in a forked process; return its exit code, None where it was killed after `limit` seconds, and its output."""
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
        arguments = filled(given, folder, clean)
        if "--calib-dir" not in arguments and script != "draw_images":
            arguments += ["--calib-dir", str(folder)]
        code, output = run_stage(script, arguments, Path(work) / "log", limit, target.surroundings)
        lines = output.replace("\r", "\n").strip().splitlines()
        return Result(case, fate_of(target, folder, clean, code, output), lines[-1] if lines else "")


def filled(words: list[str], run: Path, root: Path) -> list[str]:
    """Return the words of a command with its folders in place."""
    return [word.replace("{run}", str(run)).replace("{root}", str(root)) for word in words]


def make_clean(root: Path) -> None:
    """Make the folders that the cases start from.

    model/ is a copy of the bundled model, run/ has every stage once, other/ is a run with another seed, and half/ has stage
    3W of a block with its checkpoint.
    """
    shutil.copytree(ROOT / "models/sd3-emoji", root / "model")
    log = root / "log"

    def run(script: str, *arguments: str) -> None:
        code, output = run_stage(script, list(arguments), log, 600)
        if code:
            raise click.ClickException(f"the clean run failed: {script}: {output[-400:]}")

    for script, *words in CLEAN:
        run(script, *filled(words, root / "run", root))
        if script in OTHER:
            run(script, *filled(words, root / "other", root), *OTHER[script])
    for part in ("manifest.json", "samples", "adaround_cache"):
        copy = shutil.copytree if (root / "run" / part).is_dir() else shutil.copy
        (root / "half").mkdir(exist_ok=True)
        copy(root / "run" / part, root / "half" / part)
    script, *words = HALF
    block = filled(words, root / "half", root)
    checkpoint = root / "half/adaround_weights/checkpoint.npz"
    pid = stage_process(script, [*block, "--checkpoint-seconds", "0"], os.devnull)
    while not checkpoint.exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kept = checkpoint.read_bytes()
    run(script, *block, "--resume")
    checkpoint.write_bytes(kept)
    log.unlink()


def spread(cases: list[Case], limit: int | None) -> list[Case]:
    """Return at most `limit` cases, evenly over all of them."""
    return cases if limit is None or limit >= len(cases) else [cases[i * len(cases) // limit] for i in range(limit)]


@stage_command
@click.option("--limit", type=click.IntRange(min=1), help="Number of cases to run, evenly spread.  [default: all]")
@click.option("--match", help="Only cases whose line holds this text.")
@click.option("--seconds", type=click.FloatRange(min=1), default=60, help="How long a stage may take.")
@click.option("--workers", type=click.IntRange(1, 64), default=os.cpu_count(), help="Stages that run at a time.")
def main(limit: int | None, match: str | None, seconds: float, workers: int) -> None:
    """Damage files and see how the stages react."""
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


# --- the cases that no declaration implies --------------------------------------------------------------------


def all_cases(clean: Path) -> Iterator[Case]:
    """Yield every case of the campaign, from the files of the clean runs."""
    for targets, mutations in itertools.chain(every_format(clean), border_cases(clean)):
        for target in targets:
            for mutation in mutations:
                yield Case(target, mutation)


def border_cases(clean: Path) -> Cases:
    """Yield (targets, mutations) from the files of the clean runs: run/, and other/ with another seed."""
    yield from foreign_files(clean / "run", clean / "other")
    yield from bombs(clean / "run")
    yield from exported(clean / "run")
    yield from limits()
    yield from surroundings()


def foreign_files(run: Path, other: Path) -> Cases:
    """Yield files of equal shapes from another run, and a file of this run with its rows exchanged."""
    losses = resumed(
        "run", "adaround_weights/mm0_losses.json", OPTIMIZE, result="adaround_weights/metadata.json",
        without=("adaround_weights/metadata.json",),
    )  # fmt: skip
    for name, targets in {
        "samples/0000_000.npz": [forced("", COLLECT, "--dry-run"), resumed("run", "", GENERATE)],
        "samples/0001_003.npz": [resumed("run", "", GENERATE)],
        "images/0000.png": [resumed("run", "", GENERATE)],
        "adaround_cache/samples/0000_000.npz": [forced("", OPTIMIZE, "--blocks", "mm0"), resumed("run", "", CACHE)],
        "activations/partial/0000_001.npz": [resumed("run", "", COLLECT)],
        "activations/timestep_stats/step_1.npz": [Target("run", "", ANALYZE)],
        "adaround_weights/mm0.npz": [Target("run", "", LEARNED), resumed("run", "", OPTIMIZE)],
        "adaround_weights/mm0_losses.json": [losses],
    }.items():
        yield [target._replace(file=name) for target in targets], [copied("another run's", other / name)]
    name = "adaround_weights/mm0.npz"
    yield (
        [Target("run", name, LEARNED), resumed("run", name, OPTIMIZE)],
        [Mutation("rows in another order", reversed_rows)],
    )


def reversed_rows(path: Path) -> None:
    """Write the codes of a layer in reverse order."""
    arrays = dict(np.load(path))
    key = next(key for key in arrays if key.endswith("__q"))
    path.unlink()
    write_npz(path, arrays | {key: arrays[key][::-1]})


def bombs(run: Path) -> Cases:
    """Yield bombs for each kind of NPZ: refused in a known member, ignored in a member that the stage does not know."""
    again = str(next((run / "evaluation/runs").glob("w4-rtn*")).relative_to(run))
    for name, known, target in (
        ("samples/0000_000.npz", "x", forced("", COLLECT, "--dry-run")),
        ("adaround_cache/samples/0000_000.npz", "mm0__arg0", forced("", OPTIMIZE, "--blocks", "mm0")),
        ("activations/partial/0000_001.npz", "limits", resumed("run", "", COLLECT)),
        ("activations/timestep_stats/step_1.npz", "mm0_img_attn_q_proj__avg_min", Target("run", "", ANALYZE)),
        (again, "latents", resumed("run", "", EVALUATE_AGAIN)),
    ):
        yield [target._replace(file=name)], list(npz_bombs(known))
        yield [target._replace(file=name, resume=False, expects="success")], list(npz_oddities())
    name = "adaround_weights/mm0.npz"  # metadata.json notes its digest, so that any change is refused
    known = next(key for key in np.load(run / name).files if key.endswith("__q"))
    mutations = [*npz_bombs(known), *npz_oddities()]
    yield [Target("run", name, LEARNED), resumed("run", name, OPTIMIZE)], mutations


def nothing(path: Path) -> None:
    """Leave the file as it is, since the case is in the command."""


def limits() -> Cases:
    """Yield commands with numbers and names that no file can hold; they must be refused before anything is deleted."""
    for command in (
        *((*GENERATE, option, HUGE) for option in ("--seed", "--stride", "--num-steps", "--batch-size", "--num-images", "--latent-size")),
        *((*GENERATE, "--cfg-weight", value) for value in ("1e20", "1e39")),
        *((script, option, HUGE) for script in (CACHE[0], COLLECT[0]) for option in ("--stride", "--num-images")),
        (CACHE[0], "--stride", "200000"),
        *((*OPTIMIZE, option, HUGE) for option in ("--seed", "--iters", "--batch-size", "--micro-batch", "--end-to-end")),
        *((*OPTIMIZE, option, "1e31") for option in ("--lr-alpha", "--lr-activation-scale", "--regularizer-weight")),
    ):  # fmt: skip
        name = Mutation(" ".join(command[-2:]), nothing)
        yield [Target("run", "manifest.json", (*command, "--force"), expects="untouched")], [name]
    for command in (
        (*EVALUATED, "--seed", HUGE), (*EVALUATED, "--cfg-weight", "1e20"), ("evaluate_quantization", "--output", ""),
        ("report_calibration", "--output", ""), ("draw_images", "cat", "--output", ""), (*GENERATE, "--calib-dir", ""),
        ("export_quantized_model", "--output", "", "--force"), (*ANALYZE, "--output", ""), (*ANALYZE, "--outlier-threshold", "1e39"),
        *((*command, "--force", "--calib-dir", "") for command in (CACHE, COLLECT, OPTIMIZE)),
    ):  # fmt: skip
        name = Mutation(" ".join(word or "''" for word in command[-2:]), nothing)
        yield [Target("run", "manifest.json", command, expects="untouched")], [name]


def surroundings() -> Cases:
    """Yield commands with sound files in odd surroundings."""
    here = [Mutation("as it is", nothing)]

    def target(command: tuple[str, ...], around: str, expects: Expectation) -> Target:
        return Target("run", "manifest.json", command, expects=expects, surroundings=around)

    for command in (forced("", COLLECT).command, DRAW, (*EVALUATE, "--variants", "w4-rtn"), (*GENERATE, "--force")):
        yield [target(command, "no temporary folder", "untouched")], here
    for command in (ANALYZE, REPORT, DRAW, (*EVALUATE, "--variants", "w4-rtn"), forced("", COLLECT).command):
        yield [target(command, "a full standard output", "refusal")], here
        yield [target(command, "no standard streams", "success")], here
    yield [target(("export_quantized_model", "--output", "{run}/new"), "no standard streams", "success")], here


if __name__ == "__main__":
    main()
