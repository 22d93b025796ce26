"""`retrofit generate`: pictures from text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import options
from retrofit.commands.console import count, print_json, print_lines, result, say
from retrofit.errors import InputError, NotFoundError

if TYPE_CHECKING:
    from retrofit.generate import Generator
    from retrofit.generate.request import Request
    from retrofit.generate.running import Picture
    from retrofit.generate.watching import TimeSaved

DEFAULT_MODEL = "shapes"
LONG = 60.0  # seconds from which on a run's time is said before it
INTERRUPTED = 130
PICTURE = "What it shows"
SAMPLING = "How it is sampled"
ADAPTERS = "What is added to the model"
LINES = 10  # of progress for each picture, where there is no terminal


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A text-to-image pipeline: a folder, a hub id, or a .safetensors file. The small "
            "bundled model `shapes` by default.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", help="What to draw; may be repeated.", rich_help_panel=PICTURE
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", help="One prompt a line.", rich_help_panel=PICTURE),
    ] = None,
    negative: Annotated[
        str | None, typer.Option("--negative", help="What not to draw.", rich_help_panel=PICTURE)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="WxH",
            help="Pixels; the training size by default.",
            rich_help_panel=PICTURE,
        ),
    ] = None,
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", help="For each prompt.", rich_help_panel=PICTURE)
    ] = 1,
    image: Annotated[
        Path | None,
        typer.Option("--image", help="A picture to start from.", rich_help_panel=PICTURE),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            "--mask", help="White where --image is painted anew.", rich_help_panel=PICTURE
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength", help="How much of --image goes, 0 to 1.", rich_help_panel=PICTURE
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Denoising steps.", rich_help_panel=SAMPLING)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Guidance scale.", rich_help_panel=SAMPLING),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            help="Of the first picture; each further one adds 1.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler", help="ddim, euler, dpmsolver, lcm, ...", rich_help_panel=SAMPLING
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option("--eta", help="Noise that DDIM adds, 0 to 1.", rich_help_panel=SAMPLING),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", help="Pictures in one call.", rich_help_panel=SAMPLING)
    ] = 1,
    method: options.Method = None,
    recipe: options.RecipeFile = None,
    settings: options.Settings = None,
    sites: options.Sites = None,
    config: options.Config = "",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="FILE[:WEIGHT]",
            help="File or hub id; may be repeated.",
            rich_help_panel=ADAPTERS,
        ),
    ] = None,
    controlnet: Annotated[
        str | None,
        typer.Option("--controlnet", help="A folder or a hub id.", rich_help_panel=ADAPTERS),
    ] = None,
    control_image: Annotated[
        Path | None,
        typer.Option("--control-image", help="What it looks at.", rich_help_panel=ADAPTERS),
    ] = None,
    control_scale: Annotated[
        float | None, typer.Option("--control-scale", help="Its weight.", rich_help_panel=ADAPTERS)
    ] = None,
    ip_adapter: Annotated[
        str | None,
        typer.Option(
            "--ip-adapter", help="File, or hub id with its path.", rich_help_panel=ADAPTERS
        ),
    ] = None,
    ip_image: Annotated[
        Path | None,
        typer.Option("--ip-image", help="What it looks at.", rich_help_panel=ADAPTERS),
    ] = None,
    ip_scale: Annotated[
        float | None, typer.Option("--ip-scale", help="Its weight.", rich_help_panel=ADAPTERS)
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(
            "--offload",
            help="Let networks (model) or their layers (sequential) wait on the CPU.",
            rich_help_panel=options.WHERE,
        ),
    ] = None,
    vae_tiling: Annotated[
        bool,
        typer.Option(
            "--vae-tiling", help="Decode in tiles, in less memory.", rich_help_panel=options.WHERE
        ),
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE",
            help="A PNG; several pictures are numbered.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="PNG",
            help="Make the picture of this PNG again, changed by what else is given.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    preview: Annotated[
        bool,
        typer.Option(
            "--preview",
            help="First write NAME-preview.png, dense at the training size.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    no_time_saved: Annotated[
        bool,
        typer.Option(
            "--no-time-saved",
            help="Leave out the dense call at the end that tells the time saved.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    r"""Make pictures, also at two and four times the size a model was trained at.

    Any text-to-image pipeline of diffusers, patched or not; with --method, patched in memory. Each
    PNG holds its whole recipe, so --like makes it again, pixel for pixel on the same machine.

    [bold]Examples[/bold]

    $ retrofit generate --prompt "a red star" -o star.png
    $ retrofit generate --prompt "a red star" --size 256x256 --method hidiffusion -o star.png
    $ retrofit generate sdxl/ -p "a lighthouse" --size 2048x2048 -m hidiffusion --preview -o x.png
    $ retrofit generate sd15/ --prompt-file prompts.txt -n 4 --seed 7 -o out.png
    $ retrofit generate --like star.png -o again.png

    [bold]In Python[/bold]

    from retrofit.generate import Generator, Request
    request = Request(model="sdxl/", prompts=("a lighthouse",), seeds=(0,), width=2048, height=2048)
    for picture in Generator(request, "hidiffusion").pictures(): picture.save("out.png")
    """
    if out is None:
        raise InputError("expected -o FILE, a PNG. Say where to write.")
    for name, value in {"num-images": num_images, "batch": batch}.items():
        options.require_positive(name, value)
    from retrofit.generate import Generator

    width, height = options.read_size(size)
    given = {
        "negative": negative,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance": guidance,
        "eta": eta,
        "scheduler": scheduler,
        "loras": tuple(map(_read_lora, lora)) if lora else None,
        "image": _read_input(image, "--image"),
        "mask": _read_input(mask, "--mask"),
        "strength": strength,
        "controlnet": controlnet,
        "control_image": _read_input(control_image, "--control-image"),
        "control_scale": control_scale,
        "ip_adapter": ip_adapter,
        "ip_image": _read_input(ip_image, "--ip-image"),
        "ip_scale": ip_scale,
        "offload": offload,
        "vae_tiling": vae_tiling or None,
        "device": device,
        "dtype": dtype,
        "config": config or None,
        "trust_remote_code": trust_remote_code or None,
    }
    prompts = _read_prompts(prompt, prompt_file)
    what = None if method is None and recipe is None else options.read_recipe(method, recipe)
    parameters = options.read_settings(settings)
    if what is None and (parameters or sites):
        raise InputError("--set and --sites need --method or --recipe. Name one.")
    request, place, made_of = _make_request(
        model, prompts, seed, num_images, batch, given, like, patched=what is not None
    )
    files = _names(out, len(request.prompts) if place is None else 1, preview, force=force)
    with Generator(request, what, sites=sites or (), **parameters) as generator:
        _refuse_other_model(generator, made_of, like)
        _generate(generator, files, place, preview, saving=not no_time_saved, as_json=json)


def _read_lora(text: str) -> tuple[str, float]:
    """`file.safetensors:0.8` as path and weight; the weight is 1 if there is none."""
    path, separator, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if separator else (text, 1.0)
    except ValueError:
        return text, 1.0


def _read_input(path: Path | None, what: str) -> Any:
    from retrofit.generate.request import InputFile

    return None if path is None else InputFile.read(path, what)


def _read_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    if file is None:
        return list(prompts or [])
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise NotFoundError(
            f"--prompt-file {file}: can't be read ({reason}). Give a text file with one prompt a "
            "line."
        ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InputError(f"--prompt-file {file}: holds no prompt. Write one a line.")
    return [*(prompts or []), *found]


def _make_request(
    model: str | None,
    prompts: list[str],
    seed: int | None,
    num_images: int,
    batch: int,
    given: dict[str, Any],
    like: Path | None,
    *,
    patched: bool,
) -> tuple[Request, int | None, dict[str, Any] | None]:
    """The request, which of its pictures is wanted (None: all), and what --like was made of."""
    from retrofit.generate.request import Request

    given = {key: value for key, value in given.items() if value is not None}
    if like is None:
        pictures = [text for text in prompts for _ in range(num_images)]
        seeds = tuple((seed or 0) + i for i in range(len(pictures)))
        if not pictures:
            raise InputError(
                'expected --prompt or --prompt-file. Say what to draw, as in -p "a cat".'
            )
        request = Request(
            model=model or DEFAULT_MODEL,
            prompts=tuple(pictures),
            seeds=seeds,
            batch=batch,
            **given,
        )
        return request, None, None
    from retrofit.generate.png import read_record

    record = read_record(like)
    request = Request.from_dict(record.get("request") or {}, f"--like {like}")
    place = int(record.get("place", 0))
    if len(prompts) > 1 or num_images > 1:
        raise InputError("--like: makes one picture. Give one --prompt at most, and no -n.")
    if prompts or seed is not None:
        request, place = request.only([place]), 0
    request = replace(
        request,
        **given,
        **({"model": model} if model else {}),
        **({"prompts": tuple(prompts)} if prompts else {}),
        **({"seeds": (seed,)} if seed is not None else {}),
        **({"recipe": None} if patched else {}),
    )
    request.check_files()
    return request, place, None if model else record.get("model")


def _refuse_other_model(
    generator: Generator, made_of: dict[str, Any] | None, like: Path | None
) -> None:
    """Refuse a checkpoint that changed since the picture of `--like` was made."""
    from retrofit.generate.pipelines import fingerprint

    if made_of is None or made_of.get("fingerprint") == fingerprint(generator.checkpoint):
        return
    raise InputError(
        f"--like {like}: made with other weights than {generator.request.model} has now. Name the "
        "checkpoint, as in `retrofit generate MODEL --like ...`, to take it all the same."
    )


def _names(out: Path, number: int, preview: bool, *, force: bool) -> list[Path]:
    """Names of the pictures, and of the preview at the end."""
    from retrofit.generate.png import name_outputs, refuse_outputs

    files = name_outputs(out, number)
    refuse_outputs([*files, _preview_of(files[0])] if preview else files, force=force)
    return files


def _preview_of(file: Path) -> Path:
    return file.with_name(f"{file.stem}-preview.png")


def _generate(
    generator: Generator,
    files: list[Path],
    place: int | None,
    preview: bool,
    *,
    saving: bool,
    as_json: bool,
) -> None:
    """Make the pictures, write each as soon as it is done, and say what they cost."""
    from retrofit.checkpoint.libraries import quiet_libraries

    done: list[tuple[Path, Picture]] = []
    _say_expected_time(generator)
    try:
        with quiet_libraries(), _progress() as progress:
            progress("loading", 0, 1)
            opened = generator.open()
            _hint(generator)
            if preview:
                _write_preview(generator, _preview_of(files[0]), progress)
            for picture in generator.pictures(progress):
                if place is not None and picture.place != place:
                    continue
                file = files[0 if place is not None else picture.place]
                picture.save(file)
                done.append((file, picture))
            saved = generator.time_saved() if saving else None
    except KeyboardInterrupt:
        left = len(files) - len(done)
        kept = ", ".join(str(file) for file, _ in done) or "none"
        say(f"stopped: {count(left, 'picture')} not made; finished: {kept}")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(_as_json(generator, opened, done, saved))
    else:
        print_lines(*_describe(generator, opened, done, saved))


def _write_preview(generator: Generator, file: Path, progress: Any) -> None:
    picture = generator.preview(progress)
    if picture is None:
        say("preview: left out, the checkpoint does not say its training size")
        return
    picture.save(file)
    say(f"preview: {file} ({picture.image.width}x{picture.image.height})")


def _say_expected_time(generator: Generator) -> None:
    """Say how long a long run on a CPU will take, before it begins."""
    from retrofit.generate.expected import expected_seconds

    seconds = expected_seconds(generator.checkpoint, generator.request)
    if seconds is not None and seconds > LONG:
        dense = "" if generator.request.recipe is None else ", if it were dense"
        say(f"on this CPU: about {_spell(seconds)}{dense} (from the work of a step)")


def _hint(generator: Generator) -> None:
    """Say what will not come out well."""
    from retrofit.generate.sizes import explain_size

    hint = explain_size(generator.request, generator.checkpoint)
    if hint is not None:
        say(f"note: {hint}")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left on a terminal; elsewhere some lines with it; on stderr."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    started: dict[str, float] = {}
    with bars.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task("")

        def advance(what: str, done: int, total: int) -> None:
            if what not in started:
                started[what] = time.monotonic()
                shown.reset(task)
            shown.update(task, description=what, completed=done, total=total)
            if not console.is_terminal and done and done % max(1, -(-total // LINES)) == 0:
                left = (time.monotonic() - started[what]) / done * (total - done)
                say(f"{what}: step {done} of {total}, {_spell(left)} left")

        yield advance


def _spell(seconds: float) -> str:
    """`40 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _describe(
    generator: Generator,
    opened: Any,
    done: list[tuple[Path, Picture]],
    saved: TimeSaved | None,
) -> list[str]:
    lines = []
    if opened.handle is not None:
        report = opened.handle.report
        lines.append(f"{', '.join(report.families)}: {report}")
    lines += [
        f"wrote {file}: {picture.image.width}x{picture.image.height}, seed {picture.seed}, "
        f"{picture.seconds:.1f} s"
        + (f" for {n} at once" if (n := generator.request.batch) > 1 else "")
        for file, picture in done
    ]
    if saved is not None:
        what = "saved" if saved.seconds >= 0 else "lost: at this size the patch does not pay"
        lines.append(
            f"denoising: {saved.patched_seconds:.1f} s, dense {saved.dense_seconds:.1f} s "
            f"({saved.calls} calls of {saved.dense_call_seconds:.2f} s, one timed after this run): "
            f"{abs(saved.seconds):.1f} s ({abs(saved.fraction):.0%}) {what}"
        )
    if len(done) == 1:
        lines.append(f"again: retrofit generate --like {done[0][0]} -o again.png")
    return lines


def _as_json(
    generator: Generator,
    opened: Any,
    done: list[tuple[Path, Picture]],
    saved: TimeSaved | None,
) -> dict[str, Any]:
    handle = opened.handle
    report = None if handle is None else handle.report
    request = generator.request.to_dict()
    return result(
        family=report.families[0] if report else None,
        method=report.method if report else None,
        patched=report.patched if report else (),
        skipped=[(skip.path, skip.reason) for skip in report.skipped] if report else (),
        keep_asked=getattr(handle.recipe.method, "keep", None) if handle else None,
        pictures=[
            {
                "file": str(file),
                "prompt": picture.prompt,
                "seed": picture.seed,
                "width": picture.image.width,
                "height": picture.image.height,
                "seconds": picture.seconds,
            }
            for file, picture in done
        ],
        request=request,
        time_saved=None
        if saved is None
        else {
            **{item.name: getattr(saved, item.name) for item in fields(saved)},
            "dense_seconds": saved.dense_seconds,
            "seconds": saved.seconds,
            "fraction": saved.fraction,
        },
    )
