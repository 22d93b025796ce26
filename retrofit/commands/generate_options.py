"""The options of `retrofit generate`, in the groups that its help shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrofit.commands import options

PICTURE = "What it shows"
SAMPLING = "How it is sampled"
ADAPTERS = "What is added to the model"

OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A text-to-image pipeline: a folder, a hub id, or a .safetensors file. The small "
        "bundled model `shapes` by default.",
        show_default=False,
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="What to draw; may be repeated.", rich_help_panel=PICTURE),
]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompt-file", help="One prompt a line.", rich_help_panel=PICTURE),
]
Negative = Annotated[
    str | None, typer.Option("--negative", help="What not to draw.", rich_help_panel=PICTURE)
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="WxH",
        help="Pixels; by default those of --image or --control-image, else the training size.",
        rich_help_panel=PICTURE,
    ),
]
NumImages = Annotated[
    int, typer.Option("--num-images", "-n", help="For each prompt.", rich_help_panel=PICTURE)
]
Image = Annotated[
    Path | None,
    typer.Option("--image", help="A picture to start from.", rich_help_panel=PICTURE),
]
Mask = Annotated[
    Path | None,
    typer.Option("--mask", help="White where --image is painted anew.", rich_help_panel=PICTURE),
]
Strength = Annotated[
    float | None,
    typer.Option("--strength", help="How much of --image goes, 0 to 1.", rich_help_panel=PICTURE),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps.", rich_help_panel=SAMPLING)
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", help="Guidance scale.", rich_help_panel=SAMPLING),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="Of the first picture; each further one adds 1.",
        rich_help_panel=SAMPLING,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option("--scheduler", help="ddim, euler, dpmsolver, lcm, ...", rich_help_panel=SAMPLING),
]
Eta = Annotated[
    float | None,
    typer.Option("--eta", help="Noise that DDIM adds, 0 to 1.", rich_help_panel=SAMPLING),
]
Batch = Annotated[
    int, typer.Option("--batch", help="Pictures in one call.", rich_help_panel=SAMPLING)
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:WEIGHT]",
        help="File or hub id; may be repeated.",
        rich_help_panel=ADAPTERS,
    ),
]
Controlnet = Annotated[
    str | None,
    typer.Option("--controlnet", help="A folder or a hub id.", rich_help_panel=ADAPTERS),
]
ControlImage = Annotated[
    Path | None,
    typer.Option("--control-image", help="What it looks at.", rich_help_panel=ADAPTERS),
]
ControlScale = Annotated[
    float | None, typer.Option("--control-scale", help="Its weight.", rich_help_panel=ADAPTERS)
]
IpAdapter = Annotated[
    str | None,
    typer.Option("--ip-adapter", help="File, or hub id with its path.", rich_help_panel=ADAPTERS),
]
IpImage = Annotated[
    Path | None,
    typer.Option("--ip-image", help="What it looks at.", rich_help_panel=ADAPTERS),
]
IpScale = Annotated[
    float | None, typer.Option("--ip-scale", help="Its weight.", rich_help_panel=ADAPTERS)
]
Offload = Annotated[
    str | None,
    typer.Option(
        "--offload",
        help="Let networks (model) or their layers (sequential) wait on the CPU.",
        rich_help_panel=options.WHERE,
    ),
]
VaeTiling = Annotated[
    bool,
    typer.Option(
        "--vae-tiling", help="Decode in tiles, in less memory.", rich_help_panel=options.WHERE
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--out",
        metavar="FILE",
        help=f"A PNG; several pictures are numbered. {options.FOLDERS_MADE}",
        rich_help_panel=options.OUTPUT,
    ),
]
Like = Annotated[
    Path | None,
    typer.Option(
        "--like",
        metavar="PNG",
        help="Make the picture of this PNG again, changed by what else is given.",
        rich_help_panel=options.OUTPUT,
    ),
]
Preview = Annotated[
    bool,
    typer.Option(
        "--preview",
        help="First write NAME-preview.png, dense at the training size.",
        rich_help_panel=options.OUTPUT,
    ),
]
Sheet = Annotated[
    Path | None,
    typer.Option(
        "--sheet",
        metavar="FILE",
        help="Also a contact sheet, a PNG with a row for each prompt.",
        rich_help_panel=options.OUTPUT,
    ),
]
NoTimeSaved = Annotated[
    bool,
    typer.Option(
        "--no-time-saved",
        help="Leave out the dense call at the end that tells the time saved.",
        rich_help_panel=options.OUTPUT,
    ),
]
