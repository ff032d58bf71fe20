"""What `tools/prove.py reliability` tries: stages killed at random moments, two writers, a folder that cannot be written, a full disk."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = {  # name -> script, options; in the order of the road, each on what the ones before left
    "1": "generate_calibration_data.py --model sd3-emoji --num-images 6 --num-steps 6 --batch-size 2",
    "2A": "collect_layer_activations.py --num-images 6 --stride 1",
    "3A": "analyze_activations.py",
    "2W": "cache_adaround_data.py --num-images 6 --stride 1",
    "3W": "optimize_adaround.py --iters 12 --batch-size 4 --checkpoint-seconds 0.3",
    "5": "export_quantized_model.py",
    "4": "evaluate_quantization.py --num-images 2 --num-steps 3 --batch-size 2 --variants w4-rtn,native",
}
BLOCKS = "3W blocks"  # another way, on what 2W left
STAGES[BLOCKS] = (
    "optimize_adaround.py --iters 10 --batch-size 4 --unit block --end-to-end 4 --checkpoint-seconds 0.3"
)
KILLED = [name for name in STAGES if name != "3A"]
WRITERS = ("1", "2A", "2W", "3W")  # stages that write for a while
MARKER = "a file is open"  # beside the run
WITHOUT_RESUME = ("3A", "5")


@dataclass
class Tally:
    """What was tried of a stage, and what was lost: (trial, why)."""

    kills: int = 0
    open_files: int = 0  # number of kills that came while a file was half written
    trials: int = 0
    lost: list[tuple[str, str]] = field(default_factory=list)


def command(name: str, folder: Path, again: bool = False) -> list[str]:
    """A stage's command line; again: as somebody goes on after an interruption."""
    script, *options = STAGES[name].split()
    if again and name not in WITHOUT_RESUME:
        options.append("--resume")
    elif again and name == "5":
        options.append("--force")
    return [sys.executable, str(ROOT / script), *options, "--calib-dir", str(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Proof:
    """Clean runs of every stage, and what each must leave."""

    def __init__(self, base: Path, seed: int):
        self.base, self.random, self.tallies = base, random.Random(seed), {name: Tally() for name in KILLED}
        self.before: dict[str, Path] = {}
        self.expected: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        self.processes: list[subprocess.Popen] = []

    def started(self, name: str, folder: Path, again: bool = False, pause: float | None = None) -> subprocess.Popen:
        """Start a stage; pause: seconds after which its next write stops in the middle (tools/pausing.py)."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        }
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        line = command(name, folder, again)
        if pause is not None:
            line[1:1] = [str(ROOT / "tools/pausing.py"), str(pause), str(folder.parent / MARKER)]
        self.processes.append(subprocess.Popen(line, cwd=folder.parent, env=environment, **options))
        return self.processes[-1]

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def prepare(self) -> Iterator[str]:
        """Run every stage once, cleanly; yields the name of each."""
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
        """Kill a stage up to three times, then let it end; returns how many kills hit it.

        Every other kill comes at a random moment, the others while a file is open that is half written.
        """
        tally, folder = self.tallies[name], self.base / "trial" / "run"
        self._fresh(name, folder)
        kills, tally.trials = 0, tally.trials + 1
        for attempt in range(self.random.randint(1, 3)):
            moment, in_a_file = self.random.uniform(0.2, 1.1 * self.seconds[name]), self.random.random() < 0.5
            process = self.started(name, folder, again=attempt > 0, pause=moment if in_a_file else None)
            marker = folder.parent / MARKER
            marker.unlink(missing_ok=True)
            while process.poll() is None and not marker.exists() and (in_a_file or moment > 0):
                time.sleep(0.01)
                moment -= 0.01
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
                tally.open_files += in_a_file
            process.communicate()
        process = self.started(name, folder, again=True)
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

    def two_writers(self) -> list[tuple[str, str | None]]:
        """Each stage twice at once in one folder: (name, what was lost or None)."""
        found = []
        for name in filter(self.before.get, WRITERS):
            folder = self.base / "trial" / "run"
            self._fresh(name, folder)
            both = [self.started(name, folder), self.started(name, folder)]
            errors = [process.communicate()[1] for process in both]
            codes = [process.returncode for process in both]
            refused = [text for text, code in zip(errors, codes, strict=True) if code]
            fine = (
                sorted(map(bool, codes)) == [False, True]
                and refused[0].count("Error: ") == 1
                and "Traceback" not in refused[0]
            )
            fine = fine and contents(folder) == self.expected[name]
            found.append((name, None if fine else f"exit codes {codes}"))
        return found

    def full_disk(self) -> list[tuple[str, str | None]] | None:
        """Each stage on a disk that is full on the way, then resumed with room; None where no disk can be made here."""
        found = []
        for name in filter(self.before.get, WRITERS):
            folder = self.base / "trial" / "disk" / "run"
            shutil.rmtree(folder.parent.parent, ignore_errors=True)
            folder.parent.mkdir(parents=True)
            start = bytes_below(self.before[name])
            grown = sum(map(len, self.expected[name].values())) - start
            with small_disk(folder.parent, start + 4 * grown + 2**23) as made:
                if not made:
                    return None
                shutil.copytree(self.before[name], folder)
                process = self.started(name, folder)
                while process.poll() is None and bytes_below(folder) < start + grown // 4:
                    time.sleep(0.005)
                fill_up(folder.parent / "filler")
                _, errors = process.communicate()
                fine = process.returncode == 0 or (errors.count("Error: ") == 1 and "Traceback" not in errors)
                (folder.parent / "filler").unlink()
                kept = shutil.copytree(folder, self.base / "trial" / "kept" / "run")
            process = self.started(name, kept, again=True)
            process.communicate()
            fine = fine and process.returncode == 0 and contents(kept) == self.expected[name]
            found.append((name, None if fine else f"exit code {process.returncode}"))
        return found

    def read_only(self) -> list[tuple[str, str | None]] | None:
        """Each stage in a folder on a disk that nobody may write to; None where no disk can be made here."""
        found = []
        for name in filter(self.before.get, WRITERS):
            folder = self.base / "trial" / "disk" / "run"
            shutil.rmtree(folder.parent.parent, ignore_errors=True)
            folder.parent.mkdir(parents=True)
            with small_disk(folder.parent, 2 * bytes_below(self.before[name]) + 2**23) as made:
                if not made:
                    return None
                shutil.copytree(self.before[name], folder)
                subprocess.run(["mount", "-o", "remount,ro", str(folder.parent)], check=True)
                before, process = contents(folder), self.started(name, folder)
                _, errors = process.communicate()
                fine = process.returncode > 0 and errors.count("Error: ") == 1 and "Traceback" not in errors
                found.append((name, None if fine and contents(folder) == before else errors.strip()[-300:]))
        return found


def bytes_below(folder: Path) -> int:
    """Of the files below a folder, which may come and go meanwhile."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found += path.stat().st_size
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
    """A file system in memory of this size at a folder; False where this machine lets nobody make one."""
    if sys.platform != "linux" or os.geteuid():
        yield False
        return
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)
