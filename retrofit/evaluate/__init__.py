"""Dense against patched on the same inputs: output, time and memory, paired input by input."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.evaluate.measure import (
    ModelInput,
    describe_machine,
    find_module,
    find_network,
    run_input,
    time_input,
)
from retrofit.evaluate.metrics import GroupMetric, Metric, PairMetric, measure_group, metrics_for
from retrofit.evaluate.result import Comparison, Row
from retrofit.evaluate.truth import TRUTH_METRICS
from retrofit.evaluate.views import DENSE, ViewRow, keep_by_site, measure_variant
from retrofit.patching.networks import FoundNetwork
from retrofit.patching.patch import Patch, patch
from retrofit.patching.recipe import Recipe
from retrofit.runtime.errors import InputError, NonFiniteError
from retrofit.runtime.finite import is_finite
from retrofit.runtime.machine import load_average
from retrofit.runtime.timing import NOISE, Spread, turned

MEASURED_INPUTS = 8  # inputs on which the kept fraction is measured, before anything is timed

Progress = Callable[[str, int, int], None]


def compare_models(
    target: Any,
    variants: Mapping[str, Recipe],
    inputs: Sequence[ModelInput],
    *,
    components: tuple[str, ...] = (),
    rounds: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Run a model dense and patched on the same inputs, interleaved, and measure what differs.

    Every input runs in every variant before the next input does, in an order that turns from one
    measurement to the next, so that a machine that slows down slows all of them.

    Args:
        target: An `nn.Module` or a pipeline, not patched; it is left as it was.
        variants: Recipes by the label that tables show.
        inputs: What to run; at least one.
        components: Networks of a pipeline that inputs are for; empty takes the denoising ones.
        rounds: How often every input is timed in every variant.
        seed: Of PyTorch's global generator before every run, for what draws from it.
        progress: Called as `progress(what, done, total)`.

    Returns:
        One row for dense and one for each variant; memory is not measured here.

    Raises:
        InputError: If a recipe does not fit the model, or there is nothing to compare.
        NonFiniteError: If dense or patched gives NaN; nothing is measured further.
    """
    if not variants or not inputs or rounds < 1:
        raise InputError(
            f"compare: expected at least one variant, input and round, got {len(variants)}, "
            f"{len(inputs)} and {rounds}. Name a method with --method."
        )
    found = functools.partial(find_module, target, components=components)
    network = find_network(target, inputs[0].network, components)
    run = _Run(target, variants, inputs, network, found, seed, progress or _say_nothing)
    before = load_average()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        run.warm_up()
        for _ in range(rounds):
            run.measure_round()
    return run.finish(rounds, before)


def _say_nothing(what: str, done: int, total: int) -> None:
    pass


