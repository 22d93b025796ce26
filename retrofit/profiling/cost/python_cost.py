"""What Python takes beside the work of operators, measured on a network too small to compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retrofit.methods.window import WindowConfig
from retrofit.patching.patch import patch
from retrofit.profiling.cost.operations import OURS

LAYERS, WIDTH, TOKENS = 2, 16, 4
REPEATS = 3
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True, kw_only=True)
class PythonCost:
    """Seconds that pass outside operators.

    Attributes:
        per_operator: For each that a network's code calls, views included.
        per_site: For each attention call that is handed to a sparse operator, beside that operator.
    """

    per_operator: float = 0.0
    per_site: float = 0.0


def measure_python(time: Timer) -> PythonCost:
    """Call an encoder of a few numbers, dense and patched.

    Args:
        time: Gives the seconds of a call.
    """
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        vocab_size=WIDTH,
    )
    with torch.random.fork_rng(devices=[]):
        model = BertModel(config, add_pooling_layer=False).eval()
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64)

    def call() -> Any:
        return model(input_ids=tokens)

    dense = min(time(call) for _ in range(REPEATS))
    with _Count() as count:
        call()
    with patch(model, WindowConfig(window_size=TOKENS // 2)):
        patched = min(time(call) for _ in range(REPEATS))
        with _Count() as sparse:
            call()
    operators = min(time(lambda: [run() for run in sparse.ours]) for _ in range(REPEATS))
    return PythonCost(
        per_operator=dense / count.operators,
        per_site=max(0.0, (patched - dense - operators) / LAYERS),
    )


class _Count(TorchDispatchMode):
    """Counts operators, and keeps the calls of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.ours: list[Callable[[], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.operators += 1
        if func.overloadpacket.__name__ in OURS:
            self.ours.append(functools.partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))
