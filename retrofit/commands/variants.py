"""What `compare` and `bench` set beside dense: methods, recipes, and every choice of settings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import options

if TYPE_CHECKING:
    from retrofit.evaluate.checkpoints import Variant, Where

Recipes = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        help="A YAML file, or the name of a shipped one; may be repeated.",
        rich_help_panel=options.WHAT,
    ),
]


def read_variants(
    methods: list[str] | None,
    recipes: list[str] | None,
    settings: list[str] | None,
    sites: list[str] | None,
) -> list[Variant]:
    """Every method and recipe with every combination of the settings."""
    from retrofit.evaluate.checkpoints import Variant

    found = [(name, options.read_recipe(name, None)) for name in methods or []]
    found += [(Path(name).stem, options.read_recipe(None, name)) for name in recipes or []]
    return [
        Variant(
            name=" ".join([name, *words]),
            what=what,
            parameters=parameters,
            sites=tuple(sites or ()),
        )
        for name, what in found
        for words, parameters in _combine(settings)
    ]


def _combine(settings: list[str] | None) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Each choice of one value for every setting, as words for a label and as parameters."""
    choices: dict[str, list[tuple[str, Any]]] = {}
    for setting in settings or []:
        for name, value in options.read_settings([setting]).items():
            choices.setdefault(name, []).append((f"{name}={setting.partition('=')[2]}", value))
    for chosen in itertools.product(*choices.values()):
        words = [word for word, _ in chosen]
        yield words, {name: value for name, (_, value) in zip(choices, chosen, strict=True)}


def read_where(
    device: str | None,
    dtype: str | None,
    component: list[str] | None,
    config: str,
    trust_remote_code: bool,
) -> Where:
    """Where and how the networks are opened."""
    from retrofit.evaluate.checkpoints import Where
    from retrofit.runtime.devices import pick_device

    return Where(
        device=pick_device(device),
        dtype=dtype,
        components=tuple(component or ()),
        config=config,
        trust_remote_code=trust_remote_code,
    )
