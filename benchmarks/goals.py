"""The goals that a CPU can check: what a release must reach, and what is planned for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A row of the table of goals.

    Attributes:
        name: C1, ...
        must: Least ratio with which a release is made.
        target: Ratio that is planned for.
    """

    name: str
    must: float
    target: float


C1 = Goal(name="C1", must=1.3, target=1.8)
C2 = Goal(name="C2", must=2.2, target=3.2)
C4 = {
    torch.float32: Goal(name="C4", must=1.8, target=2.3),
    torch.bfloat16: Goal(name="C4", must=3.0, target=4.2),
}
C7 = Goal(name="C7", must=3.0, target=5.0)
SHARE_LIMIT, SHARE_TARGET = 0.05, 0.03
C8 = Goal(name="C8", must=1.0, target=SHARE_LIMIT / SHARE_TARGET)
FIRST_LIMIT, FIRST_TARGET = 3.0, 1.5  # seconds
C9 = Goal(name="C9", must=1.0, target=FIRST_LIMIT / FIRST_TARGET)
