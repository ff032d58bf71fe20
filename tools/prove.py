"""What this toolkit claims, tried in one command.

python tools/prove.py reliability --kills 100       # kill -9 at random moments of every stage, damaged files, full disks, two writers
python tools/prove.py rehearsal --size sd3-emoji    # the whole road: seconds, bytes and peaks of every stage

Both write a dated JSON file (--output) that says what was tried, on which machine, and what came of it.
"""

import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibration_store.files import atomic_file
from tools.proving import Proof, bytes_below
from w4a8.cli import format_bytes, progress_bar, shortened

SD3_MEDIUM = "argmaxinc/mlx-stable-diffusion-3-medium"
AGAIN = {
    "analyze_activations.py": (),
    "export_quantized_model.py": ("--force",),
    "report_calibration.py": (),
}  # others: --resume
ROADS = {  # size -> the stages as they are rehearsed
    "sd3-emoji": (
        "generate_calibration_data.py --model sd3-emoji --num-images 8 --num-steps 20 --batch-size 4",
        "cache_adaround_data.py --num-images 8 --stride 4",
        "collect_layer_activations.py --num-images 4 --stride 4",
        "analyze_activations.py",
        "optimize_adaround.py --iters 40 --no-alpha",
        "export_quantized_model.py",
        "evaluate_quantization.py --num-images 4 --num-steps 20 --variants w4-rtn,native",
        "report_calibration.py",
    ),
    "sd3-medium": (
        f"generate_calibration_data.py --model {SD3_MEDIUM} --no-t5 --num-images 8 --num-steps 20",
        "cache_adaround_data.py --num-images 8 --stride 4",
        "collect_layer_activations.py --num-images 4 --stride 5",
        "analyze_activations.py",
        "optimize_adaround.py --iters 20 --no-alpha --unit block --end-to-end 4",
        "export_quantized_model.py",
        "evaluate_quantization.py --num-images 4 --num-steps 20 --batch-size 2 --variants w4-rtn,native",
        "report_calibration.py",
    ),
}


