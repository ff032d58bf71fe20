"""Drive a page in headless Chromium through the DevTools protocol, over two pipes; no driver has to be installed."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--allow-file-access-from-files", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """A running Chromium.

    Chromium reads commands from its descriptor 3, and writes answers and events to its descriptor 4. Each ends with a
    zero byte.
    """

    def __init__(self, program: str, environment: dict[str, str], profile: str):
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._pending, self._last, self.events = b"", 0, []

        def as_3_and_4() -> None:
            high = os.dup2(theirs_in, 1000), os.dup2(theirs_out, 1001)
            os.dup2(high[0], 3), os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}"], env=environment, preexec_fn=as_3_and_4, pass_fds=(3, 4),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in), os.close(theirs_out)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; `events` keeps the events that come before the result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._last:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def wait_for(self, event: str, session: str) -> None:
        """Read events until one with this name has come."""
        while not any(found["method"] == event and found.get("sessionId") == session for found in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            some = os.read(self._in, 1 << 20)
            assert some, "the browser has ended"
            self._pending += some
        message, _, self._pending = self._pending.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False) -> "Page":
        """Open a file in a tab of its own; a window narrower than 600 pixels is a phone's."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable", session)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            session,
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", session, features=theme)
        self.call("Page.navigate", session, url=path.resolve().as_uri())
        self.wait_for("Page.loadEventFired", session)
        return Page(self, session)

    def close(self) -> None:
        """End the browser and close the pipes."""
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        self._process.wait(10)
        os.close(self._in), os.close(self._out)


class Page:
    """A tab that shows a page."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session

    def run(self, script: str) -> Any:
        """Run `script`, the body of an async function, in the page; return the value that the function returns."""
        found = self._browser.call(
            "Runtime.evaluate",
            self._session,
            expression=f"(async () => {{ {script} }})()",
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    @property
    def faults(self) -> list[str]:
        """Return uncaught exceptions, errors in the console, and resources that were not there."""
        self.run("return 0;")  # the browser reports everything that happened before
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(event["params"]["exceptionDetails"]["text"])
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"])
        return found

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        found = self._browser.call("Page.captureScreenshot", self._session, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def running(program: str, environment: dict[str, str]) -> Iterator[Browser]:
    """Start a browser; close it and remove its profile when the block ends."""
    profile = tempfile.mkdtemp()
    browser = Browser(program, environment, profile)
    try:
        yield browser
    finally:
        browser.close()
        shutil.rmtree(profile, ignore_errors=True)
