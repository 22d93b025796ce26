"""`retrofit compare`: dense against patched, on the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import compare_pictures as pictures
from retrofit.commands import options
from retrofit.commands.console import (
    count,
    print_json,
    print_lines,
    print_table,
    report_keys,
    result,
    stages,
)
from retrofit.commands.variants import Recipes, read_variants, read_where
from retrofit.runtime.errors import RetrofitError

if TYPE_CHECKING:
    from retrofit.evaluate.inputs import InputChoice
    from retrofit.evaluate.result import Comparison

INPUTS = "What it runs on"


def run(
    model: options.Model,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", help="To compare; may be repeated.", rich_help_panel=options.WHAT
        ),
    ] = None,
    recipe: Recipes = None,
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
            help="Pixels of a picture, video or view; photos keep their shape.",
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
        typer.Option(
            "--seed", help="Of the inputs.", rich_help_panel=INPUTS, min=0, max=options.MAX_SEED
        ),
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
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    plot: options.Plot = None,
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

    from retrofit.evaluate import compare_models
    compare_models(model, {"half": Recipe.of(WindowConfig(keep=0.5))}, inputs).variants
    """
    options.set_threads(threads)
    from retrofit.evaluate.checkpoints import compare_checkpoint
    from retrofit.evaluate.plot import plot as draw

    variants = read_variants(method, recipe, settings, sites)
    choice = _read_choice(inputs, num_inputs, size, frames, tokens, seed)
    options.require_positive("rounds", rounds)
    options.refuse_picture("--plot", plot)
    where = read_where(device, dtype, component, config, trust_remote_code)
    asked = pictures.AskedPictures(
        prompts=prompt_file, count=num_pictures, steps=steps, eta=eta, judge=judge, sheet=sheet
    )
    plan = pictures.plan_pictures(model, asked, choice, where)
    with stages() as advance:
        comparison = compare_checkpoint(
            model, variants, choice, where, rounds=rounds, memory=not no_memory, progress=advance
        )
    if plot is not None:
        draw(comparison, plot, Path(model).name)
    if not json:
        _print(comparison, plot)
    try:
        if plan is not None:
            plan.draw({row.name: row.recipe for row in comparison.variants if row.recipe})
    except RetrofitError as error:
        error.finished = _as_json(comparison, plot, plan)
        raise
    finally:
        if plan is not None and not json:
            pictures.print_pictures(plan)
    if json:
        print_json(_as_json(comparison, plot, plan))


def _read_choice(
    inputs: list[Path] | None,
    num_inputs: int | None,
    size: str | None,
    frames: int | None,
    tokens: int | None,
    seed: int,
) -> InputChoice:
    for name, value in {"num-inputs": num_inputs, "frames": frames, "tokens": tokens}.items():
        options.require_positive(name, value)
    width, height = options.read_size(size)

    from retrofit.evaluate.inputs import InputChoice
    from retrofit.profiling.inspection import AskedSize

    asked = AskedSize(width=width, height=height, frames=frames, tokens=tokens)
    return InputChoice(files=tuple(inputs or ()), count=num_inputs, asked=asked, seed=seed)


def _as_json(
    comparison: Comparison, plot: Path | None, plan: pictures.PicturePlan | None
) -> dict[str, Any]:
    """The keys that every verb has are those of the first variant."""
    from retrofit.evaluate.report import to_dict

    first = comparison.variants[0]
    return result(
        family=comparison.family,
        **report_keys(first.report),
        keep_asked=first.keep_asked,
        keep_measured=first.keep_measured,
        **to_dict(comparison),
        plot=None if plot is None else str(plot),
        **pictures.pictures_json(plan),
    )


def _print(comparison: Comparison, plot: Path | None) -> None:
    from retrofit.evaluate.report import verdict
    from retrofit.evaluate.tables import layer_table, table

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
