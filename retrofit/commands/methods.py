"""`retrofit methods`: what can be installed."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import options
from retrofit.commands.console import print_json, print_lines, print_table, result
from retrofit.commands.early import check_names
from retrofit.commands.families import recipes_of, require_known
from retrofit.runtime.errors import InputError

if TYPE_CHECKING:
    from retrofit.methods import Method
    from retrofit.patching.recipe import Recipe


def run(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Document this one.", show_default=False)
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            "--family",
            metavar="FAMILY",
            help="Show what the recipes of this family set, beside the defaults.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="The same for this checkpoint's family.",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    r"""List the methods, or document one: what it does, its settings, from what size it helps.

    [bold]Examples[/bold]

    $ retrofit methods
    method        what it does                                                         paper
    block-sparse  each block of queries attends to the blocks of keys that matter ...  arxiv ...

    $ retrofit methods block-sparse
    block-sparse: each block of queries attends to the blocks of keys that matter to it
    ...
    keep  float | None  0.5  Fraction of the key blocks that each query block attends to ...

    $ retrofit methods window --family flux
    setting  type          default  flux_window  what it is
    keep     float | None  null     0.25         Fraction of the query-key pairs ...

    [bold]In Python[/bold]

    from retrofit.methods import METHODS
    METHODS["block-sparse"](keep=0.25)  # a config, which retrofit.patch takes
    """
    if name is not None:
        check_names({"method": name})
    if model is not None and family is not None:
        raise InputError("--model and --family: a model has its family. Give one of them.")
    from retrofit.methods import METHODS

    require_known(family)
    if model is not None:
        family = _family_of(model)
    recipes = {} if family is None else recipes_of(family)
    if json:
        chosen = METHODS if name is None else {name: METHODS[name]}
        described = {key: _as_json(config, recipes) for key, config in chosen.items()}
        print_json(result(method=name, family=family, methods=described))
    elif name is not None:
        _document(METHODS[name], recipes)
    elif family is not None:
        rows = [
            (key, rule.method.name, _changed_settings(rule.method))
            for key, recipe in recipes.items()
            for rule in recipe.rules
        ]
        print_table(("recipe", "method", "what it sets"), rows)
        print_lines(f"`retrofit methods NAME --family {family}` shows them beside the defaults.")
    else:
        rows = [(key, config.summary, config.paper) for key, config in METHODS.items()]
        print_table(("method", "what it does", "paper"), rows)
        print_lines("`retrofit methods NAME` documents one.")


def _family_of(model: str) -> str:
    """The family of a checkpoint's first network that can be patched, by its configs."""
    from retrofit.checkpoints import find_checkpoint
    from retrofit.checkpoints.opening import build_networks
    from retrofit.patching.networks import find_networks

    return find_networks(build_networks(find_checkpoint(model, weights=False)))[0].family.name


def _changed_settings(method: Method) -> str:
    """Settings that are not the method's defaults, as --set takes them."""
    found = [
        f"{p['name']}={_as_typed(getattr(method, p['name']))}"
        for p in _settings(type(method))
        if getattr(method, p["name"]) != p["default"]
    ]
    return " ".join(found) or "nothing: the defaults"


def _of_method(config: type[Method], recipes: dict[str, Recipe]) -> dict[str, Method]:
    """The settings in recipes whose only rule is of a method."""
    methods = {key: r.rules[0].method for key, r in recipes.items() if len(r.rules) == 1}
    return {key: method for key, method in methods.items() if type(method) is config}


def _document(config: type[Method], recipes: dict[str, Recipe]) -> None:
    from retrofit.patching.recipe import shipped_recipes

    known = shipped_recipes()
    names = [key for key in known if f"{key}_".partition("_")[2].startswith(f"{config.name}_")]
    print_lines(
        f"{config.name}: {config.summary}",
        f"paper: {config.paper}",
        f"helps: {config.helps}",
        f"{config.lossy}",
        f"recipes: {', '.join(names) or 'none, its defaults below are used'}",
    )
    shown = _of_method(config, recipes)
    rows = [
        (
            *(p["name"], p["type"], _as_typed(p["default"])),
            *(_as_typed(getattr(method, p["name"])) for method in shown.values()),
            p["what"],
        )
        for p in _settings(config)
    ]
    print_table(("setting", "type", "default", *shown, "what it is"), rows)
    print_lines(f"use: retrofit patch MODEL --method {config.name}{_example_setting(config)}")


def _as_typed(value: Any) -> str:
    """A value in the words that --set takes."""
    return value if isinstance(value, str) else dumps(value)


def _example_setting(config: type[Method]) -> str:
    """A setting as one types it."""
    defaults = {p["name"]: p["default"] for p in _settings(config)}
    if "keep" in defaults:
        return " --set keep=0.25"
    given = {name: value for name, value in defaults.items() if isinstance(value, (int, float))}
    return "".join(f" --set {name}={str(value).lower()}" for name, value in list(given.items())[:1])


def _as_json(config: type[Method], recipes: dict[str, Recipe]) -> dict[str, Any]:
    shown = _of_method(config, recipes)
    return {
        "recipes": {key: dataclasses.asdict(method) for key, method in shown.items()},
        "summary": config.summary,
        "paper": config.paper,
        "helps": config.helps,
        "lossy": config.lossy,
        "settings": _settings(config),
    }


def _settings(config: type[Method]) -> list[dict[str, Any]]:
    """Name, type, default and description of every field."""
    described = _described_attributes(config)
    hints = typing.get_type_hints(config)
    return [
        {
            "name": field.name,
            "type": _spell(hints[field.name]),
            "default": None if field.default is dataclasses.MISSING else field.default,
            "what": described.get(field.name, ""),
        }
        for field in dataclasses.fields(config)
    ]


def _described_attributes(config: type[Method]) -> dict[str, str]:
    """The `Attributes` section of a config's docstring."""
    section = (inspect.getdoc(config) or "").partition("Attributes:")[2]
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start.group(1)
            found[name] = start.group(2)
        elif name and line.startswith("        "):
            found[name] += " " + line.strip()
    return found


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
