"""Settings of methods from plain data: types checked, mistakes told in words for people."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from retrofit.methods import Method
from retrofit.runtime.errors import ConfigError, unknown_key
from retrofit.runtime.schema import find_problems


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
        value = _as_lists(parameters[key])
        wrong = find_problems(value, hints[key], key)
        problems += [f"{problem}." for problem in wrong]
        values[key] = value if wrong else _of_type(value, hints[key])
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


def _of_type(value: Any, hint: Any) -> Any:
    """Plain data that fits a type, as that type: lists as tuples, whole numbers as floats."""
    if isinstance(value, list):
        options = [hint, *typing.get_args(hint)]
        items = next(typing.get_args(o) for o in options if typing.get_origin(o) is tuple)
        inner = items[:1] * len(value) if Ellipsis in items else items
        return tuple(map(_of_type, value, inner))
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and int not in (hint, *typing.get_args(hint)) else value


def _as_lists(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    return list(map(_as_lists, value)) if isinstance(value, (list, tuple)) else value
