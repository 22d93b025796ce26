"""Collect what the libraries warn of, instead of showing it as it comes or losing it.

A message that is known is dropped where retrofit says the same itself, or refused. Every other one
goes to the logger "retrofit.libraries", whose lines the command line shows once, at the end.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from retrofit.runtime.errors import CheckpointError

logger = logging.getLogger("retrofit.libraries")
COLLECTED = ("diffusers", "transformers", "peft", "accelerate")
FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

# said elsewhere, with the reason
SAID = {
    "was truncated because": "sampling.unread names the words",
    "Token indices sequence length is longer": "sampling.unread names the words",
    "LOAD REPORT": "accounting names every tensor",
    "Some weights of": "accounting names every tensor",
    "You should probably TRAIN": "accounting names every tensor",
    "requires torchvision": "only the speed of reading pictures changes",
    "You have disabled the safety checker": "the checkpoint has none",
    "should be kept in float32: []": "nothing is to be kept",
    "No LoRA keys associated to": "sampling.adapters says which tensors are unused",
}
# means that a part of what was asked for is not in the network
REFUSED = {
    r"led to (unexpected|missing) keys": "weights of an adapter were left out",
    r"not compatible in Diffusers": "weights of an adapter were left out",
}


class Collector(logging.Handler):
    """Takes records in the place of a library's own handlers."""

    def __init__(self) -> None:
        """Nothing is collected yet."""
        super().__init__(logging.WARNING)
        self.messages: dict[tuple[str, str], None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.add(record.name.split(".")[0], record.getMessage())

    def add(self, library: str, text: str) -> None:
        """Keep a message, once."""
        self.messages[library, " ".join(text.split())] = None

    def hand_on(self) -> None:
        """Pass on what nobody says otherwise.

        Raises:
            CheckpointError: If a message means that the result is not what was asked for.
        """
        for library, text in self.messages:
            if any(known in text for known in SAID):
                continue
            for form, meaning in REFUSED.items():
                if re.search(form, text):
                    raise CheckpointError(f"{meaning} ({library}: {text[:300]})")
            logger.warning("%s: %s", library, text)


@contextmanager
def collecting_warnings() -> Iterator[None]:
    """Collect warnings of the libraries while entered, and keep their progress bars off."""
    import diffusers.utils.logging
    import transformers.utils.logging

    bars: tuple[Any, ...] = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library for library in bars if library.is_progress_bar_enabled()]
    collector = Collector()
    loggers = [logging.getLogger(name) for name in COLLECTED]
    before = [(one, one.handlers, one.level, one.propagate) for one in loggers]
    for one in loggers:
        one.handlers, one.propagate = [collector], False
        one.setLevel(logging.WARNING)
    for library in bars:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
        for warning in caught:
            if not issubclass(warning.category, FOR_DEVELOPERS):
                collector.add(_library_of(warning.filename), str(warning.message))
        collector.hand_on()
    finally:
        for one, handlers, level, propagate in before:
            one.handlers, one.propagate = handlers, propagate
            one.setLevel(level)
        for library in shown:
            library.enable_progress_bar()


def _library_of(filename: str) -> str:
    """The package that a file belongs to, `python` for one outside of packages."""
    return filename.partition("site-packages/")[2].partition("/")[0] or "python"
