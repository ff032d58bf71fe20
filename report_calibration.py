"""A page of everything that a calibration folder holds: report/index.html, to look at and to send.

Reads   whatever there is below --calib-dir: manifest and images, configs, losses, metrics and variants' images, the export.
Writes  report/index.html, one file with images and figures inside; no network, light and dark.

python report_calibration.py
"""

from w4a8 import cli  # isort: skip  (first: it says what to do where packages are missing)

import click

from w4a8.options import ReportOptions


@cli.stage(ReportOptions)
@cli.calib_dir_option
@click.option(
    "--output",
    type=cli.FOLDER,
    help="Folder to write to.  [default: report/ below --calib-dir]",
)
@click.option("--force", is_flag=True, help="Write over an index.html that is not this script's.")
@click.option("--dry-run", is_flag=True, help="Say what the page would hold; write nothing.")
def main(options: ReportOptions) -> None:
    """One page of the run: ranges, training, original against quantized."""
    run(options)


def run(options: ReportOptions) -> None:
    """Read what is there, write the page, say what it holds and what would be next."""
    from calibration_store.files import locked_folder
    from calibration_store.layout import ReportPaths
    from w4a8.report.page import SECTIONS, describe_folder, refuse_foreign_page, write_page

    paths = ReportPaths(options.output or options.calib_dir / "report")
    if not options.force:
        refuse_foreign_page(paths)
    page = describe_folder(options.calib_dir)
    held = [title for key, title in SECTIONS.items() if key in page]
    click.echo(f"the page holds: {', '.join(held)}")
    for step in page["next"]:
        click.echo(f"{step['why']}: {step['what']} ({', then '.join(step['commands'])})")
    if "comparison" in page and page["comparison"]["shown"] < page["comparison"]["all"]:
        comparison = page["comparison"]
        click.echo(f"{comparison['shown']} of {comparison['all']} pairs of images are in it, the most damaged first")
    if options.dry_run:
        return
    with locked_folder(paths.root):
        paths.clear_temporaries()
        size = write_page(paths, page)
    click.echo(f"wrote {paths.page} ({cli.format_bytes(size)}); open it in a browser")


if __name__ == "__main__":
    main()
