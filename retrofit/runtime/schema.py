"""Hold data from outside against types: every mistake at once, by key and in words.

A record that was read from a file is checked as a whole before any of it is used. Its shape is
written as type hints: `TypedDict`, dataclasses, lists, mappings, `Literal`, unions, and
`Annotated` with the bounds below.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

MOST_PROBLEMS = 5
MOST_LEVELS = 20  # of what has no type of its own
SHOWN = 60  # characters of a wrong value
LARGEST = 2**63
KINDS: dict[Any, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "a text"),
    type(None): (type(None), "null"),
}
LISTS: dict[Any, str] = {
    float: "a list of numbers, as in [1, 0.5]",
    int: "a list of whole numbers, as in [1, 2]",
    str: "a list of texts, as in [a, b]",
}


@dataclass(frozen=True)
class Within:
    """Bounds of a number, or of the length of a text or list; both are allowed themselves."""

    least: float
    most: float

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type lies within."""
        measured = len(value) if isinstance(value, (str, Sequence, Mapping)) else value
        return bool(self.least <= measured <= self.most)

    def __str__(self) -> str:
        """Its words after those of the type."""
        return f" from {self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class Matching:
    """A pattern that all of a text must match, and what such a text is called."""

    pattern: str
    words: str

    def allows(self, value: Any) -> bool:
        """Whether a text matches."""
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        """Its words after those of the type."""
        return f", {self.words}"


OTHER_KEYS = "other keys"
"""In `Annotated`: a mapping may have keys that its type does not name."""

Sha256 = Annotated[str, Matching("[0-9a-f]{64}", "the 64 hex digits of a sha256")]


def find_problems(value: Any, hint: Any, key: str = "") -> list[str]:
    """Everything that is wrong with a value, as `key: expected a number, got 'x'`; the first few.

    Args:
        value: Plain data.
        hint: The type it should have.
        key: What it is called.
    """
    found = list(dict.fromkeys(_problems(value, hint, key)))
    more = len(found) - MOST_PROBLEMS
    return found[:MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])


def _problems(value: Any, hint: Any, key: str) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        yield from _annotated(value, hint, key)
    elif origin in (typing.Union, types.UnionType):
        yield from _union(value, hint, key)
    elif hint is Any:
        yield from _untyped(value, key, 0)
    elif origin is Literal:
        if not any(value == option and type(value) is type(option) for option in arguments):
            yield _wrong(value, hint, key)
    elif _is_record(hint):
        yield from _record(value, hint, key, others=False)
    elif origin in (list, tuple, Sequence):
        yield from _sequence(value, hint, key)
    elif origin in (dict, Mapping):
        yield from _mapping(value, hint, key)
    elif not _is_plain(value, hint):
        yield _wrong(value, hint, key)


def _annotated(value: Any, hint: Any, key: str) -> Iterator[str]:
    inner, *marks = typing.get_args(hint)
    if OTHER_KEYS in marks:
        yield from _record(value, inner, key, others=True)
        return
    found = list(_problems(value, inner, key))
    if found and isinstance(value, (list, dict)):
        yield from found
    elif found or not all(mark.allows(value) for mark in marks):
        yield _wrong(value, hint, key)


def _union(value: Any, hint: Any, key: str) -> Iterator[str]:
    found = [list(_problems(value, option, key)) for option in typing.get_args(hint)]
    if not all(found):
        return
    # of a mapping or list the option that is one says where in it
    inside = [problems for problems in found if problems[0].partition(": ")[0] != key]
    yield from inside[0] if inside else [_wrong(value, hint, key)]


def _untyped(value: Any, key: str, level: int) -> Iterator[str]:
    """Plain data of any shape, which must be finite in depth and printable."""
    if level > MOST_LEVELS:
        yield f"{key}: expected at most {MOST_LEVELS} levels, got more"
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _untyped(item, _join(key, name), level + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _untyped(item, f"{key}[{index}]", level + 1)
    elif isinstance(value, str) and not _is_text(value):
        yield _wrong(value, str, key)
    elif isinstance(value, int) and abs(value) > LARGEST:
        yield _wrong(value, int, key)


def _record(value: Any, hint: Any, key: str, *, others: bool) -> Iterator[str]:
    if not isinstance(value, dict):
        yield _wrong(value, hint, key)
        return
    hints, optional = _fields(hint)
    for name, inner in hints.items():
        if name in value:
            yield from _problems(value[name], inner, _join(key, name))
        elif name not in optional:
            yield f"{_join(key, name)}: expected {_spell(inner)}, got nothing"
    if others:
        rest = {name: item for name, item in value.items() if name not in hints}
        yield from _untyped(rest, key, 0)
        return
    for name in value:
        if name not in hints:
            yield f"{_join(key, name)}: is no key of it"


def _sequence(value: Any, hint: Any, key: str) -> Iterator[str]:
    arguments = typing.get_args(hint)
    is_pair = typing.get_origin(hint) is tuple and Ellipsis not in arguments
    if not isinstance(value, list) or (is_pair and len(value) != len(arguments)):
        yield _wrong(value, hint, key)
        return
    for index, item in enumerate(value):
        yield from _problems(item, arguments[index if is_pair else 0], f"{key}[{index}]")


def _mapping(value: Any, hint: Any, key: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield _wrong(value, hint, key)
        return
    for name, item in value.items():
        if not _is_text(name):
            yield f"{key}: expected printable keys, got {name!r}"
        yield from _problems(item, typing.get_args(hint)[1], _join(key, name))


def _is_plain(value: Any, hint: Any) -> bool:
    kind, _ = KINDS[hint]
    if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
        return False
    if isinstance(value, str):
        return _is_text(value)
    return not isinstance(value, (int, float)) or -LARGEST <= value <= LARGEST


def _is_text(value: Any) -> bool:
    """Whether a text can be printed and be part of a path: no NUL, no half of a character."""
    return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udfff]", value)


def _is_record(hint: Any) -> bool:
    return typing.is_typeddict(hint) or dataclasses.is_dataclass(hint)


@lru_cache(maxsize=64)
def _fields(hint: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Hints by key, and the keys that may be missing."""
    hints = typing.get_type_hints(hint, include_extras=True)
    if typing.is_typeddict(hint):
        return hints, frozenset(hint.__optional_keys__)
    fields = dataclasses.fields(hint)
    has_default = {item.name for item in fields if item.default is not dataclasses.MISSING}
    return {item.name: hints[item.name] for item in fields}, frozenset(has_default)


def _join(key: str, name: Any) -> str:
    shown = name if isinstance(name, str) and name.isidentifier() else _show(name)
    return f"{key}.{shown}" if key else shown


def _wrong(value: Any, hint: Any, key: str) -> str:
    return f"{key or 'it'}: expected {_spell(hint)}, got {_show(value)}"


def _show(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**20:
        return "a number of more than 20 digits"
    text = ascii(value) if isinstance(value, str) and not _is_text(value) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _spell(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        words = [str(mark) for mark in arguments[1:] if mark != OTHER_KEYS]
        return _spell(arguments[0]) + "".join(words)
    if origin in (typing.Union, types.UnionType):
        words = list(dict.fromkeys(map(_spell, arguments)))
        return (", or " if any(", as in " in word for word in words) else " or ").join(words)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple and Ellipsis not in arguments:
        return f"[{', '.join(map(_spell, arguments))}]"
    if origin in (list, tuple, Sequence):
        inner = next(iter(arguments), None)
        return LISTS.get(
            inner, "a list" if inner is None else f"a list, each of it {_spell(inner)}"
        )
    return KINDS[hint][1] if hint in KINDS else "a mapping"
