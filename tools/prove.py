"""Try what this toolkit claims, in one command.

python tools/prove.py reliability --kills 100       # kill -9 at random moments of every stage, damaged files, full disks, two writers
python tools/prove.py rehearsal --size sd3-emoji    # the whole road: seconds, bytes and peaks of every stage

Both write a dated JSON file (--output) that says what was tried, on which machine and at which commit, and with which result.
"""

import datetime
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.figures import provenance
from benchmarks.random_model import HUB_IDS
from calibration_store.files import atomic_file
from tools.road import ROADS, again, commands, words
from w4a8.cli import format_bytes, progress_bar, shortened

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = "3W blocks"  # another way, on what 2W left
STAGES = dict(zip(("1", "2A", "3A", "2W", "3W", "5", "4", BLOCKS), ROADS["reliability"], strict=True))
KILLED = [name for name in STAGES if name != "3A"]
WRITERS = ("1", "2A", "2W", "3W")  # stages that write for a while
MARKER = "a file is open"  # beside the run
REHEARSALS: dict[str, tuple[str, dict[str, object]]] = {  # size -> a road, and its values
    "sd3-emoji": ("rehearsal", {"model": "sd3-emoji", "t5": "", "drawn": 4, "stride": 4, "iters": 40, "unit": "", "last": "", "judged": ""}),
    **{size: ("rehearsal", {"model": HUB_IDS[size], "t5": "--no-t5", "drawn": "", "stride": 5, "iters": 20, "unit": "block", "last": 4, "judged": 2}) for size in ("sd3-medium", "sd3.5-medium")},
    "tiny": ("tiny", {"blocks": "mm0"}),
}  # fmt: skip
OUTLIERS = {"sd3-medium": ["--outliers"]}
Found = list[tuple[str, str | None]]  # stage, what was lost


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Try what the toolkit claims."""


output_option = click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file to write.  [default: benchmarks/results/DATE-….json]")  # fmt: skip


def write(output: Path | None, kind: str, content: dict[str, Any]) -> None:
    """Write the dated file."""
    path = output or ROOT / "benchmarks/results" / f"{datetime.date.today().isoformat()}-{kind}.json"
    head = {"format": f"{kind.split('-')[0]}_v1", "machine": provenance()}
    path.write_text(json.dumps({**head, **content}, indent=1) + "\n")
    click.echo(f"wrote {path}")


# --- reliability ----------------------------------------------------------------------------------------------


@main.command()
@click.option("--kills", type=click.IntRange(min=1), default=100, help="kill -9, over all stages.")
@click.option("--corruption", type=click.IntRange(min=0), help="Damaged files of the corruption campaign; 0: none.  [default: all]")  # fmt: skip
@click.option("--seed", type=int, default=0, help="Decides the moments.")
@output_option
def reliability(kills: int, corruption: int | None, seed: int, output: Path | None) -> None:
    """Kill, damage, fill up, write twice; nothing may be lost, and a resumed run has the bytes of a clean one."""
    others: dict[str, Found | None] = {}
    campaign, interrupted = None, False
    with tempfile.TemporaryDirectory(prefix="prove") as base:
        proof = Proof(Path(base), seed)
        try:
            for name in proof.prepare():
                click.echo(f"clean run: {name}", err=True)
            with progress_bar(kills, "kills", "kill") as bar:
                names, turn = list(proof.tallies), 0
                while bar.n < kills:
                    bar.update(min(proof.trial(names[turn % len(names)]), kills - bar.n))
                    turn += 1
            others["two writers"] = proof.two_writers()
            others["full disk"] = proof.full_disk()
            others["read-only folder"] = proof.read_only()
            if corruption != 0:
                campaign = damaged_files(corruption)
        except KeyboardInterrupt:
            proof.stop()
            click.echo("interrupted; what was tried until then:", err=True)
            interrupted = True
    lost = [loss for tally in proof.tallies.values() for loss in tally.lost]
    lost += [(f"{what}, {name}", why) for what, found in others.items() for name, why in found or () if why]
    if campaign and campaign["exit_code"]:
        lost += [("corruption campaign", line) for line in campaign["lost"] or [campaign["said"]]]
    click.echo(f"\n{'stage':12}{'trials':>8}{'kills':>8}{'in a file':>11}{'lost':>8}")
    for name, tally in proof.tallies.items():
        click.echo(f"{name:12}{tally.trials:8}{tally.kills:8}{tally.in_a_file:11}{len(tally.lost):8}")
    for what, where in (("two writers", ""), ("full disk", " (Linux, root)"), ("read-only folder", " (Linux, root)")):
        found = others.get(what)
        click.echo(f"{what}{where}: {shortened([name for name, _ in found]) if found else 'not tried'}")
    click.echo(f"damaged files: {campaign['said'] if campaign else 'not tried'}")
    for what, why in lost:
        click.echo(f"lost: {what}: {why} (seed {seed})", err=True)
    if interrupted and output is None:
        sys.exit(130)  # the last whole proof stays
    disks, read_only = others.get("full disk"), others.get("read-only folder")
    write(output, "reliability", {
        "seed": seed, "kills": sum(tally.kills for tally in proof.tallies.values()),
        "kills_in_a_file": sum(tally.in_a_file for tally in proof.tallies.values()), "lost": len(lost), "losses": lost,
        "stages": {name: asdict(tally) | {"lost": len(tally.lost)} for name, tally in proof.tallies.items()},
        "two_writers": dict(others.get("two writers") or ()), "full_disk": dict(disks) if disks else None,
        "read_only": dict(read_only) if read_only else None, "corruption": campaign, "interrupted": interrupted,
    })  # fmt: skip
    sys.exit(130 if interrupted else 1 if lost else 0)


def damaged_files(limit: int | None) -> dict[str, Any]:
    """Run the corruption campaign; return its exit code, its last line, and a line for each case that was lost."""
    command = [sys.executable, "tools/corruption_campaign.py", *([] if limit is None else ["--limit", str(limit)])]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    *lost, said = done.stdout.strip().splitlines() or [""]
    return {"exit_code": done.returncode, "said": said, "lost": lost}


@dataclass
class Tally:
    """The number of trials and kills of a stage, and its losses: (trial, why)."""

    trials: int = 0
    kills: int = 0
    in_a_file: int = 0  # number of kills that came while a file was half written
    lost: list[tuple[str, str | None]] = field(default_factory=list)


class Proof:
    """Clean runs of every stage, the files that each must leave, and the trials that compare with these."""

    def __init__(self, base: Path, seed: int):
        self.base, self.random, self.tallies = base, random.Random(seed), {name: Tally() for name in KILLED}
        self.before: dict[str, Path] = {}
        self.expected: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        self.processes: list[subprocess.Popen[str]] = []

    def started(
        self, name: str, folder: Path, resumed: bool = False, pause: float | None = None
    ) -> subprocess.Popen[str]:
        """Start a stage.

        resumed: as somebody goes on after an interruption. pause: seconds after which its next write stops in the middle
        (tools/pausing.py).
        """
        script, *options = words(STAGES[name], folder)
        line = [str(ROOT / script), *options, *(again(script) if resumed else ())]
        if pause is not None:
            line = [str(ROOT / "tools/pausing.py"), str(pause), str(folder.parent / MARKER), *line]
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, *line], cwd=folder.parent, stdout=pipe, stderr=pipe, text=True)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """End the processes that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def prepare(self) -> Iterator[str]:
        """Run every stage once, cleanly; yield the name of each before."""
        folder = self.base / "run"
        folder.mkdir(parents=True)
        for name in STAGES:
            yield name
            if name == BLOCKS:
                shutil.rmtree(folder)
                shutil.copytree(self.before["3W"], folder)
            self.before[name] = shutil.copytree(folder, self.base / f"before {name}")
            start = time.perf_counter()
            process = self.started(name, folder)
            _, errors = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{name} failed: {errors.strip()[-300:]}")
            self.seconds[name], self.expected[name] = time.perf_counter() - start, contents(folder)

    def trial(self, name: str) -> int:
        """Kill a stage up to three times, then let it end; return the number of kills that hit it.

        Every other kill comes at a random moment, the others while a file is open that is half written.
        """
        tally, folder = self.tallies[name], self.base / "trial" / "run"
        self._fresh(name, folder)
        kills, tally.trials = 0, tally.trials + 1
        for attempt in range(self.random.randint(1, 3)):
            moment, in_a_file = self.random.uniform(0.2, 1.1 * self.seconds[name]), self.random.random() < 0.5
            process = self.started(name, folder, resumed=attempt > 0, pause=moment if in_a_file else None)
            marker = folder.parent / MARKER
            marker.unlink(missing_ok=True)
            while process.poll() is None and not marker.exists() and (in_a_file or moment > 0):
                time.sleep(0.01)
                moment -= 0.01
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
                tally.in_a_file += in_a_file
            process.communicate()
        process = self.started(name, folder, resumed=True)
        _, errors = process.communicate()
        why = None
        if process.returncode:
            why = errors.strip().splitlines()[-1] if errors.strip() else f"exit code {process.returncode}"
        else:
            found, expected = contents(folder), self.expected[name]
            other = [path for path in {**found, **expected} if found.get(path) != expected.get(path)]
            why = f"{len(other)} files differ, {sorted(other)[0]}" if other else None
        if why is not None:
            tally.lost.append((f"trial {tally.trials} of {name}", why))
        tally.kills += kills
        return kills

    def _fresh(self, name: str, folder: Path) -> None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        shutil.copytree(self.before[name], folder)

    def two_writers(self) -> Found:
        """Run each stage twice at once in one folder."""
        found: Found = []
        for name in filter(self.before.get, WRITERS):
            folder = self.base / "trial" / "run"
            self._fresh(name, folder)
            both = [self.started(name, folder), self.started(name, folder)]
            errors = [process.communicate()[1] for process in both]
            codes = [process.returncode for process in both]
            refused = [text for text, code in zip(errors, codes, strict=True) if code]
            fine = sorted(map(bool, codes)) == [False, True] and is_one_line(refused[0])
            fine = fine and contents(folder) == self.expected[name]
            found.append((name, None if fine else f"exit codes {codes}"))
        return found

    def full_disk(self) -> Found | None:
        """Run each stage on a disk that gets full on the way, then resume it with room; None where no disk can be made here."""
        found: Found = []
        for name in filter(self.before.get, WRITERS):
            start = bytes_below(self.before[name])
            grown = sum(map(len, self.expected[name].values())) - start
            with self._on_small_disk(name, start + 4 * grown + 2**23) as folder:
                if folder is None:
                    return None
                process = self.started(name, folder)
                while process.poll() is None and bytes_below(folder) < start + grown // 4:
                    time.sleep(0.005)
                fill_up(folder.parent / "filler")
                _, errors = process.communicate()
                fine = process.returncode == 0 or is_one_line(errors)
                (folder.parent / "filler").unlink()
                kept = shutil.copytree(folder, self.base / "trial" / "kept" / "run")
            process = self.started(name, kept, resumed=True)
            process.communicate()
            fine = fine and process.returncode == 0 and contents(kept) == self.expected[name]
            found.append((name, None if fine else f"exit code {process.returncode}"))
        return found

    def read_only(self) -> Found | None:
        """Run each stage in a folder on a disk that nobody may write to; None where no disk can be made here."""
        found: Found = []
        for name in filter(self.before.get, WRITERS):
            with self._on_small_disk(name, 2 * bytes_below(self.before[name]) + 2**23) as folder:
                if folder is None:
                    return None
                subprocess.run(["mount", "-o", "remount,ro", str(folder.parent)], check=True)
                before, process = contents(folder), self.started(name, folder)
                _, errors = process.communicate()
                fine = process.returncode > 0 and is_one_line(errors) and contents(folder) == before
                found.append((name, None if fine else errors.strip()[-300:]))
        return found

    @contextmanager
    def _on_small_disk(self, name: str, size: int) -> Iterator[Path | None]:
        """Yield a stage's folder on a disk of its own; None where no disk can be made here."""
        folder = self.base / "trial" / "disk" / "run"
        shutil.rmtree(folder.parent.parent, ignore_errors=True)
        folder.parent.mkdir(parents=True)
        with small_disk(folder.parent, size) as made:
            yield shutil.copytree(self.before[name], folder) if made else None


