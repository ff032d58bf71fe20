"""Ctrl-C: the first one interrupts, or waits for work that must be finished; the second one ends the process."""

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn


@contextlib.contextmanager
def ctrl_c_handled() -> Iterator[None]:
    """Use CtrlC in place of Python's own handler; leave other handlers, and `nohup`'s SIG_IGN, as they are.

    After an interrupt the handler stays: the process is about to end, and a second Ctrl-C may come until it has.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    handler = CtrlC()
    signal.signal(signal.SIGINT, handler)
    atexit.unregister(ignore_ctrl_c)
    atexit.register(ignore_ctrl_c)
    try:
        yield
    finally:
        if not handler.interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class CtrlC:
    """The handler of SIGINT: the first one raises KeyboardInterrupt, the next one ends the process at once.

    While a module is imported, the first one ends the process, too, since imports lose exceptions: NumPy calls its
    installation broken, or crashes. In a block of `finishing` the first one is only noted.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self.finishing: str | None = None  # the work that must be finished, in words

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, or end the process, or note the interrupt, as the class says."""
        if self.interrupted:
            end_process("Interrupted again: ended at once.")
        if importing(frame):
            end_process("Interrupted.")
        self.interrupted = True
        if self.finishing is None:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):
            os.write(2, f"\nfinishing {self.finishing}; Ctrl-C again ends at once\n".encode())


@contextlib.contextmanager
def finishing(what: str) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C wait in the block, whose end then raises KeyboardInterrupt.

    what: a name of the work. The block is given a function that returns whether Ctrl-C came, so that it can save its
    state and raise KeyboardInterrupt itself.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not isinstance(handler, CtrlC):
        yield lambda: False
        return
    handler.finishing = what
    try:
        yield lambda: handler.interrupted
    finally:
        handler.finishing = None
    if handler.interrupted:
        raise KeyboardInterrupt


def importing(frame: FrameType | None) -> bool:
    """Return whether `frame` runs below an import statement."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def end_process(message: str) -> NoReturn:
    """Print one line, and end the process with exit code 130 at once.

    Files are written atomically, so that none is left half.
    """
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        start = "\n" if os.isatty(2) else ""  # below a progress bar
        os.write(2, f"{start}{message}\n".encode())
    os._exit(130)


def ignore_ctrl_c() -> None:
    """Ignore Ctrl-C at exit, where Python would print an error from its own teardown."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
