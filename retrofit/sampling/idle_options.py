"""Options that a pipeline, its scheduler or its guidance takes, and does nothing with.

Each rule asks the pipeline as it was opened; none goes by its name.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from retrofit.sampling.request import Request

GUIDING = 7.5  # a scale at which whatever can be guided is


@dataclass(frozen=True)
class IdleOption:
    """An option that would change no pixel.

    Attributes:
        field: Of the request.
        text: Which option, why it does not act, and what to do.
    """

    field: str
    text: str


Rule = Callable[[Any, Request], str | None]


def find_idle_options(pipeline: Any, request: Request) -> list[IdleOption]:
    """What is set in a request and would not act on this pipeline.

    Args:
        pipeline: Of the request's task, with its scheduler.
        request: What it is to be called with.
    """
    given = {field: rule for field, rule in RULES.items() if getattr(request, field) is not None}
    reasons = {field: rule(pipeline, request) for field, rule in given.items()}
    return [
        IdleOption(field, f"--{field.replace('_', '-')}: {reason}")
        for field, reason in reasons.items()
        if reason is not None
    ]


def call_parameters(pipeline: Any) -> dict[str, Any]:
    """Names of the arguments of a pipeline's call, with their defaults."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def _why_negative_is_idle(pipeline: Any, request: Request) -> str | None:
    if (reason := _why_not_taken(pipeline, "negative_prompt")) is not None:
        return reason
    second = call_parameters(pipeline).get("true_cfg_scale")  # beside an embedded guidance scale
    can_guide = second > 1 if second is not None else _guides(pipeline, GUIDING) is not False
    if not can_guide:
        return (
            f"{type(pipeline).__name__} runs this checkpoint without a negative branch, so it is "
            "never read. Leave it out."
        )
    scale = request.guidance
    if scale is None:
        scale = call_parameters(pipeline)["guidance_scale"]
    if second is not None or scale is None or _guides(pipeline, scale, otherwise=scale > 1):
        return None
    return (
        f"acts only with --guidance above 1, got {scale:g}. Raise --guidance, or leave "
        "--negative out."
    )


def _why_guidance_is_idle(pipeline: Any, request: Request) -> str | None:
    if (reason := _why_not_taken(pipeline, "guidance_scale")) is not None:
        return reason
    networks = (getattr(pipeline, name, None) for name in ("transformer", "unet"))
    configs = [network.config for network in networks if network is not None]
    embeds = [config["guidance_embeds"] for config in configs if "guidance_embeds" in config]
    embeds += [True for config in configs if config.get("time_cond_proj_dim") is not None]
    guides = _guides(pipeline, GUIDING)
    if guides or any(embeds) or (guides is None and not embeds):
        return None
    return "this checkpoint is distilled and does not read a scale. Leave it out."


def _why_eta_is_idle(pipeline: Any, request: Request) -> str | None:
    if (reason := _why_not_taken(pipeline, "eta")) is not None:
        return reason
    scheduler = pipeline.scheduler
    if _takes_eta(type(scheduler)):
        return None
    others = [short_name(cls.__name__) for cls in scheduler.compatibles if _takes_eta(cls)]
    change = f"Add --scheduler {min(others)}, or leave it out." if others else "Leave it out."
    return f"{type(scheduler).__name__} does not take it. {change}"


def _why_control_scale_is_idle(pipeline: Any, request: Request) -> str | None:
    if request.controlnet is None:
        return "acts only with --controlnet. Add that, or leave it out."
    return _why_not_taken(pipeline, "controlnet_conditioning_scale")


def _why_ip_scale_is_idle(pipeline: Any, request: Request) -> str | None:
    if request.ip_adapter is None:
        return "acts only with --ip-adapter. Add that, or leave it out."
    return None


def _why_strength_is_idle(pipeline: Any, request: Request) -> str | None:
    return _why_not_taken(pipeline, "strength")


def _why_not_taken(pipeline: Any, argument: str) -> str | None:
    if argument in call_parameters(pipeline):
        return None
    return f"{type(pipeline).__name__} does not take it. Leave it out."


def _takes_eta(scheduler: type) -> bool:
    step = inspect.getattr_static(scheduler, "step", None)  # a missing library's class raises
    return step is not None and "eta" in inspect.signature(step).parameters


def _guides(pipeline: Any, scale: float, otherwise: bool | None = None) -> bool | None:
    """Whether classifier-free guidance runs at a scale; `otherwise` where that can't be asked."""
    if not isinstance(getattr(type(pipeline), "do_classifier_free_guidance", None), property):
        return otherwise
    asked = copy.copy(pipeline)  # its call would set these
    for name, default in call_parameters(pipeline).items():
        if "guidance" in name:
            object.__setattr__(asked, f"_{name}", default)
    object.__setattr__(asked, "_guidance_scale", scale)
    return bool(asked.do_classifier_free_guidance)


def short_name(name: str) -> str:
    """`EulerDiscreteScheduler` as `euler`."""
    short = name.lower().replace("-", "").replace("_", "")
    for ending in ("scheduler", "discrete", "multistep"):
        short = short.removesuffix(ending)
    return short


RULES: dict[str, Rule] = {  # by field: why it does not act, None where it does
    "negative": _why_negative_is_idle,
    "guidance": _why_guidance_is_idle,
    "eta": _why_eta_is_idle,
    "strength": _why_strength_is_idle,
    "control_scale": _why_control_scale_is_idle,
    "ip_scale": _why_ip_scale_is_idle,
}
