"""Read a nested config (a dict or a config.json) into frozen dataclasses, all errors at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from retrofit.runtime.errors import ConfigError, suggest

SectionT = TypeVar("SectionT", bound="Section")


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a config; every field has a default, whose type is the field's type.

    A field whose metadata says `optional` may also be None.
    """

    def problems(self) -> list[str]:
        """What is wrong with these values, one sentence each."""
        return []


def read_section(
    section: type[SectionT], values: Any, where: str, problems: list[str], **defaults: Any
) -> SectionT:
    """Build one section; what is wrong is added to `problems`.

    Args:
        section: The dataclass to fill.
        values: A mapping of field names to values.
        where: Name of the section for messages, e.g. `camera_head`.
        problems: Receives one sentence per problem.
        **defaults: Values for fields that `values` does not name (widths that follow from others).

    Returns:
        The section; a field with a wrong value holds its default.
    """
    if not isinstance(values, Mapping):
        problems.append(f"{where}: expected a mapping of settings, got {values!r}.")
        values = {}
    known = {field.name: field for field in fields(section)}
    accepted = dict(defaults)
    for name, value in values.items():
        if name not in known:
            problems.append(f"{where}: unknown setting {name!r}. {suggest(str(name), known)}")
            continue
        converted = _convert(value, known[name].default, known[name].metadata.get("optional"))
        if converted is MISSING:
            expected = _describe(known[name].default)
            problems.append(f"{where}.{name}: expected {expected}, got {value!r}.")
        else:
            accepted[name] = converted
    built = section(**accepted)
    problems += [f"{where}.{problem}" for problem in built.problems()]
    return built


def raise_problems(name: str, problems: list[str]) -> None:
    """Raise one ConfigError that lists everything found wrong.

    Raises:
        ConfigError: If `problems` is not empty.
    """
    if problems:
        raise ConfigError(f"{name} config: " + " ".join(problems))


def positive(section: Section, *names: str) -> list[str]:
    """Problems of fields that must be above zero."""
    values = {name: getattr(section, name) for name in names}
    return [
        f"{name}: expected a number above 0, got {value}."
        for name, value in values.items()
        if value <= 0
    ]


def divisible(value: int, divisor: int, name: str) -> list[str]:
    """Problem of a field that must be a multiple of another number."""
    if divisor > 0 and value % divisor:
        return [f"{name}: expected a multiple of {divisor}, got {value}."]
    return []


def among(value: str, choices: tuple[str, ...], name: str) -> list[str]:
    """Problem of a field that must be one of some names."""
    return [] if value in choices else [f"{name}: got {value!r}. {suggest(value, choices)}"]


def _convert(value: Any, default: Any, optional: bool | None) -> Any:
    if value is None:
        return None if optional or default is None else MISSING
    if isinstance(default, bool):
        return value if isinstance(value, bool) else MISSING
    if isinstance(default, (int, float)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return MISSING
        if isinstance(default, float):
            return float(value)
        return int(value) if value == int(value) else MISSING
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)):
            return MISSING
        items = tuple(_convert(item, default[0], None) for item in value)
        return MISSING if MISSING in items else items
    return value if isinstance(value, type(default)) else MISSING


def _describe(default: Any) -> str:
    if isinstance(default, tuple):
        return f"a list like {list(default)}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}
    return names[type(default)]
