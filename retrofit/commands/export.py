"""`retrofit export`: a patched network as a graph that runs where retrofit is not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from retrofit.commands import options
from retrofit.commands.console import print_json, print_lines, print_table, result, say
from retrofit.runtime.errors import InputError

SHAPE = "What its graph takes"


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder that `retrofit patch` wrote, or a checkpoint with --method or --recipe.",
            show_default=False,
        ),
    ],
    method: options.Method = None,
    recipe: options.RecipeFile = None,
    settings: options.Settings = None,
    sites: options.Sites = None,
    component: options.Components = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="pt2 (torch.export) or onnx (ONNX Runtime, without retrofit).",
            rich_help_panel=options.OUTPUT,
        ),
    ] = "pt2",
    portable: Annotated[
        bool,
        typer.Option(
            "--portable",
            help="A pt2 of PyTorch's own operators, which runs without retrofit.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="WxH",
            help="Pixels; the network's own by default.",
            rich_help_panel=SHAPE,
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", help="Of a video or scene.", rich_help_panel=SHAPE)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Of a text.", rich_help_panel=SHAPE)
    ] = None,
    dynamic: Annotated[
        str | None,
        typer.Option(
            "--dynamic", help="batch: any number of rows up to 64.", rich_help_panel=SHAPE
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help=options.NEW_FOLDER, rich_help_panel=options.OUTPUT, metavar="FOLDER"
        ),
    ] = None,
    force: options.Force = False,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            help="Of the probe.",
            rich_help_panel=options.WHERE,
            min=0,
            max=options.MAX_SEED,
        ),
    ] = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    r"""Write a patched network as a graph that other programs run, and prove it there.

    OUT holds the graph, a probe with the output that it must give, export.json and a card that
    says how to run it. It is run in a fresh process before it is written, for a portable one with
    retrofit, transformers and diffusers blocked; `retrofit verify OUT` repeats that.

    [bold]Examples[/bold]

    $ retrofit export minilm/ -m window --set keep=0.25 --format onnx -o minilm-onnx/
              seconds in Python   as exported   FLOPs in Python   as exported
    dense     0.186               0.161         1.33e+10
    patched   0.16                0.135         1.15e+10          1.15e+10
    ...
    $ retrofit export minilm-sparse/ --portable -o minilm-pt2/
    $ retrofit export minilm-sparse/ --tokens 256 --dynamic batch -o minilm-pt2/
    $ retrofit verify minilm-pt2/

    [bold]In Python[/bold]

    from retrofit.export import ExportRequest, export, plan_export
    request = ExportRequest(format="pt2", portable=True)
    export(plan_export(find_checkpoint("minilm/"), "window", request, keep=0.25), request, out)
    """
    if out is None:
        raise InputError("expected -o FOLDER. Say where to write.")
    if dynamic not in (None, "batch"):
        raise InputError(f"--dynamic {dynamic}: expected batch. Sizes and lengths are fixed.")
    for name, value in {"frames": frames, "tokens": tokens}.items():
        options.require_positive(name, value)
    width, height = options.read_size(size)
    parameters = options.read_settings(settings)
    options.set_threads(threads)
    from retrofit.checkpoints import find_checkpoint
    from retrofit.export import ExportRequest, export, plan_export
    from retrofit.profiling.inspection import AskedSize
    from retrofit.runtime.devices import pick_device

    what = options.read_recipe(method, recipe) if method or recipe else None
    request = ExportRequest(
        format=form,
        portable=portable,
        dynamic_batch=dynamic is not None,
        size=AskedSize(width=width, height=height, frames=frames, tokens=tokens),
        device=pick_device(device),
        dtype=dtype,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    plan = plan_export(
        find_checkpoint(model),
        what,
        request,
        sites=sites or (),
        components=component or (),
        **parameters,
    )
    record = export(plan, request, out, force=force, say=say)
    if json:
        print_json(as_json(record, out))
    else:
        tell(record, out)


def as_json(record: dict[str, Any], out: Path) -> dict[str, Any]:
    """The record under the keys that every verb has."""
    recipe = record["recipe"]
    return result(
        family=record["family"],
        method=recipe.get("method") or " + ".join(rule["method"] for rule in recipe["rules"]),
        keep_measured=record["work"]["keep"],
        out=str(out),
        **{key: value for key, value in record.items() if key not in ("schema", "family")},
    )


def tell(record: dict[str, Any], out: Path) -> None:
    """What was exported, and how it runs."""
    work, seconds = record["work"], record["seconds"]
    rows = [
        (
            "dense",
            _short(seconds["dense"]),
            _short(seconds["exported_dense"]),
            _short(work["dense"]),
            "",
        ),
        (
            "patched",
            _short(seconds["patched"]),
            _short(seconds["exported"]),
            _short(work["ideal"]),
            _short(work.get("exported")),
        ),
    ]
    headers = ("", "seconds in Python", "as exported", "FLOPs in Python", "as exported")
    print_table(headers, rows)
    alone = " with retrofit, transformers and diffusers blocked" if record["portable"] else ""
    lines = [
        f"proof: ran in a fresh process{alone}; {record['verified']['difference']:.1e} of the "
        f"largest value from the patched network, which is {record['difference_from_dense']:.2g} "
        "from dense (random input)"
    ]
    fastest = min(seconds["dense"], seconds["exported_dense"])
    if seconds["exported"] > fastest:
        lines.append("it is slower than dense here: at this size or in this form it does not pay")
    print_lines(*lines, f"{out}: {record['format']}, its README.md says how to run it")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