def is_one_line(errors: str) -> bool:
    """Return whether a stage ended with an error of one line."""
    return errors.count("Error: ") == 1 and "Traceback" not in errors


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder but history.jsonl, which has the time of day."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "history.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def bytes_below(folder: Path) -> int:
    """Return the number of bytes of the files below a folder, which may come and go meanwhile."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found += path.stat().st_size if path.is_file() else 0
    return found


def fill_up(path: Path) -> None:
    """Write a file until its disk has no room."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a file system in memory of this size at a folder; yield False where this machine lets nobody make one."""
    if sys.platform != "linux" or os.geteuid():
        yield False
        return
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


# --- rehearsal ------------------------------------------------------------------------------------------------


@main.command()
@click.option(
    "--size", type=click.Choice(list(REHEARSALS)), default="sd3-emoji",
    help="sd3-medium: random weights with planted outliers, 4.5 GB. sd3.5-medium: random weights, 5 GB. tiny: in seconds.",
)  # fmt: skip
@click.option(
    "--keep", type=click.Path(path_type=Path, file_okay=False),
    help="Folder to keep the run in; called again, it goes on with the next stage.",
)  # fmt: skip
@output_option
def rehearsal(size: str, keep: Path | None, output: Path | None) -> None:
    """Run every stage in turn, on the device that is there."""
    road, values = REHEARSALS[size]
    lines = [shlex.join(line) for line in commands(road, "run", **values)]
    with tempfile.TemporaryDirectory(prefix="rehearsal") as temporary:
        base = keep.resolve() if keep else Path(temporary)
        base.mkdir(parents=True, exist_ok=True)
        folder, hub, noted, begun = base / "run", base / "hub", base / "rows.json", base / "begun.txt"
        rows = json.loads(noted.read_bytes()) if noted.exists() else []
        if [row["stage"] for row in rows] != lines[: len(rows)]:
            raise click.UsageError(f"{noted}: of another rehearsal; give another --keep")
        environment = os.environ | ({"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"} if size in HUB_IDS else {})
        if size in HUB_IDS:
            make = ["benchmarks/random_model.py", "--hf-home", str(hub), "--model", size, *OUTLIERS.get(size, [])]
            if not rows:
                subprocess.run([sys.executable, *make], cwd=ROOT, check=True, env=environment)
        click.echo(f"{'stage':32}{'seconds':>9}{'MLX peak':>12}{'resident':>12}{'writes':>12}")
        for row in rows:
            show(row)
        for line in lines[len(rows) :]:
            before, resumed = bytes_below(folder), begun.exists() and begun.read_text() == line
            begun.write_text(line)
            stage = [*shlex.split(line), *(again(line.split()[0]) if resumed else ())]
            command = [sys.executable, str(ROOT / "benchmarks/run_stage.py"), *stage]
            done = subprocess.run(command, cwd=base, env=environment, stdout=subprocess.PIPE, text=True, check=False)
            took = re.search(r"\[took\] ([0-9.]+) s, (\d+) bytes MLX, (\d+) bytes resident", done.stdout)
            if done.returncode or took is None:
                raise click.ClickException(f"{line}: exit code {done.returncode}")
            rows.append({"stage": line, "seconds": float(took[1]), "mlx_peak": int(took[2]), "resident_peak": int(took[3]), "bytes": bytes_below(folder) - before, "resumed": resumed})  # fmt: skip
            show(rows[-1])
            with atomic_file(noted) as file:
                file.write(json.dumps(rows).encode())
        metrics = json.loads((folder / "evaluation/metrics.json").read_bytes())["variants"]
    psnr = {name: variant["psnr"]["mean"] for name, variant in metrics.items()}
    click.echo(", ".join(f"{name} {value:.1f} dB" for name, value in psnr.items()))
    write(output, f"rehearsal-{size}", {"size": size, "rows": rows, "psnr": psnr})


def show(row: dict[str, Any]) -> None:
    """Print a stage's line of the table."""
    peaks = [format_bytes(row[key]) for key in ("mlx_peak", "resident_peak", "bytes")]
    click.echo(
        f"{row['stage'].split()[0]:32}{row['seconds']:9.1f}"
        + "".join(f"{peak:>12}" for peak in peaks)
        + "  (the rest, resumed)" * row["resumed"]
    )


if __name__ == "__main__":
    main()
