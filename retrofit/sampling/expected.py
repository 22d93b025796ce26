"""How long a run will take on a CPU, from the work of one step, before anything is loaded."""

from __future__ import annotations

import torch

from retrofit.checkpoints import Checkpoint
from retrofit.profiling.inspection import AskedSize, inspect_checkpoint
from retrofit.runtime.devices import on_accelerator, pick_device
from retrofit.runtime.errors import InputError
from retrofit.runtime.timing import timed
from retrofit.sampling.request import Request
from retrofit.sampling.sizes import LEAST_MULTIPLE, denoiser_name

PROBE = 768  # side of the matrices whose product is timed
SHARE = 0.5  # of a plain product's speed that a network reaches, as measured on UNets
QUICK = 30.0  # seconds
WITH_ATTENTION = 2.0  # times the work of the weights, at most, at sizes that are quick
BYTES = 2  # of a weight, at least


def expected_seconds(checkpoint: Checkpoint, request: Request) -> float | None:
    """Seconds that the denoising of all pictures takes, dense; None off the CPU or if unknown.

    A step's work is counted on networks without weights, and divided by the speed at which this
    machine multiplies matrices. It can be off by a factor of two either way.
    """
    if on_accelerator(pick_device(request.device)):
        return None
    rows = 1 if request.guidance is not None and request.guidance <= 1 else 2
    part = request.strength if request.image is not None and request.strength else 1.0
    calls = rows * (request.steps or 50) * part * len(request.prompts)
    speed = SHARE * product_speed()
    if calls * _most_work(checkpoint, request) < QUICK * speed:
        return QUICK  # counting would take longer than it is worth
    asked = AskedSize(width=request.width, height=request.height)
    try:
        reports = inspect_checkpoint(checkpoint, asked, trust_remote_code=request.trust_remote_code)
    except InputError:  # a family without example inputs
        return None
    return calls * max(report.flops for report in reports) / speed


def _most_work(checkpoint: Checkpoint, request: Request) -> float:
    """More than one call of the network can cost: all weights at every place of the latent."""
    folder = checkpoint.weight_folder(denoiser_name(checkpoint))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not size or request.width is None or request.height is None:
        return float("inf")
    places = request.width * request.height / LEAST_MULTIPLE**2
    return WITH_ATTENTION * size / BYTES * 2 * places


def product_speed() -> float:
    """Floating-point operations a second of a matrix product in float32."""
    a = torch.rand(PROBE, PROBE)
    best = min(timed(lambda: a @ a)[1] for _ in range(3))
    return 2 * PROBE**3 / best
