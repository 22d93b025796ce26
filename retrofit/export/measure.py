"""What an export must hold: outputs, work and time of the dense and the patched network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from retrofit.export.network import Subject

ROUNDS = 5
PADDED = 8  # one in so many tokens is hidden to see whether masks are honoured
UNSEEN = 1e-5  # relative distance that rounding alone can make
DENSE_ATTENTION = "scaled_dot_product"


def _count_attention(
    q: Any, k: Any, v: Any, *more: Any, out_shape: Any = None, **named: Any
) -> int:
    """Work of PyTorch's attention for CPUs, which its counter does not know."""
    return int(sdpa_flop_count(q, k, v))


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention}


def run_dense(subject: Subject) -> tuple[Tensor, ...]:
    """The output without the patch."""
    with subject.handle.disabled():
        return subject.run()


def distance(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """Relative distance of two outputs, in float64."""
    a, b = (torch.cat([x.double().flatten() for x in each]) for each in (found, wanted))
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def count_work(subject: Subject) -> dict[str, Any]:
    """Floating-point operations, dense and at what the patch keeps."""
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as dense:
        run_dense(subject)
    parts = dense.get_flop_counts().get("Global", {})
    attention = sum(int(n) for name, n in parts.items() if DENSE_ATTENTION in str(name))
    with subject.handle.measuring() as kept:
        subject.run()
    keeps = [keep for site in kept.kept.values() for keep in site]
    keep = sum(keeps) / len(keeps) if keeps else 1.0
    total = int(dense.get_total_flops())
    return {
        "dense": total,
        "ideal": round(total - (1 - keep) * attention),
        "keep": keep,
    }


def count_graph(subject: Subject, program: ExportedProgram) -> int:
    """Floating-point operations of a graph of PyTorch's own operators."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        program.module()(**subject.inputs)
    return int(counter.get_total_flops())


def is_mask_honoured(subject: Subject, program: ExportedProgram) -> bool:
    """Whether what stands behind a text's padding changes nothing of the text."""
    if "attention_mask" not in subject.inputs:
        return True
    mask, ids = subject.inputs["attention_mask"].clone(), subject.inputs["input_ids"]
    length = mask.shape[1] - mask.shape[1] // PADDED
    mask[:, length:] = 0
    other = ids.clone()
    other[:, length:] = ids[:, :1]
    module = program.module()
    with torch.no_grad():
        a, b = (
            module(**{**subject.inputs, "attention_mask": mask, "input_ids": x})[0]
            for x in (ids, other)
        )
    return distance((a[:, :length],), (b[:, :length],)) < UNSEEN


def time_eager(subject: Subject) -> dict[str, float]:
    """Median seconds, interleaved, of the dense network and of the patched one."""
    return _interleaved({"dense": lambda: run_dense(subject), "patched": subject.run})


def _interleaved(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(ROUNDS + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if i:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}