class _Run:
    """The state of a comparison while it runs."""

    def __init__(
        self,
        target: Any,
        variants: Mapping[str, Recipe],
        inputs: Sequence[ModelInput],
        network: FoundNetwork,
        module: Callable[[ModelInput], nn.Module],
        seed: int,
        progress: Progress,
    ) -> None:
        self.target = target
        self.recipes: dict[str, Recipe | None] = {DENSE: None, **variants}
        self.inputs = inputs
        self.module = module
        self.seed = seed
        self.progress = progress
        self.network = network
        self.metrics = metrics_for(self.network.family.output, len(inputs))
        self.handles: dict[str, Patch] = {}
        self.calls: dict[str, dict[str, int]] = {DENSE: {}}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.groups: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        self.truths = [item.truth for item in inputs if item.truth is not None]
        self.views: dict[str, ViewRow] = {}
        self.kept: dict[str, dict[str, float]] = {}
        self.turn = 0

    def warm_up(self) -> None:
        """One untimed run of each variant, in which the kept fraction is measured."""
        for name, recipe in self.recipes.items():
            self.progress(f"warming up {name}", 0, 1)
            if self.truths:
                module = self.module(self.inputs[0])
                self.views[name] = measure_variant(module, name, recipe, self.truths)
            if recipe is None:
                first = self.inputs[0]
                _check_finite(run_input(self.module(first), first, None), name, first)
                continue
            handle = self.handles[name] = patch(self.target, recipe)
            try:
                with handle.measuring():
                    for item in self.inputs[:MEASURED_INPUTS]:
                        run_input(self.module(item), item, handle)
            finally:
                handle.remove()
            self.kept[name] = keep_by_site(handle)
            counts = [site.counts for site in handle.sites.values()]
            self.calls[name] = {
                "patched": sum(count.patched for count in counts),
                "dense": sum(count.dense for count in counts),
            }

    def measure_round(self) -> None:
        """Time every input in every variant; the first round also compares the outputs."""
        is_first = self.turn == 0
        for i, item in enumerate(self.inputs):
            outputs: dict[str, Tensor] = {}
            for name in turned(self.recipes, self.turn):
                outputs[name], seconds = self._time(name, item)
                self.seconds[name].append(seconds)
            if is_first:
                self._compare(item, outputs)
            self.progress("comparing", i + 1, len(self.inputs))
            self.turn += 1

    def _time(self, name: str, item: ModelInput) -> tuple[Tensor, float]:
        recipe = self.recipes[name]
        torch.manual_seed(self.seed)
        if recipe is None:
            output, seconds = time_input(self.module(item), item, None)
        else:
            with patch(self.target, recipe) as handle:
                output, seconds = time_input(self.module(item), item, handle)
        _check_finite(output, name, item)
        return output, seconds

    def _compare(self, item: ModelInput, outputs: Mapping[str, Tensor]) -> None:
        for metric in self.metrics:
            for name, output in outputs.items():
                if isinstance(metric, GroupMetric):
                    self.groups[name, metric.name].append(metric.reduce(output))
                elif name != DENSE:
                    value = metric.value(outputs[DENSE], output)
                    self.pairs[name, metric.name].append(value)

    def finish(self, rounds: int, load_before: float | None) -> Comparison:
        """Everything measured, as rows."""
        rows = tuple(self._row(name, recipe) for name, recipe in self.recipes.items())
        tokens = [item.tokens for item in self.inputs if item.tokens is not None]
        return Comparison(
            family=self.network.family.name,
            rows=rows,
            metrics=self.metrics,
            inputs=tuple(item.name for item in self.inputs),
            lengths=tuple(item.tokens for item in self.inputs),
            tokens=max(tokens, default=None),
            rounds=rounds,
            machine=describe_machine(self.network.module),
            load=(load_before, load_average()),
            noisy=self._is_noisy(),
            truth_metrics=tuple(m for m in TRUTH_METRICS if self._is_known(m.name)),
            scenes=len(self.truths),
        )

    def _is_known(self, metric: str) -> bool:
        return bool(self.views) and metric in self.views[DENSE].metrics

    def _row(self, name: str, recipe: Recipe | None) -> Row:
        seconds = Spread(values=tuple(self.seconds[name]))
        row = Row(
            name=name,
            seconds=seconds,
            speed=Spread(values=tuple(self.seconds[DENSE])).ratio_to(seconds),
            truth=self.views[name].metrics if self.views else {},
        )
        if recipe is None:
            return row
        handle = self.handles[name]
        return replace(
            row,
            recipe=handle.recipe,
            report=handle.report,
            keep_asked=handle.recipe.keep,
            keep_measured=handle.keep_measured(),
            keep_by_site=self.kept[name],
            truth_change=self.views[name].change(self.views[DENSE]) if self.views else {},
            calls=self.calls[name],
            changes_nothing=handle.changes_nothing(),
            metrics={m.name: Spread(values=tuple(self._values(name, m))) for m in self.metrics},
        )

    def _values(self, name: str, metric: Metric) -> list[float]:
        if isinstance(metric, PairMetric):
            return self.pairs[name, metric.name]
        dense = self.groups[DENSE, metric.name]
        return measure_group(metric, dense, self.groups[name, metric.name])

    def _is_noisy(self) -> bool:
        """Whether dense times of inputs of one size spread by more than `NOISE`."""
        by_size: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        for i, seconds in enumerate(self.seconds[DENSE]):
            by_size[_size(self.inputs[i % len(self.inputs)])].append(seconds)
        spreads = [Spread(values=tuple(times)) for times in by_size.values() if len(times) > 1]
        wide = [(s.quantile(0.9) - s.quantile(0.1)) / s.median > NOISE for s in spreads]
        return sum(wide) * 2 > len(wide)


def _check_finite(output: Tensor, variant: str, item: ModelInput) -> None:
    if not is_finite(output):
        raise NonFiniteError(
            f"{item.name}: NaN or infinity in the {variant} output. Try another --dtype."
        )


def _size(item: ModelInput) -> tuple[Any, ...]:
    return tuple(
        tuple(value.shape)
        for call in item.calls
        for value in call.arguments.values()
        if isinstance(value, Tensor)
    )
