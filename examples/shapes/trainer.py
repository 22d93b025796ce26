"""One network in training: optimizer, running average, schedule, state on disk."""

from __future__ import annotations

import copy
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

AVERAGE_EVERY = 5  # steps

LOG = logging.getLogger("shapes")


def share_cores(most: int) -> None:
    """Compute with one thread while other programs hold a core, else with `most`.

    Threads that wait for each other while a third program runs are slower than one alone (three
    times with OMP_WAIT_POLICY=PASSIVE, thirty times without it, measured on two cores).
    """
    others = os.getloadavg()[0] - torch.get_num_threads()
    torch.set_num_threads(most if others < 0.5 else 1)


class Trainer:
    """Weights in training with their optimizer, running average and step, saved as one file.

    The learning rate rises over 1% of the steps (50 at least) and falls linearly to zero over the
    last 40%.
    """

    def __init__(self, module: nn.Module, path: Path, *, steps: int, rate: float, seed: int):
        """Start from the weights in the module.

        Args:
            module: What is trained, changed in place.
            path: File of the training state.
            steps: Length of the whole training.
            rate: Highest learning rate.
            seed: Of everything drawn while training.
        """
        self.module, self.path, self.steps, self.rate = module, path, steps, rate
        self.average = copy.deepcopy(module).requires_grad_(False)
        decay = {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 0.01}
        others = {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([decay, others], lr=rate, betas=(0.9, 0.99), fused=True)
        self.generator = torch.Generator().manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.step = 0
        self.losses: list[float] = []
        self.threads = torch.get_num_threads()
        self.started = self.saved = time.monotonic()

    def update(self, loss: Tensor) -> None:
        """Take one step down the loss; log and save when it is time."""
        rising, falling = max(50, self.steps // 100), max(1, int(0.4 * self.steps))
        left = (self.steps - self.step) / falling
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.step + 1) / rising, left)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step % AVERAGE_EVERY == 0:
            self._follow()
        self.losses.append(loss.item())
        if self.step % 20 == 1:
            share_cores(self.threads)
        self._report()

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the running average towards the weights: over the last tenth, 1000 steps at most."""
        rest = min(1.0, AVERAGE_EVERY / min(1000, 1 + self.step / 10))
        average: list[Tensor] = list(self.average.parameters())
        current: list[Tensor] = list(self.module.parameters())
        torch._foreach_lerp_(average, current, rest)

    def _report(self) -> None:
        if not np.isfinite(self.losses[-1]):
            raise SystemExit(f"{self.path.stem}: the loss is {self.losses[-1]} at step {self.step}")
        if self.step % 100 == 0 or self.step == self.steps:
            mean = sum(self.losses) / len(self.losses)
            elapsed = time.monotonic() - self.started
            name = f"{self.path.stem} {self.step}/{self.steps}"
            threads = torch.get_num_threads()
            LOG.info("%s loss %.5f, %.0f s, %d threads", name, mean, elapsed, threads)
            self.losses.clear()
        if time.monotonic() - self.saved > 180 or self.step == self.steps:
            self.save()

    def save(self) -> None:
        """Write the state; a run that dies while writing leaves the previous one."""
        state = {
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "rng": self.rng.bit_generator.state,
            "step": self.step,
        }
        fresh = self.path.with_suffix(".new")
        torch.save(state, fresh)
        os.replace(fresh, self.path)
        self.saved = time.monotonic()

    def resume(self) -> None:
        """Go on from the state file, if there is one."""
        if not self.path.exists():
            return
        state: dict[str, Any] = torch.load(self.path, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.rng.bit_generator.state = state["rng"]
        self.step = state["step"]
        LOG.info("%s goes on from step %d", self.path.stem, self.step)
