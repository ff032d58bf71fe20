"""Write the option lists at the end of docs/stages.md: what every script's --help prints.

python tools/option_lists.py            # tests/test_docs.py says when they are old
"""

import importlib
from pathlib import Path

import click

from w4a8.cli import stage_command
from w4a8.cli.stages import STAGE_HELP

PAGE = Path(__file__).resolve().parent.parent / "docs" / "stages.md"
BEGIN = "## Every option\n"
WIDTH = 100


def option_lists() -> str:
    """Return the section: a heading and the help of every script, in the order of the road."""
    parts = [BEGIN, "The lists are what `--help` prints; `python tools/option_lists.py` writes them.\n"]
    for script in STAGE_HELP:
        command = importlib.import_module(Path(script).stem).main
        with click.Context(
            command, info_name=script, terminal_width=WIDTH, max_content_width=WIDTH, **command.context_settings
        ) as context:
            parts += [f"### {script}\n", "```", command.get_help(context), "```\n"]
    return "\n".join(parts)


@stage_command
def main() -> None:
    """Write the option lists at the end of docs/stages.md."""
    before = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0].rstrip("\n")
    PAGE.write_text(f"{before}\n\n{option_lists()}", encoding="utf-8")
    click.echo(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
