"""Draw what run_all.py measured: every figure that has a bound, as a share of it.

python benchmarks/draw.py --output benchmarks.png
"""

import sys
from pathlib import Path

import click
import orjson

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibration_store.errors import StoreError
from w4a8.cli import stage_command


@stage_command
@click.option(
    "--input", "source", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "benchmarks/results/latest.json",
    help="JSON of run_all.py.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default="benchmarks.png", help="PNG to write."
)
def main(source: Path, output: Path) -> None:
    """Draw the figures of run_all.py beside their bounds."""
    from matplotlib import pyplot

    from w4a8.report.figures import save_figure

    if not source.exists():
        raise StoreError(f"{source}: not found; run python benchmarks/run_all.py first")
    content = orjson.loads(source.read_bytes())
    rows = [row for row in content["figures"] if row["bound"] is not None][::-1]
    shares = [row["value"] / row["bound"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.32 * len(rows)), layout="constrained")
    bars = axes.barh([row["name"] for row in rows], shares, color=["tab:blue" if s <= 1 else "tab:red" for s in shares])
    axes.bar_label(
        bars,
        [f"{row['value']:.3g} {row['unit']} (bound {row['bound']:g})" for row in rows],
        padding=4,
        fontsize=8,
        bbox={"color": "white", "pad": 1},
    )
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.set(
        xlim=(0, max(1.6, 1.5 * max(shares))),
        xlabel="share of the bound (left of the line is good)",
        title=content["machine"],
    )
    axes.title.set_fontsize(9)
    save_figure(figure, output)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
