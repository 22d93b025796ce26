"""Arguments and options that several commands share, and how their texts are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.runtime.errors import ConfigError, InputError
from retrofit.runtime.machine import MAX_THREADS, use_threads
from retrofit.runtime.outputs import refuse_file

if TYPE_CHECKING:
    from retrofit.patching.recipe import Recipe

MAX_SEED = 2**63 - 1
WHAT = "What to install"
WHERE = "Where it runs"
OUTPUT = "What is written"
PLOTS = (".png", ".svg", ".pdf")  # endings
NEW_FOLDER = "New folder; those above it are made too."
FOLDERS_MADE = "Missing folders are made."

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder (pipeline, component or transformers model), a hub id, a .safetensors "
        "file, or a bundled name: `shapes` (pictures) or `rooms` (views).",
        show_default=False,
    ),
]
Patched = Annotated[
    str,
    typer.Argument(metavar="OUT", help="A folder that `retrofit patch` wrote.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cuda, mps, xpu, cpu; the GPU where there is one.", rich_help_panel=WHERE
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16; the checkpoint's own by default.",
        rich_help_panel=WHERE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        help="Of the CPU. One is steadiest while other programs run.",
        rich_help_panel=WHERE,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the checkpoint.",
        rich_help_panel=WHERE,
    ),
]
Components = Annotated[
    list[str] | None,
    typer.Option(
        "--component",
        help="Network of a pipeline to take, instead of those that denoise; may be repeated.",
        rich_help_panel=WHAT,
    ),
]
Config = Annotated[
    str,
    typer.Option(
        "--config",
        help="For a single file: folder or hub id with its configs.",
        rich_help_panel=WHAT,
        show_default=False,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        "-m",
        help="Its shipped recipe for this family, else its defaults.",
        rich_help_panel=WHAT,
    ),
]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="A YAML file, or the name of a shipped one.", rich_help_panel=WHAT
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A setting, as in --set keep=0.25; may be repeated.", rich_help_panel=WHAT
    ),
]
Sites = Annotated[
    list[str] | None,
    typer.Option(
        "--sites",
        help="Glob over site paths; ! in front excludes; may be repeated.",
        rich_help_panel=WHAT,
    ),
]
Out = Annotated[
    Path, typer.Option("-o", "--out", help=NEW_FOLDER, rich_help_panel=OUTPUT, metavar="FOLDER")
]
Link = Annotated[
    bool,
    typer.Option("--link", help="Hard-link the files, not copy them.", rich_help_panel=OUTPUT),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace an earlier result.", rich_help_panel=OUTPUT),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        help=f"Also draw it, as in --plot plot.png. {FOLDERS_MADE}",
        rich_help_panel=OUTPUT,
    ),
]


def read_settings(settings: list[str] | None) -> dict[str, Any]:
    """Settings like `keep=0.25` as typed values.

    Raises:
        ConfigError: If one has no value, or is the word that people read both ways.
    """
    values = {}
    for setting in settings or []:
        name, text = read_assignment(setting, "--set ", "--set keep=0.25")
        if name == "sparsity":
            raise ConfigError(
                f"--set {setting}: sparsity is read both ways. Say keep: keep=0.1 leaves a tenth "
                "of the work, keep=0.9 leaves nine tenths."
            )
        values[name] = read_value(text, f"--set {setting}")
    return values


def read_assignment(word: str, before: str, example: str) -> tuple[str, str]:
    """Name and text of NAME=VALUE.

    Args:
        word: What was typed.
        before: What stands before it on the command line, for messages.
        example: A right one, for messages.

    Raises:
        ConfigError: If it has no name or no value.
    """
    name, separator, text = word.partition("=")
    name = name.strip().replace("-", "_")
    if not separator or not name or not text.strip():
        raise ConfigError(f"{before}{word}: expected NAME=VALUE, as in {example}.")
    return name, text


def read_value(text: str, where: str) -> Any:
    """A typed value: YAML's, and numbers such as 1e-9, which YAML wants as 1.0e-9.

    Raises:
        ConfigError: If it is no YAML.
    """
    from retrofit.runtime.reading import parse_yaml

    try:
        return as_number(parse_yaml(text))
    except ValueError as error:
        raise ConfigError(
            f"{where}: expected a number, a word or a list like [1,2], got {text!r}."
        ) from error


def as_number(value: Any) -> Any:
    """A number where YAML sees a word."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def read_recipe(method: str | None, recipe: str | None) -> Recipe | str:
    """What `patch` takes, from `--method` and `--recipe`.

    Raises:
        InputError: If neither is given, or they disagree.
    """
    from retrofit.patching.recipe import Recipe, shipped_recipes

    if recipe is not None:
        shipped = shipped_recipes()
        found = Recipe.read(shipped.get(recipe, Path(recipe).expanduser()))
        if method not in (None, found.methods):
            raise InputError(
                f"--recipe {recipe}: is for {found.methods}, --method says {method}. "
                "Give one of them."
            )
        return replace(found, name=f"--recipe {recipe}")
    if method is None:
        from retrofit.methods import METHODS

        raise InputError(f"expected --method or --recipe. Methods: {', '.join(METHODS)}.")
    return method


def read_size(size: str | None) -> tuple[int | None, int | None]:
    """`1920x1080` as width and height.

    Raises:
        InputError: If it is not a size.
    """
    if size is None:
        return None, None
    width, separator, height = size.lower().partition("x")
    if not (separator and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise InputError(f"--size {size}: expected WIDTHxHEIGHT in pixels, as in 1920x1080.")
    return int(width), int(height)


def refuse_picture(option: str, file: Path | None, endings: tuple[str, ...] = PLOTS) -> None:
    """Find out before an hour of measuring that a picture can't be written.

    Raises:
        InputError: If its place can't be written to or its ending is of no picture.
    """
    if file is None:
        return
    if file.suffix.lower() not in endings:
        words = " or ".join(filter(None, [", ".join(endings[:-1]), endings[-1]]))
        raise InputError(f"{option} {file}: expected a name ending in {words}.")
    refuse_file(option, file)


def require_positive(name: str, value: int | None) -> None:
    """Refuse a count below 1.

    Raises:
        InputError: If it is.
    """
    if value is not None and value < 1:
        raise InputError(f"--{name} {value}: expected 1 or more.")


def set_threads(threads: int | None) -> None:
    """Compute in as many threads as `--threads` says; None leaves it to PyTorch.

    Raises:
        InputError: If it is no number of threads.
    """
    if threads is None:
        return
    if not 1 <= threads <= MAX_THREADS:
        raise InputError(f"--threads {threads}: expected 1 to {MAX_THREADS}.")
    use_threads(threads)
