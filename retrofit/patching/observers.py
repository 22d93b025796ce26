"""Observers of a patch's calls: what is kept, and where NaN comes from."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from retrofit.layout.sites import AttentionSite
from retrofit.patching.control import Observer
from retrofit.patterns import AttentionCall, Pattern
from retrofit.runtime.errors import NonFiniteError
from retrofit.runtime.finite import is_finite


class KeepObserver(Observer):
    """Notes the fraction of query-key pairs that each call keeps.

    Attributes:
        kept: By site path, one number a call.
    """

    def __init__(self) -> None:
        """Start with no calls."""
        self.kept: dict[str, list[float]] = defaultdict(list)

    def on_call(
        self, site: AttentionSite, call: AttentionCall, pattern: Pattern, out: Tensor
    ) -> None:
        """Note one call."""
        self.kept[call.where].append(pattern.keep())

    def mean(self) -> float | None:
        """Over all calls, None if there was none."""
        kept = [keep for site in self.kept.values() for keep in site]
        return sum(kept) / len(kept) if kept else None


class FiniteObserver(Observer):
    """Stops at the first call whose result is not finite.

    Attributes:
        when: Where the run stands, for the message.
    """

    def __init__(self, when: str) -> None:
        """Watch at one step."""
        self.when = when

    def on_call(
        self, site: AttentionSite, call: AttentionCall, pattern: Pattern, out: Tensor
    ) -> None:
        """Look at one result.

        Raises:
            NonFiniteError: If it is not finite; the message names the site.
        """
        if not is_finite(out):
            raise NonFiniteError(f"{call.where}: NaN or infinity{self.when}.")
