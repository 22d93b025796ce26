"""Call a pipeline for one batch of pictures, and look at what comes out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from retrofit.runtime.errors import NonFiniteError, RetrofitError
from retrofit.runtime.finite import is_finite
from retrofit.runtime.pictures import read_photo
from retrofit.runtime.timing import timed
from retrofit.runtime.versions import current_versions
from retrofit.sampling.advice import enlarging_methods
from retrofit.sampling.png import write_png
from retrofit.sampling.unread import find_unread, note_unread
from retrofit.sampling.watching import DTYPES, Watch

if TYPE_CHECKING:
    from retrofit.sampling.pipelines import Opened
    from retrofit.sampling.request import InputFile, Request

Progress = Callable[[str, int, int], None]
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A finished picture.

    Attributes:
        image: Its pixels.
        place: Its index in the request.
        prompt: What it shows.
        seed: Of its noise.
        seconds: Of the call that made it, shared with the rest of its batch.
        record: What its file holds besides the pixels.
    """

    image: Image.Image
    place: int
    prompt: str
    seed: int
    seconds: float
    record: Mapping[str, Any]

    def save(self, file: str | Path) -> None:
        """Write it as a PNG that carries its recipe."""
        write_png(self.image, Path(file), self.record)


def run_batch(
    opened: Opened, request: Request, watch: Watch, name: str, progress: Progress | None
) -> list[Picture]:
    """Make the pictures of a request in one call.

    Args:
        opened: The pipeline.
        request: One batch.
        watch: On its denoising network.
        name: For the progress.
        progress: Called as `progress(what, done, total)`.

    Raises:
        NonFiniteError: If NaN or an all-black picture comes out.
        RetrofitError: If memory runs out.
    """
    pipeline = opened.pipeline
    arguments = call_arguments(pipeline, request)
    watch.begin(request.steps or 0)

    def step_done(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        watch.num_steps = getattr(pipeline, "_num_timesteps", 0) or watch.num_steps
        watch.step = step + 1
        if progress is not None:
            progress(name, step + 1, watch.num_steps)
        return values

    if "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters:
        arguments["callback_on_step_end"] = step_done
    watch.num_steps = effective_steps(request)
    if progress is not None:
        progress(name, 0, watch.num_steps)
    with explaining_out_of_memory(request, pipeline), watch:
        output, seconds = timed(lambda: pipeline(**arguments))
    unread = [find_unread(pipeline, request, i) for i in range(len(request.prompts))]
    for words in unread:
        note_unread(words)
    images = [_to_image(pixels, output, i, request) for i, pixels in enumerate(output.images)]
    return [
        Picture(
            image=image,
            place=i,
            prompt=request.prompts[i],
            seed=request.seeds[i],
            seconds=seconds,
            record={
                "request": request.to_dict(),
                "place": i,
                "model": {"fingerprint": opened.fingerprint},
                "versions": current_versions(),
                **({"unread": unread[i]} if unread[i] else {}),
            },
        )
        for i, image in enumerate(images)
    ]


def effective_steps(request: Request) -> int:
    """Steps that are run: fewer than asked for where a picture is the start."""
    steps = request.steps or 0
    if request.image is None or request.strength is None:
        return steps
    return max(1, min(int(steps * request.strength), steps))


def call_arguments(pipeline: Any, request: Request) -> dict[str, Any]:
    """Arguments of the pipeline's call."""
    known = inspect.signature(type(pipeline).__call__).parameters
    generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    arguments: dict[str, Any] = {
        "prompt": list(request.prompts),
        "num_inference_steps": request.steps,
        "generator": generators,
        "output_type": "np",
    }
    if request.negative is not None:
        arguments["negative_prompt"] = [request.negative] * len(request.prompts)
    optional = {
        "guidance_scale": request.guidance,
        "eta": request.eta,
        "strength": request.strength,
        "controlnet_conditioning_scale": request.control_scale,
        "width": request.width,
        "height": request.height,
    }
    arguments |= {k: v for k, v in optional.items() if v is not None and k in known}
    return arguments | _pictures_in(request, set(known))


def _pictures_in(request: Request, known: set[str]) -> dict[str, Any]:
    """The pictures that go in, at the size that comes out."""
    found: dict[str, Any] = {}
    if request.image is not None:
        found["image"] = _read(request.image, request)
    if request.mask is not None:
        found["mask_image"] = _read(request.mask, request, background="black").convert("L")
    if request.control_image is not None:
        key = "control_image" if "control_image" in known else "image"
        found[key] = _read(request.control_image, request)
    count = len(request.prompts)
    batched: dict[str, Any] = {key: [picture] * count for key, picture in found.items()}
    if request.ip_image is not None:
        batched["ip_adapter_image"] = _read(request.ip_image, None)
    return batched


def _read(file: InputFile, request: Request | None, *, background: str = "white") -> Image.Image:
    picture = read_photo(Path(file.path).expanduser()).over(background)
    if request is None or request.width is None or request.height is None:
        return picture
    return picture.resize((request.width, request.height), Image.Resampling.LANCZOS)


def _to_image(pixels: np.ndarray, output: Any, place: int, request: Request) -> Image.Image:
    """A float picture `[H, W, 3]` as an image.

    Raises:
        NonFiniteError: If it has NaN, or is all black.
    """
    steps = f"after step {effective_steps(request)} of {effective_steps(request)}"
    if not is_finite(torch.from_numpy(pixels)):
        raise NonFiniteError(
            f"vae.decoder: NaN or infinity in the picture {steps}, though the latents are finite. "
            f"{DTYPES}"
        )
    image = Image.fromarray((pixels * 255).round().astype("uint8"))
    flagged = getattr(output, "nsfw_content_detected", None)
    if not image.getbbox():
        if flagged and flagged[place]:
            raise RetrofitError(
                "safety_checker: it blacked the picture out. Change the prompt or the seed."
            )
        raise NonFiniteError(f"vae.decoder: an all-black picture {steps}. {DTYPES}")
    return image


@contextmanager
def explaining_out_of_memory(request: Request, pipeline: Any) -> Iterator[None]:
    """Name the switches that help.

    Raises:
        RetrofitError: If memory ran out inside.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
            words in text for words in OUT_OF_MEMORY
        ):
            raise
        methods = [] if request.recipe else enlarging_methods(pipeline)
        helps = [
            "--batch 1" if request.batch > 1 else "",
            "" if request.vae_tiling else "--vae-tiling",
            "--offload model" if request.offload == "none" and request.device != "cpu" else "",
            "--offload sequential" if request.offload == "model" else "",
            "--dtype bfloat16" if request.dtype in (None, "float32") else "",
            *(f"--method {name}" for name in methods),
            "a smaller --size",
        ]
        raise RetrofitError(
            f"memory ran out at {request.width}x{request.height} on {request.device}. "
            f"These help: {', '.join(filter(None, helps))}."
        ) from error
