"""`retrofit families`: which architectures are understood."""

from __future__ import annotations

from retrofit.commands import options
from retrofit.commands.console import print_json, print_lines, print_table, result


def run(json: options.Json = False) -> None:
    r"""List the families: architectures that are recognised by structure, not by name.

    [bold]Examples[/bold]

    $ retrofit families
    family   what it is                                               public checkpoints
    encoder  text encoders built as BERT is: BERT, RoBERTa, MiniLM..  sentence-transformers/...
    unet2d   UNets of Stable Diffusion 1.x, 2.x, XL and Turbo, ...    stabilityai/...

    [bold]In Python[/bold]

    from retrofit.families import find_family
    find_family(model).name
    """
    from retrofit.families import FAMILIES

    if json:
        described = {
            name: {"summary": family.summary, "examples": list(family.examples)}
            for name, family in FAMILIES.items()
        }
        print_json(result(families=described))
        return
    rows = [(name, f.summary, ", ".join(f.examples)) for name, f in FAMILIES.items()]
    print_table(("family", "what it is", "public checkpoints"), rows)
    print_lines("`retrofit inspect MODEL` says which family a checkpoint belongs to.")
