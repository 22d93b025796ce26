"""Mistakes that a request for pictures can have, before anything is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from retrofit.runtime.machine import MAX_THREADS

if TYPE_CHECKING:
    from retrofit.sampling.request import Request

SEED_LIMIT = 2**63


def rules_of(request: Request) -> list[tuple[bool, str]]:
    """Every mistake that can be made: whether it was, and what to say of it."""
    return [*_rules_of_numbers(request), *_rules_of_pairs(request)]


def _rules_of_numbers(request: Request) -> list[tuple[bool, str]]:
    """Texts and numbers by themselves."""
    return [
        (
            not request.prompts or any(not prompt.strip() for prompt in request.prompts),
            "--prompt: expected a text. Say what to draw.",
        ),
        (
            request.steps is not None and request.steps < 1,
            f"--steps: expected 1 or more, got {request.steps}.",
        ),
        (
            request.guidance is not None and not 0 <= request.guidance < math.inf,
            f"--guidance: expected a number, 0 or more, got {request.guidance}; 0 or 1 is none.",
        ),
        (
            any(not 0 <= seed < SEED_LIMIT for seed in request.seeds),
            f"--seed: expected 0 or more, below {SEED_LIMIT}, "
            f"got {', '.join(map(str, request.seeds))}.",
        ),
        (
            request.strength is not None and not 0 < request.strength <= 1,
            f"--strength: expected more than 0 and at most 1, got {request.strength}.",
        ),
        (
            request.eta is not None and not 0 <= request.eta <= 1,
            f"--eta: expected 0 to 1, got {request.eta}.",
        ),
        *(
            (
                value is not None and not math.isfinite(value),
                f"{option}: expected a finite number, got {value}.",
            )
            for option, value in _weights(request)
        ),
        (
            request.threads is not None and not 1 <= request.threads <= MAX_THREADS,
            f"--threads: expected 1 to {MAX_THREADS}, got {request.threads}.",
        ),
        (
            request.offload not in ("none", "model", "sequential"),
            f"--offload: expected none, model or sequential, got {request.offload!r}.",
        ),
    ]


def _rules_of_pairs(request: Request) -> list[tuple[bool, str]]:
    """What goes together."""
    return [
        (
            len(request.prompts) != len(request.seeds),
            f"expected a seed for each of {len(request.prompts)} prompts, "
            f"got {len(request.seeds)}.",
        ),
        (
            request.mask is not None and request.image is None,
            "--mask: needs --image, the picture to paint in.",
        ),
        (
            request.strength is not None and request.image is None,
            "--strength: needs --image, the picture to start from.",
        ),
        (
            (request.controlnet is None) != (request.control_image is None),
            "--controlnet and --control-image: expected both or neither.",
        ),
        (
            (request.ip_adapter is None) != (request.ip_image is None),
            "--ip-adapter and --ip-image: expected both or neither.",
        ),
    ]


def _weights(request: Request) -> list[tuple[str, float | None]]:
    """The weights of what is added to the model, with their options."""
    return [
        ("--control-scale", request.control_scale),
        ("--ip-scale", request.ip_scale),
        *((f"--lora {path}", weight) for path, weight in request.loras),
    ]
