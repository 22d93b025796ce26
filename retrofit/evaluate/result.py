"""What a comparison measured: one row for the dense model, one for each patched variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retrofit.evaluate.metrics import Metric
from retrofit.evaluate.truth import Change, TruthMetric
from retrofit.patching.patch import PatchReport
from retrofit.patching.recipe import Recipe
from retrofit.runtime.timing import Spread

MIB = 2**20
ALLOWANCE = (0.05, 16 * MIB)  # of peak memory: fraction of dense's, and bytes for packing


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one variant.

    Attributes:
        name: `dense`, or the label it was given.
        recipe: What was patched, None for dense.
        report: Sites patched and skipped, None for dense.
        keep_asked: The method's `keep` setting, where it has one.
        keep_measured: Mean fraction of query-key pairs computed, over the patched sites.
        keep_by_site: The same for each of them.
        calls: Attention calls of the patched sites that ran `patched` and `dense` (too short,
            or decoding) while the kept fraction was measured.
        changes_nothing: Whether those calls, and all else, ran just as in the dense model.
        metrics: By name, one value an input against the dense output; empty for dense.
        truth: By name, over all scenes whose truth is known; empty where none is.
        truth_change: The same against dense's; empty for dense.
        seconds: One value for each input in each round.
        speed: Dense seconds over this variant's, for each input in each round; above 1 is faster.
        peak_bytes: Peak memory of a process of its own, where it was measured.
    """

    name: str
    recipe: Recipe | None = None
    report: PatchReport | None = None
    keep_asked: float | None = None
    keep_measured: float | None = None
    keep_by_site: Mapping[str, float] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)
    changes_nothing: bool = False
    metrics: Mapping[str, Spread] = field(default_factory=dict)
    truth: Mapping[str, float] = field(default_factory=dict)
    truth_change: Mapping[str, Change] = field(default_factory=dict)
    seconds: Spread
    speed: Spread
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Dense and patched variants side by side; `rows[0]` is dense.

    Attributes:
        family: Of the networks compared.
        rows: Dense first, then the variants in their order.
        metrics: What the keys of `Row.metrics` mean.
        inputs: Names of the inputs.
        lengths: Tokens of each input, for texts.
        tokens: Tokens of the largest input or attention call, where known.
        rounds: How often every input ran in every variant while it was timed.
        machine: Device, dtype, versions, threads.
        load: Load average before and after.
        noisy: Whether dense times of equal inputs varied by more than a quarter.
        truth_metrics: What the keys of `Row.truth` mean.
        scenes: How many inputs have a known truth.
        attention_share: Attention's share of the dense model's FLOPs at this size, where known.
    """

    family: str
    rows: tuple[Row, ...]
    metrics: tuple[Metric, ...]
    inputs: tuple[str, ...]
    lengths: tuple[int | None, ...]
    tokens: int | None
    rounds: int
    machine: Mapping[str, Any]
    load: tuple[float | None, float | None]
    noisy: bool
    truth_metrics: tuple[TruthMetric, ...] = ()
    scenes: int = 0
    attention_share: float | None = None

    @property
    def dense(self) -> Row:
        """The model as it was."""
        return self.rows[0]

    @property
    def variants(self) -> tuple[Row, ...]:
        """The patched ones."""
        return self.rows[1:]

    @property
    def dense_is_truth(self) -> bool:
        """Whether the dense model made the truth, so that none of its errors is above its floor."""
        errors = [m for m in self.truth_metrics if m.better == "lower"]
        return bool(errors) and all(self.dense.truth[m.name] <= m.floor for m in errors)

    def memory_exceeds(self, row: Row) -> bool:
        """Whether a variant's peak memory is above dense's by more than the allowance."""
        if row.peak_bytes is None or self.dense.peak_bytes is None:
            return False
        fraction, packing = ALLOWANCE
        return row.peak_bytes > self.dense.peak_bytes * (1 + fraction) + packing
