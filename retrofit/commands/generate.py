"""`retrofit generate`: pictures from text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrofit.commands import options
from retrofit.commands.console import count, print_json, print_lines
from retrofit.commands.generate_inputs import (
    make_request,
    name_files,
    note_replaced_patch,
    preview_of,
    read_input,
    read_lora,
    read_prompts,
    refuse_other_model,
)
from retrofit.commands.generate_output import (
    as_json as show_json,
)
from retrofit.commands.generate_output import (
    describe,
    say_expected_time,
    say_hint,
    show_progress,
    write_preview,
)
from retrofit.errors import InputError, StoppedError
from retrofit.interrupts import raise_if_interrupted

if TYPE_CHECKING:
    from retrofit.generate import Generator
    from retrofit.generate.running import Picture

PICTURE = "What it shows"
SAMPLING = "How it is sampled"
ADAPTERS = "What is added to the model"


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
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
            help="Pixels; by default those of --image or --control-image, else the training size.",
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
            help=f"A PNG; several pictures are numbered. {options.FOLDERS_MADE}",
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
    PNG holds its whole recipe, so --like makes it again, pixel for pixel on the same machine. --set
    and --sites alone change the recipe of that PNG, or that of a patched checkpoint; --method and
    --recipe replace it.

    [bold]Examples[/bold]

    $ retrofit generate --prompt "a red star" -o star.png
    wrote star.png: 128x128, seed 0, 1.4 s
    again: retrofit generate --like star.png -o again.png

    $ retrofit generate --prompt "a red star" --size 256x256 --method hidiffusion -o large.png
    unet2d: hidiffusion: patched 5 of 32 attention sites
    wrote large.png: 256x256, seed 0, 5.2 s
    denoising: 4.8 s, dense 4.7 s (25 calls of 0.19 s, as 2 timed after this run): 0.1 s (2%)
    lost: at this size the patch does not pay

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
        "loras": tuple(map(read_lora, lora)) if lora else None,
        "image": read_input(image, "--image"),
        "mask": read_input(mask, "--mask"),
        "strength": strength,
        "controlnet": controlnet,
        "control_image": read_input(control_image, "--control-image"),
        "control_scale": control_scale,
        "ip_adapter": ip_adapter,
        "ip_image": read_input(ip_image, "--ip-image"),
        "ip_scale": ip_scale,
        "offload": offload,
        "vae_tiling": vae_tiling or None,
        "device": device,
        "dtype": dtype,
        "config": config or None,
        "trust_remote_code": trust_remote_code or None,
    }
    prompts = read_prompts(prompt, prompt_file)
    what = None if method is None and recipe is None else options.read_recipe(method, recipe)
    parameters = options.read_settings(settings)
    request, place, record = make_request(
        model, prompts, seed, num_images, batch, given, like, patched=what is not None
    )
    number = len(request.prompts) if place is None else 1
    files = name_files(out, number, preview, request, force=force)
    with Generator(request, what, sites=sites or (), **parameters) as generator:
        refuse_other_model(generator, record, like)
        if what is not None:
            note_replaced_patch(generator)
        _generate(generator, files, place, preview, saving=not no_time_saved, as_json=json)


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
    say_expected_time(generator)
    try:
        with quiet_libraries(), show_progress() as progress:
            progress("loading", 0, 1)
            opened = generator.open()
            say_hint(generator)
            if preview:
                write_preview(generator, preview_of(files[0]), progress)
            for picture in generator.pictures(progress):
                if place is not None and picture.place != place:
                    continue
                file = files[0 if place is not None else picture.place]
                picture.save(file)
                done.append((file, picture))
                raise_if_interrupted()
            saved = generator.time_saved() if saving else None
    except KeyboardInterrupt:
        left = len(files) - len(done)
        kept = ", ".join(str(file) for file, _ in done) or "none"
        raise StoppedError(
            f"stopped: {count(left, 'picture')} not made; finished: {kept}"
        ) from None
    if as_json:
        print_json(show_json(generator, opened, done, saved))
    else:
        print_lines(*describe(generator, opened, done, saved))
