"""`retrofit generate`: pictures from text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.commands import generate_options as chosen
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
    refuse_sheet,
)
from retrofit.commands.generate_output import (
    as_json as show_json,
)
from retrofit.commands.generate_output import (
    describe,
    draw_sheet,
    say_expected_time,
    say_hint,
    say_notes,
    show_progress,
    write_preview,
)
from retrofit.runtime.errors import InputError, StoppedError
from retrofit.runtime.interrupts import raise_if_interrupted

if TYPE_CHECKING:
    from retrofit.sampling import Generator
    from retrofit.sampling.running import Picture


def run(
    model: chosen.OptionalModel = None,
    prompt: chosen.Prompt = None,
    prompt_file: chosen.PromptFile = None,
    negative: chosen.Negative = None,
    size: chosen.Size = None,
    num_images: chosen.NumImages = 1,
    image: chosen.Image = None,
    mask: chosen.Mask = None,
    strength: chosen.Strength = None,
    steps: chosen.Steps = None,
    guidance: chosen.Guidance = None,
    seed: chosen.Seed = None,
    scheduler: chosen.Scheduler = None,
    eta: chosen.Eta = None,
    batch: chosen.Batch = 1,
    method: options.Method = None,
    recipe: options.RecipeFile = None,
    settings: options.Settings = None,
    sites: options.Sites = None,
    config: options.Config = "",
    lora: chosen.Lora = None,
    controlnet: chosen.Controlnet = None,
    control_image: chosen.ControlImage = None,
    control_scale: chosen.ControlScale = None,
    ip_adapter: chosen.IpAdapter = None,
    ip_image: chosen.IpImage = None,
    ip_scale: chosen.IpScale = None,
    offload: chosen.Offload = None,
    vae_tiling: chosen.VaeTiling = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: chosen.Out = None,
    like: chosen.Like = None,
    preview: chosen.Preview = False,
    sheet: chosen.Sheet = None,
    no_time_saved: chosen.NoTimeSaved = False,
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
    unet2d: hidiffusion: patched 5 of 32 attention sites, 10 other modules
    wrote large.png: 256x256, seed 0, 5.2 s
    denoising: 4.8 s, dense 4.7 s (25 calls of 0.19 s, as 2 timed after this run): no difference
    beyond what two runs of the same work differ by

    $ retrofit generate sdxl/ -p "a lighthouse" --size 2048x2048 -m hidiffusion --preview -o x.png
    $ retrofit generate sd15/ --prompt-file prompts.txt -n 4 --seed 7 -o out.png
    $ retrofit generate --like star.png -o again.png

    [bold]In Python[/bold]

    from retrofit.sampling import Generator, Request
    request = Request(model="sdxl/", prompts=("a lighthouse",), seeds=(0,), width=2048, height=2048)
    for picture in Generator(request, "hidiffusion").pictures(): picture.save("out.png")
    """
    if out is None:
        raise InputError("expected -o FILE, a PNG. Say where to write.")
    for name, value in {"num-images": num_images, "batch": batch}.items():
        options.require_positive(name, value)
    from retrofit.sampling import Generator

    width, height = options.read_size(size)
    given: dict[str, Any] = {
        "negative": negative,
        "width": width,
        "height": height,
        "strength": strength,
    }
    given |= {"steps": steps, "guidance": guidance, "eta": eta, "scheduler": scheduler}
    given |= {"controlnet": controlnet, "control_scale": control_scale}
    given |= {"ip_adapter": ip_adapter, "ip_scale": ip_scale}
    given |= {"loras": tuple(map(read_lora, lora)) if lora else None}
    given |= {"offload": offload, "vae_tiling": vae_tiling or None}
    given |= {"device": device, "dtype": dtype, "threads": threads, "config": config or None}
    given |= {"trust_remote_code": trust_remote_code or None}
    pictures = {"image": image, "mask": mask, "control_image": control_image, "ip_image": ip_image}
    given |= {name: read_input(file, name) for name, file in pictures.items()}
    prompts = read_prompts(prompt, prompt_file)
    what = None if method is None and recipe is None else options.read_recipe(method, recipe)
    parameters = options.read_settings(settings)
    request, place, record = make_request(
        model, prompts, seed, num_images, batch, given, like, patched=what is not None
    )
    number = len(request.prompts) if place is None else 1
    refuse_sheet(sheet, force=force)
    files = name_files(out, number, preview, request, force=force)
    recorded = [] if like is None else [name for name, value in given.items() if value is None]
    with Generator(request, what, sites=sites or (), recorded=recorded, **parameters) as generator:
        refuse_other_model(generator, record, like)
        if what is not None:
            note_replaced_patch(generator)
        saving = not no_time_saved
        _generate(generator, files, place, preview, sheet, saving=saving, as_json=json)


def _generate(
    generator: Generator,
    files: list[Path],
    place: int | None,
    preview: bool,
    sheet: Path | None,
    *,
    saving: bool,
    as_json: bool,
) -> None:
    """Make the pictures, write each as soon as it is done, and say what they cost."""
    from retrofit.checkpoints.warned import collecting_warnings

    done: list[tuple[Path, Picture]] = []
    say_expected_time(generator)
    try:
        with collecting_warnings(), show_progress() as progress:
            progress("loading", 0, 1)
            opened = generator.open()
            say_notes(opened)
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
            idle = generator.explain_no_change()
            saved = generator.time_saved() if saving else None
    except KeyboardInterrupt:
        left = len(files) - len(done)
        kept = ", ".join(str(file) for file, _ in done) or "none"
        raise StoppedError(
            f"stopped: {count(left, 'picture')} not made; finished: {kept}"
        ) from None
    if sheet is not None:
        draw_sheet(done, sheet)
    if as_json:
        print_json(show_json(generator, opened, done, saved, idle))
    else:
        print_lines(*describe(generator, opened, done, saved, idle))
