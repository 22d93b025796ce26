"""What can go wrong, as one line for the person who typed the command.

Every message reads `where: what was expected, got what. What to do.`
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any


class RetrofitError(Exception):
    """Something failed while working (exit code 1): NaN, a full disk, a proof that is off.

    Attributes:
        finished: What had been done by then, which `--json` prints beside the error.
    """

    exit_code = 1
    finished: Mapping[str, Any] = MappingProxyType({})


class InputError(RetrofitError):
    """What was asked for is wrong (exit code 2): nothing was changed and nothing written."""

    exit_code = 2


class ConfigError(InputError):
    """A method's or recipe's parameters are not valid; the message lists every one of them."""


class NotFoundError(InputError):
    """A model, method, recipe, component or site of that name does not exist."""


class UnsupportedError(InputError):
    """The model, the method and the request do not fit each other."""


class GridError(InputError):
    """The tokens that arrived are not the tokens of the site's grid."""


class AlreadyPatchedError(InputError):
    """The model carries a patch already; the message names its owner."""


class CheckpointError(InputError):
    """A checkpoint is missing, incomplete, corrupt, or not what its record says."""


class InterceptionError(RetrofitError):
    """A patched module ran without reaching the call that was to be replaced."""


class VerificationError(RetrofitError):
    """A patched checkpoint does not reproduce its recorded proof."""


class StoppedError(RetrofitError):
    """Ctrl-C came after something was finished; the message names what."""

    exit_code = 130


class TrainingError(RetrofitError):
    """A training came out worse than it began, or as NaN; the message names its last good state."""


class NonFiniteError(RetrofitError):
    """NaN or infinity came out of a patched model; the message names the site and any step."""


LISTED = 12  # names in an error message


def unknown_key(key: Any, known: tuple[str, ...], what: str) -> str:
    """What is wrong with a key, and what was meant."""
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{key!r} is no {what}: {hint}known: {', '.join(known)}."


def suggest(name: str, choices: Iterable[str]) -> str:
    """Say which names exist, the nearest first, for the end of an error message."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    others = [choice for choice in known if choice not in near]
    listed = ", ".join(others[:LISTED]) if others else "none"
    if len(others) > LISTED:
        listed += f" and {len(others) - LISTED} more"
    if not near:
        return f"Known: {listed}."
    return f"Did you mean {' or '.join(near)}?" + (f" Others: {listed}." if others else "")
