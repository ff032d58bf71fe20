"""Ctrl-C: the first one interrupts, or waits for what must be finished; the second one ends the process at once."""

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
    """Use CtrlC in place of Python's own handler; one that somebody else set, and `nohup`'s SIG_IGN, are left alone.

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
    """The handler of SIGINT: the first one raises KeyboardInterrupt, the next ends the process at once.

    The first one, too, while a module is imported, for imports lose exceptions: NumPy calls its installation broken, or
    crashes. While something is being finished (`finishing`) the first one is only noted.
    """

    def __init__(self):
        self.interrupted, self.finishing = False, None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
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
    """Let Ctrl-C wait in the block, whose end raises KeyboardInterrupt then.

    Yields a function that says whether it came: who asks saves, and raises KeyboardInterrupt at once.
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
    """Whether `frame` runs below an import statement."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def end_process(message: str) -> NoReturn:
    """Leave with one line and exit code 130, whatever is going on. Files are written atomically: none is left half."""
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        os.write(2, f"\n{message}\n".encode() if os.isatty(2) else f"{message}\n".encode())  # below a progress bar
    os._exit(130)


def ignore_ctrl_c() -> None:
    """At exit: all is said and done, and Python would print what an interrupt breaks while it takes itself apart."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
