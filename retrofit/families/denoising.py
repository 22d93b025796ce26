"""What the families of diffusers' networks share: attention modules as sites, and their processors.

Every attention of these networks keeps its heads and widths in the same attributes, and calls
PyTorch's attention or not as its processor decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from retrofit.layout.sites import AttentionSite

SOFTMAX = "its processor computes the softmax itself"
PLAIN = f"{SOFTMAX}: call `set_attn_processor(AttnProcessor2_0())` on the network"
SLICED = (
    "attention slicing computes the softmax itself: call `disable_attention_slicing()` on the "
    "pipeline, or `set_attention_slice(None)` on the network"
)
XFORMERS = "xformers does not go through PyTorch's attention function"
WITH_WEIGHTS = "{}: put a {}2_0 with its weights in its place (`set_processor`)"
CUSTOM, IP = "CustomDiffusionAttnProcessor", "IPAdapterAttnProcessor"
NOT_INTERCEPTED = {
    "AttnProcessor": PLAIN,
    CUSTOM: WITH_WEIGHTS.format(SOFTMAX, CUSTOM),
    IP: WITH_WEIGHTS.format(SOFTMAX, IP),
    "SlicedAttnProcessor": SLICED,
    "XFormersAttnProcessor": (
        f"{XFORMERS}: call `disable_xformers_memory_efficient_attention()` on the network"
    ),
    "XFormersJointAttnProcessor": (  # that call would put one for pictures alone in its place
        f"{XFORMERS}: call `set_attn_processor(JointAttnProcessor2_0())` on the network"
    ),
    "CustomDiffusionXFormersAttnProcessor": WITH_WEIGHTS.format(XFORMERS, CUSTOM),
    "IPAdapterXFormersAttnProcessor": WITH_WEIGHTS.format(XFORMERS, IP),
}


Kind = Literal["self", "cross", "joint"]


class FoundAttention(NamedTuple):
    """An attention module of a network; the fields that are not its own are the site's."""

    path: str
    module: Any
    block: int
    kind: Kind
    layout: str
    level: int | None = None
    num_calls: int = 1


def list_sites(
    found: Iterable[FoundAttention],
) -> tuple[tuple[AttentionSite, ...], dict[str, str]]:
    """The sites of attention modules, numbered by kind, and why some of them can't be reached.

    Args:
        found: In order of execution.

    Returns:
        One site for each, and the reasons by path.
    """
    counts: dict[str, int] = {}
    sites, unreachable = [], {}
    for path, module, block, kind, layout, level, num_calls in found:
        index = counts[kind] = counts.get(kind, -1) + 1
        sites.append(
            AttentionSite(
                path=path,
                index=index,
                block=block,
                kind=kind,
                num_heads=module.heads,
                head_dim=module.inner_dim // module.heads,
                layout=layout,
                level=level,
                num_calls=num_calls,
            )
        )
        reason = explain_processor(module.processor)
        if reason is not None:
            unreachable[path] = reason
    return tuple(sites), unreachable


def explain_processor(processor: Any) -> str | None:
    """Why the calls of an attention processor can't be reached, or None when they can."""
    backend = getattr(processor, "_attention_backend", None)
    name = getattr(backend, "value", backend)
    if name is None or str(name).startswith(("native", "_native")):
        return NOT_INTERCEPTED.get(type(processor).__name__)
    return (
        f"its attention backend is {str(name)!r}, which is not PyTorch's: call "
        '`set_attention_backend("native")` on the network'
    )
