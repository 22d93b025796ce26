"""`retrofit families`: which architectures are understood."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import options
from retrofit.commands.console import print_json, print_lines, print_table, result

if TYPE_CHECKING:
    from retrofit.families import Family
    from retrofit.patching.recipe import Recipe


def run(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Document this one.", show_default=False)
    ] = None,
    json: options.Json = False,
) -> None:
    r"""List the families: architectures that are recognised by structure, not by name.

    [bold]Examples[/bold]

    $ retrofit families
    family   what it is                                               public checkpoints
    encoder  text encoders built as BERT is: BERT, RoBERTa, MiniLM..  sentence-transformers/...
    unet2d   UNets of Stable Diffusion 1.x, 2.x, XL and Turbo, ...    stabilityai/...

    $ retrofit families unet2d
    unet2d: UNets of Stable Diffusion 1.x, 2.x, XL and Turbo, ...
    recipe              method       what it is good for
    unet2d_hidiffusion  hidiffusion  Pictures at two to four times the training size: ...

    [bold]In Python[/bold]

    from retrofit.families import find_family
    find_family(model).name
    """
    from retrofit.families import FAMILIES

    require_known(name)
    if json:
        chosen = FAMILIES if name is None else {name: FAMILIES[name]}
        described = {key: _as_json(family) for key, family in chosen.items()}
        print_json(result(family=name, families=described))
        return
    if name is not None:
        _document(FAMILIES[name])
        return
    rows = [(name, f.summary, ", ".join(f.examples)) for name, f in FAMILIES.items()]
    print_table(("family", "what it is", "public checkpoints"), rows)
    print_lines("`retrofit inspect MODEL` says which family a checkpoint belongs to.")


def _document(family: Family) -> None:
    rows = [(key, r.methods, r.description) for key, r in recipes_of(family.name).items()]
    print_lines(
        f"{family.name}: {family.summary}",
        f"public checkpoints: {', '.join(family.examples)}",
        "patched in a pipeline: " + ("yes, by itself" if family.denoises else "with --component"),
    )
    print_table(("recipe", "method", "what it is good for"), rows)


def _as_json(family: Family) -> dict[str, Any]:
    return {
        "summary": family.summary,
        "examples": list(family.examples),
        "denoises": family.denoises,
        "recipes": list(recipes_of(family.name)),
    }


def require_known(name: str | None) -> None:
    """Refuse the name of a family that does not exist.

    Raises:
        NotFoundError: With the nearest name.
    """
    from retrofit.families import FAMILIES
    from retrofit.runtime.errors import NotFoundError, suggest

    if name is not None and name not in FAMILIES:
        raise NotFoundError(f"family {name!r} does not exist. {suggest(name, FAMILIES)}")


def recipes_of(family: str) -> dict[str, Recipe]:
    """The shipped recipes of a family, by name."""
    from retrofit.patching.recipe import Recipe, shipped_recipes

    recipes = {key: Recipe.read(path) for key, path in shipped_recipes().items()}
    return {key: recipe for key, recipe in recipes.items() if recipe.family == family}
