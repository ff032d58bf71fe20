"""The life of a stage in its folder: lock it, check its files, begin or go on, work, finish."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from calibration_store.errors import StoreError
from calibration_store.files import TEMP_SUFFIX, atomic_file, locked_folder, remove_file
from calibration_store.schema import JsonFormat
from calibration_store.version import keep_version

_Item = TypeVar("_Item")
_Written = TypeVar("_Written")


class StagePaths(Protocol):
    """The paths of a stage (calibration_store/layout.py)."""

    @property
    def root(self) -> Path: ...

    def owned_files(self) -> list[Path]: ...


class Processes(Protocol):
    """The processes that share a folder: rank 0 creates it, notes the plan and finishes; the others wait for rank 0."""

    rank: int

    def barrier(self) -> None: ...


@dataclass(frozen=True)
class StageFolder:
    """A stage's folder under `--resume`, `--force`, or neither.

    record: the JSON file with the plan of the run in the folder. format: its format; read: a function that reads it.
    options: for each key of the plan that a run cannot change when it goes on, the flag that sets it.

        with folder.held(dry_run):
            folder.check(plan)
            todo = folder.todo(items, is_done)
            folder.begin(plan)
            ...
            folder.finish(write_metadata)
    """

    paths: StagePaths
    record: Path
    format: JsonFormat
    read: Callable[[Path], dict[str, Any]]
    options: Mapping[str, str]
    resume: bool = False
    force: bool = False
    ranks: Processes | None = None  # None: one process alone
    what: str = "files"  # word for the folder's files in messages

    @contextlib.contextmanager
    def held(self, dry_run: bool = False) -> Iterator[None]:
        """Lock the folder against every other run until the block ends.

        A dry run and the ranks above 0 lock nothing. Raises StoreError when another process has locked the
        folder, or the folder cannot be written.
        """
        with contextlib.nullcontext() if dry_run or not self._is_first else locked_folder(self.paths.root):
            yield

    def before(self, **options: Any) -> dict[str, Any] | None:
        """Return the plan that --resume goes on with, or None where there is none with these options.

        Raises StoreError for a damaged plan.
        """
        if not self.resume or not self.record.exists():
            return None
        before = self.read(self.record)
        return before if all(before[key] == value for key, value in options.items()) else None

    def refuse_used(self) -> None:
        """Raise StoreError when the folder is used and neither --resume nor --force is given."""
        if self._is_used() and not (self.resume or self.force):
            raise StoreError(
                f"{self.paths.root} holds a run already: --resume goes on with it, --force starts over, "
                "or use another --calib-dir"
            )

    def check(self, plan: dict[str, Any], may_change: Sequence[str] = ()) -> dict[str, Any] | None:
        """Check that the run may begin, go on or start over here, and return the plan that it goes on with, or None.

        Nothing is written; a plan that goes on gets the version that its run was begun with. may_change: keys of the plan that need not be as they were. Raises StoreError when the
        folder is used and neither flag is given, or when --resume would mix two runs, and OptionError for a plan that
        no file can hold.
        """
        self.format.encode(plan)
        self.refuse_used()
        if not self._is_used() or self.force:
            return None
        if not self.record.exists():
            raise StoreError(f"{self.paths.root}: {self.what} without {self.record.name}; use --force to start over")
        before = self.read(self.record)
        for key, flag in self.options.items():
            earlier = _plain(before.get(key))
            if key not in may_change and earlier != _plain(plan.get(key)):
                raise StoreError(
                    f"--resume: the run in {self.paths.root} has {flag} {shown(earlier)}, not {shown(plan.get(key))}; "
                    "give the same value, use --force to start over, or another --calib-dir"
                )
        if before.get("calibration_run") != plan.get("calibration_run"):
            raise StoreError(f"--resume: {self.paths.root} was made from another calibration run; use --force")
        keep_version(plan, before)
        return before

    def todo(self, items: Iterable[_Item], is_done: Callable[[_Item], bool]) -> list[_Item]:
        """Return the items that are left to do: all with --force, else those that are not done."""
        return [item for item in items if self.force or not is_done(item)]

    def discards(self) -> bool:
        """Return whether `begin` removes what an earlier run finished. Check all inputs before, so that nothing is lost."""
        return self.force and self._is_used()

    def begin(self, plan: Mapping[str, Any], anew: bool = False) -> None:
        """Remove half-written files, or with --force all files of an earlier run, and write the plan, after `check`.

        anew: write the plan also where one exists. An earlier run's files go when the new plan is on the disk. Raises
        WriteError.
        """
        self._barrier()  # until every rank has looked at the files that are removed here
        if self._is_first:
            owned = self.paths.owned_files()
            if anew or self.force or not self.record.exists():
                with atomic_file(self.record) as file:
                    file.write(self.format.encode(plan))
                    file.flush()
                    os.fsync(file.fileno())
                    clear_files(owned, self.record, self.force)
            else:
                clear_files(owned, self.record, everything=False)
        self._barrier()

    def finish(self, write: Callable[[], _Written]) -> _Written | None:
        """Call `write` on rank 0, once every rank's items are on the disk; its file says that the stage is complete.

        Returns its result on rank 0, None on the other ranks.
        """
        self._barrier()
        return write() if self._is_first else None

    @property
    def _is_first(self) -> bool:
        return self.ranks is None or self.ranks.rank == 0

    def _barrier(self) -> None:
        if self.ranks is not None:
            self.ranks.barrier()

    def _is_used(self) -> bool:
        return any(path.suffix != TEMP_SUFFIX for path in self.paths.owned_files())


def _plain(value: Any) -> Any:
    """Return a value as JSON returns it: a tuple becomes a list."""
    return list(value) if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    """Return a value as text for a message; the empty string gets quotes."""
    return repr(value) if value == "" else str(value)


def clear_files(owned: Sequence[Path], first: Path, everything: bool) -> None:
    """Remove a stage's temporary files, or all of its files, `first` before the others: without it they are no run."""
    for path in sorted(owned, key=lambda path: path != first):
        if everything or path.suffix == TEMP_SUFFIX:
            remove_file(path)
