"""`retrofit bench`: how fast operators and whole models are, dense against patched, in one run."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from retrofit.commands import options
from retrofit.commands.bench_models import bench_model, read_sizes
from retrofit.commands.bench_operators import bench_operators, read_choice
from retrofit.commands.console import print_json, print_lines
from retrofit.commands.variants import Recipes, read_variants, read_where
from retrofit.runtime.errors import InputError
from retrofit.runtime.outputs import make_folders, refuse_file

SIZE = "What it runs on"


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="As for compare; without it the operators are timed.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", help="To time; may be repeated.", rich_help_panel=options.WHAT
        ),
    ] = None,
    recipe: Recipes = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting; each further value of it is a variant more.",
            rich_help_panel=options.WHAT,
        ),
    ] = None,
    sites: options.Sites = None,
    component: options.Components = None,
    config: options.Config = "",
    size: Annotated[
        list[str] | None,
        typer.Option(
            "--size", metavar="WxH", help="Pixels; may be repeated.", rich_help_panel=SIZE
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option("--frames", help="Frames of a video, views of a scene.", rich_help_panel=SIZE),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--tokens",
            help="Length of a text, or of the operators' input; may be repeated.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", help="Of the inputs.", rich_help_panel=SIZE, min=0, max=options.MAX_SEED
        ),
    ] = 0,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds", help="Timed rounds; a few by default.", rich_help_panel=options.WHERE
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    plot: options.Plot = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE",
            help=f"Also write the JSON there, as a new file. {options.FOLDERS_MADE}",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    r"""Time operators, or a whole model dense and patched; every ratio is from one run.

    Rounds are interleaved and a ratio is the median of those within a round. An operator whose
    output is not right is not timed. Where something is slower than dense the table says so. The
    output of a patched model is what compare looks at; bench only times it.

    [bold]Examples[/bold]

    $ retrofit bench --tokens 1024
    operator                tokens   kept  dense ms    ms  speed    min to max  efficiency
    block-sparse, keep 0.1    1024  0.125      6.57  1.44  4.53x  4.29 to 6.23        0.57
    windows, half a side      1024  0.250      6.68  5.29  1.26x  1.23 to 1.30        0.32
    ...

    $ retrofit bench --dtype bfloat16 --tokens 4096 --tokens 16384 --plot operators.png
    $ retrofit bench sd15/ -m window -m hidiffusion --size 512x512 --size 1024x1024
    $ retrofit bench minilm/ -m block-sparse --tokens 512 --json -o minilm.json

    [bold]In Python[/bold]

    from retrofit.profiling.bench.operators import TourChoice, tour
    list(tour(TourChoice(device="cpu", dtypes=(torch.float32,), sides=(32,))))
    """
    for number in tokens or []:
        options.require_positive("tokens", number)
    options.set_threads(threads)
    options.require_positive("rounds", rounds)
    options.require_positive("frames", frames)
    options.refuse_picture("--plot", plot)
    _refuse_out(out)
    if model is None:
        _refuse_model_options(method, recipe, settings, sites, component, size, frames)
        choice = read_choice(tokens, device, dtype, rounds, seed)
        data = bench_operators(choice, plot, show=not json)
    else:
        sizes = read_sizes(size, tokens, frames)
        variants = read_variants(method, recipe, settings, sites)
        where = read_where(device, dtype, component, config, trust_remote_code)
        data = bench_model(
            model, variants, sizes, where, rounds=rounds, seed=seed, plot=plot, show=not json
        )
    data["plot"] = None if plot is None else str(plot)
    if out is not None:
        make_folders(out)
        out.write_text(json_module.dumps(data, indent=2, default=str) + "\n")
    if json:
        print_json(data)
        return
    for what, file in {"plot": plot, "json": out}.items():
        if file is not None:
            print_lines(f"{what}: {file}")


def _refuse_out(out: Path | None) -> None:
    """Raise before anything is measured if the file exists or can't be written."""
    if out is None:
        return
    if out.exists():
        raise InputError(f"--out {out}: exists already. Name a new file.")
    refuse_file("--out", out)


def _refuse_model_options(*given: Any) -> None:
    if any(given):
        raise InputError(
            "bench: methods, settings, components, sizes and frames are for a model. Name one, as "
            "in `retrofit bench sd15/ --method window`, or leave them out to time the operators."
        )
