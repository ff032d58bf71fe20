"""Progress bars, in a terminal and in a log."""

import functools
import sys
import time
from collections import deque
from typing import Any, Protocol

import click
from tqdm import tqdm

from w4a8.backend.words import format_seconds

LOG_SECONDS = 10.0
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{to_go}, {rate_fmt}{postfix}]"
RATE_SECONDS = 60.0  # the time to go follows the rate of so many seconds, since phases and neighbours change it


def progress_bar(
    total: int, description: str, unit: str, initial: int = 0, leave: bool = True
) -> "Bar | ProgressLines":
    """Return a tqdm bar with rate and time to go; in a log file whole lines, and none for a bar that would not stay."""
    if not sys.stderr.isatty():
        return ProgressLines(total, description, unit, initial, LOG_SECONDS if leave else None)
    options: dict[str, Any] = {"leave": leave, "dynamic_ncols": True, "bar_format": BAR_FORMAT}
    return Bar(total=total, desc=description, unit=unit, initial=initial, **options)


class LastMinute:
    """The seconds that one count took over the last minute of a phase.

    They leave out a phase's first update, which compiles kernels.
    """

    def __init__(self) -> None:
        self._done, self._fresh = 0.0, True
        self._marks = deque([(time.monotonic(), 0.0)])  # (time, count) of about every second of the last minute

    def begin_phase(self) -> None:
        """Forget the rate at the next update."""
        self._fresh = True

    def add(self, count: float) -> None:
        """Note that so many more are done."""
        self._done += count
        now = time.monotonic()
        if self._fresh:
            self._marks, self._fresh = deque([(now, self._done)]), count == 0
        elif now - self._marks[-1][0] >= 1:
            self._marks.append((now, self._done))
            while len(self._marks) > 2 and now - self._marks[1][0] > RATE_SECONDS:
                self._marks.popleft()

    def seconds(self, now: float) -> float | None:
        """Return the seconds of one count until now, None before the second update of a phase."""
        since, counted = self._marks[0]
        unknown = self._fresh or self._done <= counted or now <= since
        return None if unknown else (now - since) / (self._done - counted)


class Bar(tqdm):
    """A bar whose rate leaves out the first update, since kernels are compiled for it; the time that it took stays."""

    _compiled = False
    _later = 0.0

    def begin_phase(self, later: float) -> None:
        """Begin a phase as ProgressBar.begin_phase says."""
        self._later = later
        self._recent.begin_phase()

    @functools.cached_property
    def _recent(self) -> LastMinute:
        return LastMinute()

    @property
    def format_dict(self) -> Any:
        """The values of a line: tqdm's, and `to_go`."""
        values = super().format_dict
        left = max(0, (values["total"] or 0) - values["n"] + self._later)
        each = self._recent.seconds(time.monotonic()) if left else 0.0
        return values | {"to_go": "?" if each is None else self.format_interval(left * each)}

    def update(self, n: float | None = 1) -> bool | None:
        """Advance by this count."""
        self._recent.add(n or 0)
        if self._compiled or self.n + (n or 0) >= (self.total or 0):
            return super().update(n)
        self._compiled = True
        self.n += n or 0
        self.initial, self.last_print_n, self.last_print_t = self.n, self.n, self._time()
        return self.refresh()


def say_aside(bar: "ProgressBar", sentence: str) -> None:
    """Print a sentence above a bar, or between its lines in a log."""
    if isinstance(bar, tqdm):
        bar.write(sentence, file=sys.stderr)
    else:
        click.echo(sentence, err=True)


class ProgressBar(Protocol):
    """The part of tqdm that stages use."""

    n: int
    total: int

    def update(self, count: int = 1) -> Any:
        """Advance by this count."""

    def begin_phase(self, later: float) -> None:
        """Begin a phase whose counts take a time of their own.

        later: the extra time of later phases, whose counts take longer, in counts of this phase.
        """

    def set_description(self, description: str) -> Any:
        """Set the text in front."""

    def set_postfix(self, **values: Any) -> Any:
        """Set the values behind."""

    def close(self) -> None:
        """End the bar."""


class ProgressLines:
    """A progress bar for a log file, used as tqdm is: a line at most every `interval` seconds and one at the end.

    The rate is that of the last minute, in the last line that of the whole time. It counts only what `update` was given:
    `initial`, and values assigned to `n`, took no time. A phase's first update is left out, since kernels are compiled for it.
    """

    def __init__(self, total: int, description: str, unit: str, initial: int = 0, interval: float | None = LOG_SECONDS):
        """Start at `initial` of `total`; an interval of None prints nothing."""
        self.total, self.description, self.unit, self.n = total, description, unit, initial
        self.interval = interval
        self._done, self._later, self._postfix, self._closed = 0, 0.0, "", False
        self._begin = self._printed = time.monotonic()
        self._recent = LastMinute()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Advance by this count."""
        self.n += count
        self._done += count
        self._recent.add(count)
        if self.interval is not None and time.monotonic() - self._printed >= self.interval:
            self._print()

    def begin_phase(self, later: float) -> None:
        """Begin a phase as ProgressBar.begin_phase says."""
        self._later = later
        self._recent.begin_phase()

    def set_description(self, description: str, refresh: bool = True) -> None:
        """Set the text in front of later lines."""
        self.description = description

    def set_postfix(self, refresh: bool = True, **values: object) -> None:
        """Set the values behind later lines."""
        self._postfix = "".join(f", {name}={value}" for name, value in values.items())

    def close(self) -> None:
        """Print the last line, once."""
        if self.interval is not None and not self._closed:
            self._print()
        self._closed = True

    def _print(self) -> None:
        self._printed = time.monotonic()
        spent = self._printed - self._begin
        percent = 100 * self.n // self.total if self.total else 100
        parts = [f"{self.description} {self.n}/{self.total} ({percent}%)", format_seconds(spent)]
        each = self._recent.seconds(self._printed)
        if self.n >= self.total:  # the mean of the whole time
            each = spent / self._done if self._done and spent else None
        if each is not None:
            if self.n < self.total:
                parts.append(f"{format_seconds(each * (self.total - self.n + self._later))} to go")
            parts.append(f"{each:.1f} s/{self.unit}" if each >= 1 else f"{1 / each:.1f} {self.unit}/s")
        click.echo(", ".join(parts) + self._postfix, err=True)
