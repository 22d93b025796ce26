"""Optimizers, and the learning rate by step."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from retrofit.runtime.errors import UnsupportedError
from retrofit.training.request import FinetuneRequest

BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01  # of matrices
PACKAGES = {  # of optimizers that are not PyTorch's: package, module, class
    "adamw8bit": ("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
    "prodigy": ("prodigyopt", "prodigyopt", "Prodigy"),
}


def learning_rate(request: FinetuneRequest, step: int) -> float:
    """The rate of a step: rises, stays, and falls to zero at the end."""
    rising = min(1.0, (step + 1) / max(1, min(request.warmup, request.steps // 10)))
    falling = (request.steps - step) / max(1, int(request.decay * request.steps))
    return float(request.lr or 0.0) * min(rising, 1.0, falling)


def make_optimizer(
    trained: dict[str, nn.Parameter], request: FinetuneRequest
) -> torch.optim.Optimizer:
    """The optimizer of what learns; matrices decay, vectors do not.

    Raises:
        UnsupportedError: If its package is not installed.
    """
    decayed = [p for p in trained.values() if p.ndim > 1]
    others = [p for p in trained.values() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY, "scale": 1.0},
        {"params": others, "weight_decay": 0.0, "scale": 1.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = float(request.lr or 0.0)
    if request.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)
    package, module, cls = PACKAGES[request.optimizer]
    try:
        found = getattr(importlib.import_module(module), cls)
    except ImportError as error:
        raise UnsupportedError(
            f"optimizer={request.optimizer}: needs {package}, which is not installed: "
            f"pip install {package}"
        ) from error
    made: torch.optim.Optimizer = found(groups, lr=rate, betas=BETAS)
    return made
