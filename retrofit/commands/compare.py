"""`retrofit compare`: dense against patched, on the same inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import compare_pictures as pictures
from retrofit.commands import options
from retrofit.commands.console import count, print_json, print_lines, print_table, result, stages

if TYPE_CHECKING:
    from retrofit.compare.checkpoints import Variant
    from retrofit.compare.pictures import PictureRow
    from retrofit.compare.result import Comparison

INPUTS = "What it runs on"
PLOTS = (".png", ".svg", ".pdf")  # endings


def run(
    model: options.Model,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", help="To compare; may be repeated.", rich_help_panel=options.WHAT
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            help="A YAML file, or the name of a shipped one; may be repeated.",
            rich_help_panel=options.WHAT,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting, as in --set keep=0.25; each further value of it is a variant more.",
            rich_help_panel=options.WHAT,
        ),
    ] = None,
    sites: options.Sites = None,
    component: options.Components = None,
    config: options.Config = "",
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--inputs",
            help="Texts or pictures, or folders of them; folders of views, with cameras.json "
            "where the truth is known. May be repeated.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    num_inputs: Annotated[
        int | None, typer.Option("--num-inputs", help="How many.", rich_help_panel=INPUTS)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="WxH",
            help="Pixels of a picture, video or view.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames", help="Frames of a video, views of a scene.", rich_help_panel=INPUTS
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", help="Where a text is cut.", rich_help_panel=INPUTS),
    ] = None,
    seed: Annotated[
        int,
        typer.Option("--seed", help="Of the inputs.", rich_help_panel=INPUTS, max=options.MAX_SEED),
    ] = 0,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds", help="How often each input is timed.", rich_help_panel=options.WHERE
        ),
    ] = 3,
    no_memory: Annotated[
        bool,
        typer.Option(
            "--no-memory",
            help="Leave out peak memory, which takes a process for each variant.",
            rich_help_panel=options.WHERE,
        ),
    ] = False,
    prompt_file: pictures.PromptFile = None,
    num_pictures: pictures.NumPictures = None,
    steps: pictures.Steps = None,
    eta: pictures.Eta = None,
    judge: pictures.JudgeFile = None,
    sheet: pictures.Sheet = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Also draw it, as in --plot compare.png."),
    ] = None,
    json: options.Json = False,
) -> None:
    r"""Compare a checkpoint with patches of it: output, speed and peak memory.

    Dense and patched run on the same seeded inputs, interleaved: documents for text encoders,
    pictures for vision models, latents over a short schedule for diffusion models; VGGT and Pi3 see
    the scenes of --inputs, and depth, cameras and points are held against the truth where a scene
    has one. A patched checkpoint is compared with its own patch. With --prompt-file a
    text-to-image pipeline also draws whole pictures. Nothing is written but plot and sheet.

    [bold]Examples[/bold]

    $ retrofit compare minilm/ -m window -m block-sparse --set keep=0.5
    ...
    speed, dense = 1            1.00x            1.01x            0.67x
    verdict: no variant is faster than dense by more than the noise; ...

    $ retrofit compare minilm-sparse/ --inputs my-texts/ --plot compare.png
    $ retrofit compare sd15/ -m hidiffusion --size 1024x1024 --rounds 1
    $ retrofit compare minilm/ -m window --set keep=0.5 --set keep=0.25
    $ retrofit compare rooms -m block-sparse --inputs scenes/ --set keep=0.5 --set keep=0.25
    $ retrofit compare shapes -m hidiffusion --size 256x256 --prompt-file my.txt --sheet sheet.png

    [bold]In Python[/bold]

    from retrofit.compare import compare_models
    compare_models(model, {"half": Recipe(method=WindowConfig(keep=0.5))}, inputs).variants
    """
    variants = read_variants(method or [], recipe or [], settings, tuple(sites or ()))
    width, height = options.read_size(size)
    for name, value in {"num-inputs": num_inputs, "frames": frames, "tokens": tokens}.items():
        options.require_positive(name, value)
    options.require_positive("rounds", rounds)
    options.require_positive("pictures", num_pictures)
    refuse_picture("--plot", plot, PLOTS)
    refuse_picture("--sheet", sheet, (".png",))

    from retrofit.checkpoint.loading import pick_device
    from retrofit.compare.checkpoints import Where, compare_checkpoint
    from retrofit.compare.inputs import InputChoice
    from retrofit.compare.report import plot as draw
    from retrofit.inspection import AskedSize

    where = Where(
        device=pick_device(device),
        dtype=dtype,
        components=tuple(component or ()),
        config=config,
        trust_remote_code=trust_remote_code,
    )
    given: dict[str, Any] = {
        "width": width,
        "height": height,
        "steps": steps,
        "eta": eta,
        "seed": seed,
    }
    given |= {"device": device, "dtype": dtype, "config": config or None}
    given["trust_remote_code"] = trust_remote_code
    plan = pictures.plan_pictures(model, prompt_file, num_pictures, judge, sheet, given)
    asked = AskedSize(width=width, height=height, frames=frames, tokens=tokens)
    choice = InputChoice(files=tuple(inputs or ()), count=num_inputs, asked=asked, seed=seed)
    with stages() as advance:
        comparison = compare_checkpoint(
            model,
            variants,
            choice,
            where,
            rounds=rounds,
            memory=not no_memory,
            progress=advance,
        )
        drawn: tuple[PictureRow, ...] = ()
        if plan is not None:
            recipes = {row.name: row.recipe for row in comparison.variants if row.recipe}
            drawn = plan.draw(recipes, advance)
    if plot is not None:
        draw(comparison, plot, Path(model).name)
    if json:
        print_json({**_as_json(comparison, plot), **pictures.pictures_json(drawn, sheet)})
        return
    _print(comparison, plot)
    pictures.print_pictures(drawn, sheet)


def read_variants(
    methods: list[str], recipes: list[str], settings: list[str] | None, sites: tuple[str, ...]
) -> list[Variant]:
    """Every method and recipe with every combination of the settings."""
    from retrofit.compare.checkpoints import Variant

    found = [(name, options.read_recipe(name, None)) for name in methods]
    found += [(Path(name).stem, options.read_recipe(None, name)) for name in recipes]
    return [
        Variant(name=" ".join([name, *words]), what=what, parameters=parameters, sites=sites)
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


def refuse_picture(option: str, file: Path | None, endings: tuple[str, ...]) -> None:
    """Find out before an hour of measuring that a picture can't be written.

    Raises:
        InputError: If its folder does not exist or its ending is of no picture.
    """
    from retrofit.errors import InputError

    if file is None:
        return
    if file.suffix.lower() not in endings:
        words = " or ".join(filter(None, [", ".join(endings[:-1]), endings[-1]]))
        raise InputError(f"{option} {file}: expected a name ending in {words}.")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{option} {file}: its folder does not exist. Make it first.")


def _as_json(comparison: Comparison, plot: Path | None) -> dict[str, Any]:
    """The keys that every verb has are those of the first variant."""
    from retrofit.compare.report import to_dict

    first = comparison.variants[0]
    report = first.report
    return result(
        family=comparison.family,
        method=report.method if report else None,
        patched=report.patched if report else (),
        skipped=[(skip.path, skip.reason) for skip in report.skipped] if report else (),
        keep_asked=first.keep_asked,
        keep_measured=first.keep_measured,
        **to_dict(comparison),
        plot=None if plot is None else str(plot),
    )


def _print(comparison: Comparison, plot: Path | None) -> None:
    from retrofit.compare.report import layer_table, table, verdict

    machine, (before, after) = comparison.machine, comparison.load
    print_lines(
        f"{comparison.family}: {count(len(comparison.inputs), 'input')}, "
        f"{count(comparison.rounds, 'round')}, {machine['dtype']} on {machine['device']}, "
        f"{count(machine['threads'], 'thread')}, load {before} to {after}",
        "",
    )
    print_table(*table(comparison))
    if comparison.scenes:
        print_table(*layer_table(comparison))
    print_lines(f"verdict: {verdict(comparison)}")
    if plot is not None:
        print_lines(f"plot: {plot}")
