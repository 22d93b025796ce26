"""`retrofit recipes`: settings that come with the package."""

from __future__ import annotations

from typing import Annotated

import typer

from retrofit.commands import options
from retrofit.commands.console import print_json, print_lines, print_table, result


def run(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this one.", show_default=False)
    ] = None,
    json: options.Json = False,
) -> None:
    r"""List the shipped recipes, or print one as a file to start from.

    [bold]Examples[/bold]

    $ retrofit recipes
    recipe                family   method        what it is good for
    encoder_block-sparse  encoder  block-sparse  texts of more than 400 tokens

    $ retrofit recipes encoder_block-sparse > mine.yaml
    $ retrofit patch minilm/ --recipe mine.yaml -o out/

    [bold]In Python[/bold]

    recipe = retrofit.Recipe.read("mine.yaml")
    retrofit.patch(model, recipe)
    """
    from retrofit.patching.recipe import Recipe, shipped_recipes
    from retrofit.runtime.errors import NotFoundError, suggest

    shipped = shipped_recipes()
    if name is not None and name not in shipped:
        raise NotFoundError(f"recipe {name!r} does not exist. {suggest(name, shipped)}")
    chosen = shipped if name is None else {name: shipped[name]}
    recipes = {key: Recipe.read(path) for key, path in chosen.items()}
    if json:
        print_json(result(recipes={key: recipe.to_dict() for key, recipe in recipes.items()}))
    elif name is not None:
        print_lines(recipes[name].to_yaml().rstrip())
    elif not recipes:
        print_lines("no recipes are shipped; methods use their defaults")
    else:
        rows = [
            (key, recipe.family or "any", recipe.methods, recipe.description)
            for key, recipe in recipes.items()
        ]
        print_table(("recipe", "family", "method", "what it is good for"), rows)
