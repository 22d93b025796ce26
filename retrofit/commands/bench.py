"""`retrofit bench`: how fast operators and whole models are, dense against patched, in one run."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import options
from retrofit.commands.compare import PLOTS, read_variants, refuse_picture
from retrofit.commands.console import (
    count,
    print_json,
    print_lines,
    print_table,
    result,
    stages,
)

if TYPE_CHECKING:
    from retrofit.bench.lines import Line
    from retrofit.compare.result import Comparison

SIZE = "What it runs on"
MODEL_HEADERS = ("size", "method", "dense ms", "ms", "speed", "min to max", "at most", "")


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
        typer.Option("--seed", help="Of the inputs.", rich_help_panel=SIZE, max=options.MAX_SEED),
    ] = 0,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds", help="Timed rounds; a few by default.", rich_help_panel=options.WHERE
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Also draw it, as in --plot bench.png."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Also write the JSON there, as a new file."
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

    from retrofit.bench.operators import TourChoice, tour
    list(tour(TourChoice(device="cpu", dtypes=(torch.float32,), sides=(32,))))
    """
    for number in tokens or []:
        options.require_positive("tokens", number)
    options.require_positive("rounds", rounds)
    options.require_positive("frames", frames)
    refuse_picture("--plot", plot, PLOTS)
    _refuse_out(out)
    if model is None:
        _refuse_model_options(method, recipe, settings, sites, component, size, frames)
        data = _bench_operators(tokens, device, dtype, rounds, seed, plot, show=not json)
    else:
        sizes = [options.read_size(text) for text in size or []]
        from retrofit.checkpoint.loading import pick_device
        from retrofit.compare.checkpoints import Where
        from retrofit.inspection import AskedSize

        asked = [AskedSize(width=w, height=h, frames=frames) for w, h in sizes]
        asked += [AskedSize(tokens=n, frames=frames) for n in tokens or []]
        variants = read_variants(method or [], recipe or [], settings, tuple(sites or ()))
        where = Where(
            device=pick_device(device),
            dtype=dtype,
            components=tuple(component or ()),
            config=config,
            trust_remote_code=trust_remote_code,
        )
        found = _bench_model(
            model, variants, asked or [AskedSize(frames=frames)], where, rounds or 3, seed
        )
        data = _model_json(found)
        if not json:
            _print_model(found)
        if plot is not None:
            _plot_model(found, plot, Path(model).name)
    data["plot"] = None if plot is None else str(plot)
    if out is not None:
        out.write_text(json_module.dumps(data, indent=2, default=str) + "\n")
    if json:
        print_json(data)
        return
    for what, file in {"plot": plot, "json": out}.items():
        if file is not None:
            print_lines(f"{what}: {file}")


def _refuse_out(out: Path | None) -> None:
    """Raise before anything is measured if the file can't be written.

    Raises:
        InputError: If it exists, or its folder does not.
    """
    from retrofit.errors import InputError

    if out is None:
        return
    if out.exists():
        raise InputError(f"--out {out}: exists already. Name a new file.")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: its folder does not exist. Make it first.")


def _refuse_model_options(*given: Any) -> None:
    from retrofit.errors import InputError

    if any(given):
        raise InputError(
            "bench: methods, settings, components, sizes and frames are for a model. Name one, as "
            "in `retrofit bench sd15/ --method window`, or leave them out to time the operators."
        )


