"""How long a run will take on a CPU, from the work of one step, before anything is loaded."""

from __future__ import annotations

import time

import torch

from retrofit.checkpoint import Checkpoint
from retrofit.errors import InputError
from retrofit.generate.request import Request
from retrofit.inspection import AskedSize, inspect_checkpoint

PROBE = 768  # side of the matrices whose product is timed
SHARE = 0.5  # of a plain product's speed that a network reaches, as measured on UNets


def expected_seconds(checkpoint: Checkpoint, request: Request) -> float | None:
    """Seconds that the denoising of all pictures takes, dense; None off the CPU or if unknown.

    A step's work is counted on networks without weights, and divided by the speed at which this
    machine multiplies matrices. It can be off by a factor of two either way.
    """
    if request.device not in (None, "cpu") or (
        request.device is None and torch.cuda.is_available()
    ):
        return None
    asked = AskedSize(width=request.width, height=request.height)
    try:
        reports = inspect_checkpoint(checkpoint, asked, trust_remote_code=request.trust_remote_code)
    except InputError:  # a family without example inputs
        return None
    rows = 1 if request.guidance is not None and request.guidance <= 1 else 2
    part = request.strength if request.image is not None and request.strength else 1.0
    steps = (request.steps or 50) * part
    work = max(report.flops for report in reports) * rows * steps * len(request.prompts)
    return work / (SHARE * product_speed())


def product_speed() -> float:
    """Floating-point operations a second of a matrix product in float32."""
    a = torch.rand(PROBE, PROBE)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * PROBE**3 / best
