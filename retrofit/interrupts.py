"""Ctrl-C that is neither lost nor raised where it kills the process.

Python raises it wherever the program stands. Inside an import that runs from a library's compiled
code this aborts the process (PyTorch's own import does), and a library that swallows exceptions
swallows it too. So the command line holds it back while something is imported, and whoever is
about to publish a result asks first whether it was ever pressed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RETRY = 0.1  # seconds
IMPORT = "<frozen importlib"

_pressed = threading.Event()


@contextmanager
def watched() -> Iterator[None]:
    """Handle Ctrl-C in this way while the block runs; does nothing outside the main thread.

    A process that was started with Ctrl-C ignored, as by `nohup` or a shell's `&`, stays so.
    """
    usual = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or usual is not signal.default_int_handler:
        yield
        return
    _pressed.clear()
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        _pressed.clear()


def raise_if_interrupted() -> None:
    """Stop if Ctrl-C was pressed and got lost on the way.

    Raises:
        KeyboardInterrupt: If it was.
    """
    if _pressed.is_set():
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _pressed.set()
    if not _is_importing(frame):
        raise KeyboardInterrupt
    again = threading.Timer(RETRY, _press_again)
    again.daemon = True
    again.start()


def _press_again() -> None:
    if _pressed.is_set():  # the block that was watched may be over
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORT):
            return True
        frame = frame.f_back
    return False
