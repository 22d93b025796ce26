"""Recipes: a method, its parameters and the sites it acts on, validated as a whole."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from retrofit.checkpoints.record_types import OuterRecipe
from retrofit.methods import METHODS, Method
from retrofit.runtime.errors import ConfigError, NotFoundError, suggest
from retrofit.runtime.reading import YAML_BYTES, parse_yaml, read_text
from retrofit.runtime.schema import OTHER_KEYS, find_problems

KEYS = ("family", "method", "parameters", "sites", "components", "description")
SHIPPED = Path(__file__).resolve().parents[1] / "recipes"
CHECKOUT = Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to install, and where.

    Attributes:
        method: A method's config.
        family: The family it was written for; None fits any that the method accepts.
        sites: Globs over site paths (`down_blocks.*`, `unet.*.attn1`); `!` in front excludes. Empty
            means every site that the method takes.
        components: Networks of a pipeline to patch; empty means its denoising networks.
        description: What it is good for.
        name: What messages call it; no part of the recipe.
    """

    method: Method
    family: str | None = None
    sites: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    description: str = ""
    name: str = dataclasses.field(default="recipe", compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain data: what YAML and `retrofit.json` hold."""
        parameters = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self.method).items()
        }
        data: dict[str, Any] = {"method": self.method.name, "parameters": parameters}
        if self.family is not None:
            data["family"] = self.family
        for name in ("sites", "components"):
            if getattr(self, name):
                data[name] = list(getattr(self, name))
        if self.description:
            data["description"] = self.description
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Validate plain data.

        Raises:
            ConfigError: With every mistake at once.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {type(data).__name__}.")
        name = data.get("method")
        config = METHODS.get(name) if isinstance(name, str) else None
        settings = {f.name for f in dataclasses.fields(config)} if config is not None else set()
        problems = [
            f"{key!r} is a parameter of {name}: write it below `parameters:`."
            if key in settings
            else _unknown(key, KEYS, "key")
            for key in data
            if key not in KEYS
        ]
        if config is None:
            problems.append(f"method {name!r} does not exist. {suggest(str(name), METHODS)}")
        parameters = data.get("parameters") or {}
        method = None
        if config is not None and not isinstance(parameters, Mapping):
            problems.append(f"parameters: expected a mapping, got {parameters!r}.")
        elif config is not None:
            method, found = make_method(config, parameters)
            problems += found
        lists = {key: _names(data, key, problems) for key in ("sites", "components")}
        if problems or method is None:
            raise ConfigError(f"{where}: " + " ".join(problems))
        return cls(
            method=method,
            family=data.get("family"),
            description=str(data.get("description", "")),
            name=where,
            **lists,
        )

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a YAML or JSON file.

        Raises:
            NotFoundError: If there is no such file.
            ConfigError: If it is not a valid recipe.
        """
        try:
            text = read_text(path, YAML_BYTES)
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise NotFoundError(
                f"{path}: can't be read ({why}). Give a YAML file, or the name of a "
                f"shipped recipe. {suggest(Path(path).stem, shipped_recipes())}"
            ) from error
        try:
            data = parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"{path}: expected YAML: {error}.") from error
        problems = find_problems(data, Annotated[OuterRecipe, OTHER_KEYS])
        if problems:
            raise ConfigError(f"{path}: {'; '.join(problems)}.")
        return cls.from_dict(data, str(path))

    def to_yaml(self) -> str:
        """As YAML text that `read` takes."""
        return yaml.safe_dump(json.loads(json.dumps(self.to_dict())), sort_keys=False)


def make_method(
    config: type[Method], parameters: Mapping[str, Any]
) -> tuple[Method | None, list[str]]:
    """Build a method's config from plain data; returns it, or None and what is wrong."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    hints = typing.get_type_hints(config)
    problems = [
        _unknown(key, tuple(fields), f"parameter of {config.name}")
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


def with_parameters(method: Method, parameters: dict[str, Any]) -> Method:
    """A method's config with some settings replaced.

    Raises:
        ConfigError: If one does not exist or has a wrong value.
    """
    present = Recipe(method=method).to_dict()["parameters"]
    for group in method.alternatives:  # the one that is given now takes the others' place
        if any(parameters.get(name) is not None for name in group):
            present.update(dict.fromkeys(group))
    changed, problems = make_method(type(method), {**present, **parameters})
    if changed is None:
        raise ConfigError(f"{method.name}: " + " ".join(problems))
    return changed


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name (`<family>_<method>`)."""
    folder = SHIPPED if SHIPPED.is_dir() else CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def default_recipe(method: str, family: str) -> Recipe:
    """The shipped recipe of a method for a family, else the method's defaults.

    Raises:
        NotFoundError: If there is no such method.
    """
    if method not in METHODS:
        raise NotFoundError(f"method {method!r} does not exist. {suggest(method, METHODS)}")
    path = shipped_recipes().get(f"{family}_{method}")
    return Recipe.read(path) if path is not None else Recipe(method=METHODS[method]())


def _unknown(key: Any, known: tuple[str, ...], what: str) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{key!r} is no {what}: {hint}known: {', '.join(known)}."


def _names(data: Mapping[str, Any], key: str, problems: list[str]) -> tuple[str, ...]:
    value = data.get(key) or []
    value = [value] if isinstance(value, str) else value
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    problems.append(f"{key}: expected a list of names, got {value!r}.")
    return ()


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
