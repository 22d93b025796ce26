"""`retrofit inspect`: what a checkpoint's attention is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import options
from retrofit.commands.console import (
    print_json,
    print_lines,
    print_table,
    result,
    without_collector,
)

SI = (("T", 1e12), ("G", 1e9), ("M", 1e6))
BIG = (("billion ", 1e9), ("million ", 1e6))

if TYPE_CHECKING:
    from retrofit.checkpoints import Checkpoint
    from retrofit.profiling.inspection import NetworkReport, SiteRow


def run(
    model: options.Model,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="WxH", help="Pixels of a picture, video or view."),
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--frames", help="Frames of a video, views of a scene.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Length of a text.")] = None,
    component: options.Components = None,
    config: options.Config = "",
    every: Annotated[
        bool, typer.Option("--all", help="One row for every site, not one for alike ones.")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    r"""Show the attention of a checkpoint: every site, its tokens, its share of the work.

    Reads configs only; of a hub id no weights are fetched.

    [bold]Examples[/bold]

    $ retrofit inspect stabilityai/stable-diffusion-xl-base-1.0 --size 2048x2048
    unet: unet2d (UNet2DConditionModel), 2.57 billion parameters, latents 256x256
    one call: 35.9 TFLOP, attention 33.9% of it, in 140 sites
    sites                                                           kind  tokens  of the work
    unet.down_blocks.1.attentions.*.transformer_blocks.*.attn1  x4  self   16384         7.7%
    ...
    methods that apply: block-sparse, clear, hidiffusion, neighborhood, window

    $ retrofit inspect minilm/ --tokens 512
    $ retrofit inspect wan/ --size 1920x1080 --frames 81 --json

    [bold]In Python[/bold]

    from retrofit.profiling.inspection import AskedSize, inspect_checkpoint
    inspect_checkpoint(find_checkpoint("minilm/"), AskedSize(tokens=512))
    """
    width, height = options.read_size(size)
    options.require_positive("frames", frames)
    options.require_positive("tokens", tokens)

    with without_collector():
        from retrofit.checkpoints import find_checkpoint
        from retrofit.checkpoints.read_past import summarise, tensors_read_past
        from retrofit.profiling.inspection import AskedSize, inspect_checkpoint

        checkpoint = find_checkpoint(model, weights=False, config=config)
        reports = inspect_checkpoint(
            checkpoint,
            AskedSize(width=width, height=height, frames=frames, tokens=tokens),
            components=component or (),
            trust_remote_code=trust_remote_code,
        )
    if json:
        print_json(_as_json(checkpoint, reports))
        return
    if checkpoint.manifest is not None:
        recipe = checkpoint.manifest.recipe
        print_lines(f"patched with {recipe['method']}: {recipe['parameters']}", "")
    for report in reports:
        _print(report, every)
    unused = tensors_read_past(checkpoint)
    if unused:
        print_lines(f"read past, the network has no such part: {summarise(unused)}")


def _print(report: NetworkReport, every: bool) -> None:
    name = report.name or report.class_name
    unit = "latents" if report.latent_scale[1] > 1 else "input"
    print_lines(
        f"{name}: {report.family} ({report.class_name}), "
        f"{_format(report.num_parameters, 'parameters', BIG)}, {unit} {report.size}",
        f"one call: {_format(report.flops, 'FLOP', SI)}, attention "
        f"{report.attention_share:.1%} of it, in {len(report.sites)} sites",
    )
    groups = [[row] for row in report.sites] if every else _group(report.sites)
    print_table(
        ("sites", "", "kind", "heads", "head dim", "tokens", "keys", "of the work"),
        [_table_row(group, report.flops) for group in groups],
    )
    for path, why in report.unreachable.items():
        print_lines(f"out of reach: {path}: {why}")
    print_lines("methods that apply: " + ", ".join(k for k, v in report.methods.items() if not v))
    for method, reason in report.methods.items():
        if reason:
            print_lines(f"  not {method}: {reason}")


def _group(rows: Sequence[SiteRow]) -> list[list[SiteRow]]:
    """Sites of one part of the network that are alike, numbers in their paths aside."""
    groups: dict[tuple[Any, ...], list[SiteRow]] = {}
    for row in rows:
        start, *rest = row.path.split(".")
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", ".".join(rest[2:]))
        head = ".".join([start, *rest[:2]])
        site = row.site
        key = (head, pattern, site.kind, site.num_heads, site.head_dim, row.tokens, row.keys)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _table_row(rows: list[SiteRow], total: int) -> tuple[str, ...]:
    first = rows[0]
    share = sum(row.flops for row in rows) / total if total else 0.0
    return (
        first.path if len(rows) == 1 else _common_path([row.path for row in rows]),
        f"x{len(rows)}",
        first.site.kind if first.site.scope == "global" else f"{first.site.kind}, frame",
        str(first.site.num_heads),
        str(first.site.head_dim),
        str(first.tokens),
        str(first.keys),
        f"{100 * share:.1f}%",
    )


def _common_path(paths: list[str]) -> str:
    """The paths with `*` where they differ: a glob for `--sites`."""
    columns = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in columns)


def _as_json(checkpoint: Checkpoint, reports: Sequence[NetworkReport]) -> dict[str, Any]:
    from retrofit.checkpoints.read_past import tensors_read_past
    from retrofit.patching.recipe import method_names

    manifest = checkpoint.manifest
    return result(
        family=reports[0].family,
        method=None if manifest is None else method_names(manifest.recipe),
        patched=[] if manifest is None else manifest.patched,
        skipped=[
            (path, reason) for report in reports for path, reason in report.unreachable.items()
        ],
        layout=checkpoint.layout,
        tensors_read_past=tensors_read_past(checkpoint),
        networks=[_network_json(report) for report in reports],
    )


def _network_json(report: NetworkReport) -> dict[str, Any]:
    return {
        "name": report.name,
        "class": report.class_name,
        "family": report.family,
        "size": vars(report.size),
        "latent_scale": list(report.latent_scale),
        "parameters": report.num_parameters,
        "flops": report.flops,
        "attention_flops": report.attention_flops,
        "attention_share": report.attention_share,
        "methods": {name: reason or "applies" for name, reason in report.methods.items()},
        "sites": [_site_json(row) for row in report.sites],
    }


def _site_json(row: SiteRow) -> dict[str, Any]:
    site = row.site
    return {
        "path": row.path,
        "kind": site.kind,
        "scope": site.scope,
        "block": site.block,
        "index": site.index,
        "heads": site.num_heads,
        "head_dim": site.head_dim,
        "tokens": row.tokens,
        "keys": row.keys,
        "flops": row.flops,
    }


def _format(number: int, unit: str, scales: Sequence[tuple[str, float]]) -> str:
    for prefix, scale in scales:
        if number >= scale:
            return f"{number / scale:.3g} {prefix}{unit}"
    return f"{number} {unit}"