def machine() -> dict[str, Any]:
    """Where the proof was made."""
    device = importlib.import_module("mlx.core").device_info()
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "diffusionkit", "numpy")}
    return {
        "system": platform.platform(),
        "device": device["device_name"],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def write(output: Path | None, kind: str, content: dict[str, Any]) -> None:
    """Write the dated file."""
    path = output or ROOT / "benchmarks/results" / f"{datetime.date.today().isoformat()}-{kind}.json"
    path.write_text(
        json.dumps({"format": f"{kind.split('-')[0]}_v1", "machine": machine(), **content}, indent=1) + "\n"
    )
    click.echo(f"wrote {path}")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Try what the toolkit claims."""


output_option = click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file to write.  [default: benchmarks/results/DATE-….json]")  # fmt: skip


@main.command()
@click.option("--kills", type=click.IntRange(min=1), default=100, help="kill -9, over all stages.")
@click.option("--corruption", type=click.IntRange(min=0), help="Damaged files of the corruption campaign; 0: none.  [default: all]")  # fmt: skip
@click.option("--seed", type=int, default=0, help="Decides the moments.")
@output_option
def reliability(kills: int, corruption: int | None, seed: int, output: Path | None) -> None:
    """Kill, damage, fill up, write twice; nothing may be lost, and a resumed run has the bytes of a clean one."""
    writers, disks, read_only, campaign, interrupted = [], [], [], None, False
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
            writers, disks, read_only = proof.two_writers(), proof.full_disk(), proof.read_only()
            if corruption != 0:
                campaign = damaged_files(corruption)
        except KeyboardInterrupt:
            proof.stop()
            click.echo("interrupted; what was tried until then:", err=True)
            interrupted = True
    lost = [loss for tally in proof.tallies.values() for loss in tally.lost]
    lost += [(f"two writers, {name}", why) for name, why in writers if why]
    lost += [(f"full disk, {name}", why) for name, why in disks or () if why]
    lost += [(f"read-only folder, {name}", why) for name, why in read_only or () if why]
    lost += [("corruption campaign", line) for line in campaign["lost"] or [campaign["said"]]] if campaign and campaign["exit_code"] else []  # fmt: skip
    click.echo(f"\n{'stage':12}{'trials':>8}{'kills':>8}{'in a file':>11}{'lost':>8}")
    for name, tally in proof.tallies.items():
        click.echo(f"{name:12}{tally.trials:8}{tally.kills:8}{tally.open_files:11}{len(tally.lost):8}")
    for what, found in (
        ("two writers", writers),
        ("full disk (Linux, root)", disks),
        ("read-only folder (Linux, root)", read_only),
    ):
        click.echo(f"{what}: {shortened([name for name, _ in found]) if found else 'not tried'}")
    click.echo(f"damaged files: {campaign['said'] if campaign else 'not tried'}")
    for what, why in lost:
        click.echo(f"lost: {what}: {why} (seed {seed})", err=True)
    if interrupted and output is None:
        sys.exit(130)  # the last whole proof stays
    write(output, "reliability", {
        "seed": seed, "kills": sum(tally.kills for tally in proof.tallies.values()),
        "kills_in_a_file": sum(tally.open_files for tally in proof.tallies.values()), "lost": len(lost), "losses": lost,
        "stages": {name: {"trials": tally.trials, "kills": tally.kills, "in_a_file": tally.open_files, "lost": len(tally.lost)} for name, tally in proof.tallies.items()},
        "two_writers": dict(writers), "full_disk": dict(disks) if disks else None,
        "read_only": dict(read_only) if read_only else None, "corruption": campaign, "interrupted": interrupted,
    })  # fmt: skip
    sys.exit(130 if interrupted else 1 if lost else 0)


def damaged_files(limit: int | None) -> dict[str, Any]:
    """The corruption campaign's exit code, its last line, and one for each case that was lost."""
    command = [sys.executable, "tools/corruption_campaign.py", *([] if limit is None else ["--limit", str(limit)])]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    *lost, said = done.stdout.strip().splitlines() or [""]
    return {"exit_code": done.returncode, "said": said, "lost": lost}


@main.command()
@click.option(
    "--size",
    type=click.Choice(list(ROADS)),
    default="sd3-emoji",
    help="sd3-medium: random weights with planted outliers, 4.5 GB.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to keep the run in; called again, it goes on with the next stage.",
)
@output_option
def rehearsal(size: str, keep: Path | None, output: Path | None) -> None:
    """Every stage in turn, on whatever device is there."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with tempfile.TemporaryDirectory(prefix="rehearsal") as base:
        base = keep.resolve() if keep else Path(base)
        base.mkdir(parents=True, exist_ok=True)
        folder, hub, noted, begun = base / "run", base / "hub", base / "rows.json", base / "begun.txt"
        rows = json.loads(noted.read_bytes()) if noted.exists() else []
        if [row["stage"] for row in rows] != list(ROADS[size][: len(rows)]):
            raise click.UsageError(f"{noted}: of another rehearsal; give another --keep")
        if size == "sd3-medium":
            environment |= {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
            if not rows:
                make = [sys.executable, "benchmarks/random_model.py", "--hf-home", str(hub), "--outliers"]
                subprocess.run(make, cwd=ROOT, check=True, env=environment)
        click.echo(f"{'stage':32}{'seconds':>9}{'MLX peak':>12}{'resident':>12}{'writes':>12}")
        for row in rows:
            show(row)
        for line in ROADS[size][len(rows) :]:
            before, resumed = bytes_below(folder), begun.exists() and begun.read_text() == line
            begun.write_text(line)
            again = AGAIN.get(line.split()[0], ("--resume",)) if resumed else ()
            stage = [sys.executable, "benchmarks/run_stage.py", *line.split(), *again, "--calib-dir", str(folder)]
            done = subprocess.run(stage, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
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
    """A stage's line of the table."""
    peaks = [format_bytes(row[key]) for key in ("mlx_peak", "resident_peak", "bytes")]
    click.echo(
        f"{row['stage'].split()[0]:32}{row['seconds']:9.1f}"
        + "".join(f"{peak:>12}" for peak in peaks)
        + "  (the rest, resumed)" * row["resumed"]
    )


if __name__ == "__main__":
    main()