def _bench_operators(
    tokens: Sequence[int] | None,
    device: str | None,
    dtype: str | None,
    rounds: int | None,
    seed: int,
    plot: Path | None,
    *,
    show: bool,
) -> dict[str, Any]:
    import math

    import torch

    from retrofit.bench.operators import CPU_SIDES, GPU_SIDES, TourChoice, losing, tour
    from retrofit.bench.report import HEADERS, lines_json, operator_rows, plot_operators
    from retrofit.checkpoint.loading import pick_device
    from retrofit.errors import InputError
    from retrofit.timing import library_versions, load_average, processor_name

    place = pick_device(device)
    names = (dtype,) if dtype else ("float32", "bfloat16")
    dtypes = tuple(getattr(torch, name, None) for name in names)
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    if any(found not in allowed for found in dtypes):
        raise InputError(f"--dtype {dtype}: expected float32, bfloat16 or float16.")
    sides: tuple[int, ...] = GPU_SIDES if place.startswith("cuda") else CPU_SIDES
    if tokens:
        sides = tuple(math.isqrt(n) // 4 * 4 for n in tokens)
        if min(sides) < 8:
            raise InputError(f"--tokens {min(tokens)}: expected 64 or more for the operators.")
    kind = "cuda" if place.startswith("cuda") else place
    choice = TourChoice(
        device=kind,
        dtypes=tuple(d for d in dtypes if d is not None),
        sides=sides,
        rounds=rounds,
        seed=seed,
    )
    with stages() as advance:
        lines = list(tour(choice, advance))
    machine = {
        "device": torch.cuda.get_device_name() if kind == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "versions": library_versions("torch", "triton", "retrofit-attention"),
        "load": load_average(),
    }
    title = f"{machine['device']}, {count(torch.get_num_threads(), 'thread')}"
    if plot is not None:
        plot_operators(lines, plot, f"Operators against dense attention: {title}")
    if show:
        heads = f"{lines[0].shape.heads} heads of {lines[0].shape.head_dim}"
        print_lines(f"{title}, load {machine['load']}, {heads}, dense is {lines[0].base}", "")
        print_table(HEADERS, operator_rows(lines))
        print_lines(_say_losing(lines, losing(lines)))
    return result(machine=machine, lines=lines_json(lines))


def _say_losing(lines: Sequence[Line], lost: Sequence[Line]) -> str:
    if not lost:
        return f"faster than dense in all of the {count(len(lines), 'case')}."
    longest = max(line.shape.seq_len for line in lost)
    return (
        f"slower than dense in {len(lost)} of {count(len(lines), 'case')}, the longest of them at "
        f"{longest} tokens. Efficiency is dense time x kept / time: 1 saves every skipped pair."
    )


def _bench_model(
    model: str, variants: Any, sizes: Sequence[Any], where: Any, rounds: int, seed: int
) -> list[Comparison]:
    from retrofit.compare.checkpoints import compare_checkpoint
    from retrofit.compare.inputs import InputChoice

    found = []
    with stages() as advance:
        for asked in sizes:
            choice = InputChoice(count=1, asked=asked, seed=seed)
            found.append(
                compare_checkpoint(
                    model,
                    variants,
                    choice,
                    where,
                    rounds=rounds,
                    memory=False,
                    progress=advance,
                )
            )
    return found


def _print_model(found: Sequence[Comparison]) -> None:
    first = found[0]
    machine = first.machine
    print_lines(
        f"{first.family}: {count(first.rounds, 'round')}, {machine['dtype']} on "
        f"{machine['device']}, {count(machine['threads'], 'thread')}, "
        f"load {first.load[0]} to {found[-1].load[1]}",
        "",
    )
    print_table(MODEL_HEADERS, [row for comparison in found for row in _model_rows(comparison)])
    print_lines(
        'times are for one input (a diffusion model: four calls of its schedule); "at most" is the '
        "speed if attention took no work at all."
    )


def _model_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    from retrofit.bench.report import describe_speed, milliseconds

    dense = milliseconds(comparison.dense.seconds.median)
    limit = _limit(comparison)
    rows: list[tuple[str, ...]] = []
    for row in comparison.variants:
        words = [describe_speed(row.speed), "noisy" if comparison.noisy else ""]
        rows.append(
            (
                _size_name(comparison),
                row.name,
                dense,
                milliseconds(row.seconds.median),
                f"{row.speed.median:.2f}x",
                f"{min(row.speed.values):.2f} to {max(row.speed.values):.2f}",
                "" if limit is None else f"{limit:.2f}x",
                ", ".join(word for word in words if word),
            )
        )
    return rows


def _limit(comparison: Comparison) -> float | None:
    share = comparison.attention_share
    return None if share is None or share >= 1 else 1 / (1 - share)


def _size_name(comparison: Comparison) -> str:
    return f"{comparison.tokens} tokens"


def _model_json(found: Sequence[Comparison]) -> dict[str, Any]:
    from retrofit.compare.report import to_dict

    first = found[0].variants[0]
    report = first.report
    return result(
        family=found[0].family,
        method=report.method if report else None,
        patched=report.patched if report else (),
        skipped=[(skip.path, skip.reason) for skip in report.skipped] if report else (),
        keep_asked=first.keep_asked,
        keep_measured=first.keep_measured,
        machine=found[0].machine,
        sizes=[{**to_dict(comparison), "limit": _limit(comparison)} for comparison in found],
    )


def _plot_model(found: Sequence[Comparison], plot: Path, name: str) -> None:
    from retrofit.bench.report import plot_models

    speeds = {
        row.name: [(_size_name(comparison), comparison.variants[i].speed) for comparison in found]
        for i, row in enumerate(found[0].variants)
    }
    machine = found[0].machine
    threads = count(machine["threads"], "thread")
    plot_models(
        speeds,
        plot,
        f"{name}: patched against dense, {machine['dtype']} on {machine['device']}, {threads}",
    )
