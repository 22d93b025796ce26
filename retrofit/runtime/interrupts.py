"""Ctrl-C and SIGTERM that are neither lost nor raised where they kill the process.

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

_came: list[int] = []  # signals that ask to stop
_cleaning = threading.Event()
ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


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
    _came.clear()
    signal.signal(signal.SIGINT, _stop)
    ends = [number for number in ENDS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ends:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        for number in ends:
            signal.signal(number, signal.SIG_DFL)
        _came.clear()


@contextmanager
def shielded() -> Iterator[None]:
    """Finish the block, which cleans up after an interruption, whatever else is pressed."""
    _cleaning.set()
    try:
        yield
    finally:
        _cleaning.clear()


def raise_if_interrupted() -> None:
    """Stop if Ctrl-C was pressed, or an end asked for, and that got lost on the way.

    Within `shielded` it waits for the end of the block.

    Raises:
        KeyboardInterrupt: If Ctrl-C was pressed.
        SystemExit: If an end was asked for, with the shell's code for the signal.
    """
    if _came and not _cleaning.is_set():
        raise _leave(_came[0])


def _leave(number: int) -> BaseException:
    """What unwinds the process, cleaning up."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def _stop(number: int, frame: FrameType | None) -> None:
    _came.append(number)
    if _cleaning.is_set():
        return
    if not _is_importing(frame):
        raise _leave(number)
    again = threading.Timer(RETRY, _send_again, (number,))
    again.daemon = True
    again.start()


def _send_again(number: int) -> None:
    if _came:  # the block that was watched may be over
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORT):
            return True
        frame = frame.f_back
    return False
