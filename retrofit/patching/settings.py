"""Settings of methods from plain data: types checked, mistakes told in words for people."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from retrofit.methods import Method
from retrofit.runtime.errors import ConfigError, unknown_key


def make_method(
    config: type[Method], parameters: Mapping[str, Any]
) -> tuple[Method | None, list[str]]:
    """Build a method's config from plain data; returns it, or None and what is wrong."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    hints = typing.get_type_hints(config)
    problems = [
        unknown_key(key, tuple(fields), f"parameter of {config.name}")
        for key in parameters
        if key not in fields
    ]
    values: dict[str, Any] = {}
    for key in fields.keys() & parameters.keys():
        value = _widen(_as_tuples(parameters[key]), hints[key])
        if not _fits(value, hints[key]):
            problems.append(f"{key}: expected {_spell(hints[key])}, got {parameters[key]!r}.")
        values[key] = value
    if problems:
        return None, problems
    try:
        return config(**values), []
    except ConfigError as error:
        return None, [str(error)]


def as_plain_data(method: Method) -> dict[str, Any]:
    """Every setting of a method, as YAML and `retrofit.json` hold them."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(method).items()
    }


def with_parameters(method: Method, parameters: dict[str, Any]) -> Method:
    """A method's config with some settings replaced.

    Raises:
        ConfigError: If one does not exist or has a wrong value.
    """
    present = as_plain_data(method)
    for group in method.alternatives:  # the one that is given now takes the others' place
        if any(parameters.get(name) is not None for name in group):
            present.update(dict.fromkeys(group))
    changed, problems = make_method(type(method), {**present, **parameters})
    if changed is None:
        raise ConfigError(f"{method.name}: " + " ".join(problems))
    return changed


def _as_tuples(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _widen(value: Any, hint: Any) -> Any:
    """An int where a float is meant."""
    if isinstance(value, int) and not isinstance(value, bool) and not _fits(value, hint):
        return float(value)
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_fits(_widen(item, arguments[0]), arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if hint is int or hint is float:
        return isinstance(value, hint) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


PLAIN_WORDS = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}
LISTS = {
    float: "a list of numbers, as in [1, 0.5]",
    int: "a list of whole numbers, as in [1, 2]",
    str: "a list of texts, as in [a, b]",
}


def _spell(hint: Any) -> str:
    """A type in words, for people who write YAML."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [_spell(option) for option in arguments]
        return (", or " if any(", as in " in kind for kind in kinds) else " or ").join(kinds)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        kinds = [_spell(item) for item in arguments if item is not Ellipsis]
        if arguments == (int, int, int):
            return "[frames, height, width] in whole numbers, as in [1, 8, 8]"
        if Ellipsis not in arguments:
            return f"[{', '.join(kinds)}]"
        return LISTS.get(arguments[0], f"a list, each of it {kinds[0]}")
    return PLAIN_WORDS.get(hint, str(hint))
