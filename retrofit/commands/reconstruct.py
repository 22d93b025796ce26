"""`retrofit reconstruct`: cameras, depth and a point cloud from photos."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import options
from retrofit.commands.console import (
    count,
    format_bytes,
    print_json,
    print_lines,
    report_keys,
    result,
    say,
    stages,
)
from retrofit.runtime.errors import InputError, suggest

if TYPE_CHECKING:
    from retrofit.reconstruct import Reconstructor, Result

VIEWS = "What it sees"
FITS = ("crop", "pad", "area")


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A VGGT or Pi3: a folder, a hub id, a .safetensors file, or the small bundled "
            "model `rooms`.",
            show_default=False,
        ),
    ],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGES...", help="Files, folders, globs, or one video.", show_default=False
        ),
    ] = None,
    every: Annotated[
        int,
        typer.Option("--every", help="Take every n-th frame of a video.", rich_help_panel=VIEWS),
    ] = 10,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            help="crop: width fitted, tall photos cut (VGGT); pad: filled up with white (VGGT); "
            "area: one size for all (Pi3). The network's own by default.",
            rich_help_panel=VIEWS,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            metavar="PIXELS",
            help="Width that photos are fitted to; what the network was trained at by default.",
            rich_help_panel=VIEWS,
        ),
    ] = None,
    method: options.Method = None,
    recipe: options.RecipeFile = None,
    settings: options.Settings = None,
    sites: options.Sites = None,
    config: options.Config = "",
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Keep what waits for the heads in main memory, not on the GPU.",
            rich_help_panel=options.WHERE,
        ),
    ] = False,
    chunk: Annotated[
        int,
        typer.Option(
            "--chunk", help="Views that the heads take at a time.", rich_help_panel=options.WHERE
        ),
    ] = 8,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FOLDER",
            help=options.NEW_FOLDER,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    drop: Annotated[
        float,
        typer.Option(
            "--drop",
            help="Fraction of the pixels, the least sure ones, that give no point.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = 0.1,
    points: Annotated[
        int,
        typer.Option("--points", help="Points at most.", rich_help_panel=options.OUTPUT),
    ] = 2_000_000,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    r"""Reconstruct a scene from photos: cameras, depth maps and a coloured point cloud.

    Writes cameras.json (conventions inside), depth/*.png (16 bits), depth.npy, confidence.npy,
    points.ply, colmap/ (binary) and preview.png. With --method, global attention is patched in
    memory; a patched checkpoint runs as it was saved.

    [bold]Examples[/bold]

    $ retrofit reconstruct rooms examples/rooms/photos/*.png -o scene
    VGGT: 4 views of 64x64 in 0.1 s, predicted peak 26.2 MB besides the libraries
    scene: 14745 points, look at scene/preview.png

    $ retrofit reconstruct facebook/VGGT-1B photos/ --method block-sparse --dtype bfloat16 -o scene
    $ retrofit reconstruct yyfz233/Pi3 walk.mp4 --every 15 -o scene
    $ retrofit reconstruct facebook/VGGT-1B photos/ -m block-sparse --set keep=0.25 -o scene

    [bold]In Python[/bold]

    from retrofit.reconstruct import Reconstructor
    scene = Reconstructor("facebook/VGGT-1B", "block-sparse").run(["a.jpg", "b.jpg"]).scene
    """
    if out is None:
        raise InputError("expected -o FOLDER. Say where to write.")
    for name, value in {"every": every, "size": size, "chunk": chunk, "points": points}.items():
        options.require_positive(name, value)
    if fit is not None and fit not in FITS:
        raise InputError(f"--fit {fit}: unknown. {suggest(fit, FITS)}")
    if not 0 <= drop < 1:
        raise InputError(f"--drop {drop}: expected 0 or more and less than 1.")
    options.set_threads(threads)
    what = None if method is None and recipe is None else options.read_recipe(method, recipe)
    parameters = options.read_settings(settings)
    if what is None and (parameters or sites):
        raise InputError("--set and --sites need --method or --recipe. Name one.")

    from retrofit.reconstruct import Reconstructor, Settings
    from retrofit.reconstruct.inputs import is_video
    from retrofit.runtime.devices import pick_device

    reconstructor = Reconstructor(
        model,
        what,
        settings=Settings(
            fit=fit,  # type: ignore[arg-type]
            size=size,
            device=pick_device(device),
            dtype=dtype,
            offload=offload,
            frames_per_chunk=chunk,
            config=config,
        ),
        sites=tuple(sites or ()),
        **parameters,
    )
    with _open_views(images or [], every) as files:
        lasting = not any(is_video(Path(name)) for name in images or [])
        writing = {"drop": drop, "most": points, "force": force, "lasting": lasting}
        _reconstruct(reconstructor, files, out, json=json, **writing)


def _reconstruct(
    reconstructor: Reconstructor,
    files: list[Path],
    out: Path,
    *,
    json: bool,
    **writing: Any,
) -> None:
    from retrofit.reconstruct.overlap import warn_of_low_overlap
    from retrofit.reconstruct.writing import refuse_target, write_result

    refuse_target(out, files, source=reconstructor.checkpoint.root, force=writing["force"])
    with stages() as advance:
        made = reconstructor.run(files, progress=advance)
        advance("writing", 0, 1)
        written = write_result(made, out, **writing)
    warn_of_low_overlap(made.scene)
    if json:
        print_json(_as_json(made, out, written))
    else:
        _print(made, out, written)


@contextmanager
def _open_views(images: list[str], every: int) -> Iterator[list[Path]]:
    """The files that were named, or frames of a video in a folder that goes away again."""
    from retrofit.reconstruct.inputs import find_images, is_video, read_video

    videos = [name for name in images if is_video(Path(name))]
    if not videos:
        yield find_images(images)
        return
    if len(images) > 1:
        raise InputError(f"{videos[0]}: a video comes alone, got {len(images)} names. Give one.")
    with tempfile.TemporaryDirectory(prefix="retrofit-frames-") as folder:
        files = read_video(Path(videos[0]).expanduser(), every, Path(folder))
        if len(files) < 2:
            raise InputError(
                f"{videos[0]}: every {every}th frame gives {count(len(files), 'view')}, two are "
                "needed. Take a smaller --every."
            )
        say(f"{videos[0]}: {count(len(files), 'view')}")
        yield files


def _as_json(made: Result, out: Path, written: dict[str, Any]) -> dict[str, Any]:
    handle, (_, _, height, width) = made.patch, made.scene.images.shape
    report = None if handle is None else handle.report
    return result(
        family=made.network.lower(),
        **report_keys(report),
        keep_asked=None if handle is None else handle.recipe.keep,
        keep_measured=None if handle is None else handle.keep_measured(),
        out=str(out),
        views=len(made.scene.fits),
        size=[width, height],
        seconds=made.seconds,
        predicted_peak_bytes=made.predicted_bytes,
        **written,
    )


def _print(made: Result, out: Path, written: dict[str, Any]) -> None:
    _, _, height, width = made.scene.images.shape
    lines = [
        f"{made.network}: {count(len(made.scene.fits), 'view')} of {width}x{height} in "
        f"{made.seconds:.1f} s, predicted peak {format_bytes(made.predicted_bytes)} besides the "
        "libraries"
    ]
    if made.patch is not None:
        kept = made.patch.keep_measured()
        measured = "" if kept is None else f", kept {kept:.1%} of the work of these sites"
        lines.append(f"{made.patch.report}{measured}")
    lines.append(f"{out}: {count(written['points'], 'point')}, look at {out / 'preview.png'}")
    print_lines(*lines)
