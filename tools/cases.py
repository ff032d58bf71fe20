"""What a case of tools/corruption_campaign.py is: a file, a way to damage it, and the stage that is given it."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple


class Mutation(NamedTuple):
    """A change of a file: what it is, and the function that writes it over `path`."""

    name: str
    apply: Callable[[Path], None]


class Target(NamedTuple):
    """A file below `base` (run, half or model), and the stage that must not believe it when it is damaged.

    resume: the stage may also make the file anew; then `result` (default: the file) must be that of the clean run.
    expects: what is right. A refusal is one line and a non-zero exit code; with "untouched" every file must be as it was,
    too. "success" is for what means nothing to the stage, such as a member that it does not know.
    surroundings: what is unusual about the process, a key of SURROUNDINGS in tools/corruption_campaign.py.
    """

    base: str
    file: str
    command: tuple[str, ...]
    resume: bool = False
    result: str | None = None
    without: tuple[str, ...] = ()
    expects: Literal["refusal", "untouched", "success"] = "refusal"
    surroundings: str | None = None


class Case(NamedTuple):
    """One damaged file and one stage."""

    target: Target
    mutation: Mutation

    def __str__(self) -> str:
        how = "--resume" if self.target.resume else "reads it"
        how += "" if self.target.expects == "refusal" else f", {self.target.expects} expected"
        return f"{self.target.base}/{self.target.file} [{self.mutation.name}] {self.target.command[0]} {how}"
