"""Lines on stderr for what the package logs: its own at once, those of the libraries at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from retrofit.commands.console import say

LIBRARIES = "retrofit.libraries"


class _Shown(logging.Handler):
    """Says every line once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: set[str] = set()
        self.waiting: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if record.name == LIBRARIES:
            self.waiting[text] = None
        elif text not in self.said:
            self.said.add(text)
            say(text)


@contextmanager
def showing_notes() -> Iterator[None]:
    """Show what the package warns of while entered."""
    logger = logging.getLogger("retrofit")
    shown = _Shown()
    logger.addHandler(shown)
    try:
        yield
    finally:
        logger.removeHandler(shown)
        for text in shown.waiting:
            say(f"warning from {text}")
