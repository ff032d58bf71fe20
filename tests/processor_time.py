"""Fail tests that take long without saying so, or `make check` grows until nobody runs it: a pytest plugin.

A test without the marker `slow` may take 3 seconds of processor time in its setup, and 3 in its call: the time of this
process and of the processes that it waited for, which a busy machine hardly changes. Under -m "not slow" a longer one
fails; in any other run it is listed at the end. Fixtures that many tests share (scope session, module, …) do not count.
SLOW_MACHINE=1 switches the failures off.
"""

import os
from collections.abc import Generator, Iterator

import pytest

LIMIT = 3.0
SWITCH = "SLOW_MACHINE"
TOO_LONG = "takes too long"


def processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


class ProcessorTime:
    """Measure every test of a session."""

    def __init__(self, fails: bool):
        self._fails, self._shared = fails, 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Generator[None, object, object]:
        """Note what shared fixtures take."""
        start, before = processor_seconds(), self._shared
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self._shared = before + processor_seconds() - start

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        return (yield from self._limited(item, "setup"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        return (yield from self._limited(item, "call"))

    def _limited(self, item: pytest.Item, phase: str) -> Generator[None, object, object]:
        start, self._shared = processor_seconds(), 0.0
        result = yield
        seconds = processor_seconds() - start - self._shared
        if seconds > LIMIT and item.get_closest_marker("slow") is None:
            what = f"its {phase} takes {seconds:.1f} s of processor time, more than {LIMIT:g}"
            item.user_properties.append((TOO_LONG, what))
            if self._fails:
                pytest.fail(
                    f"{what}: mark it with @pytest.mark.slow, or set {SWITCH}=1 on a slow machine", pytrace=False
                )
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List the tests that must be marked; the process that prints has the reports of all workers."""
        found = sorted(set(too_long(terminalreporter)))
        if found:
            terminalreporter.section("tests to mark with @pytest.mark.slow")
            for line in found:
                terminalreporter.write_line(line)


def too_long(terminalreporter: pytest.TerminalReporter) -> Iterator[str]:
    """Yield a line for every test that takes too long."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, what in getattr(report, "user_properties", ()):
                if name == TOO_LONG:
                    yield f"{report.nodeid}: {what}"


def pytest_configure(config: pytest.Config) -> None:
    quick = config.option.markexpr == "not slow"
    config.pluginmanager.register(ProcessorTime(fails=quick and not os.environ.get(SWITCH)))
