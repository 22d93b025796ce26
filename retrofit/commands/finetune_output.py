"""What `retrofit finetune` prints and draws."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.commands.console import (
    count,
    print_json,
    print_lines,
    print_table,
    report_keys,
    result,
)

if TYPE_CHECKING:
    from retrofit.artifact.planning import Plan
    from retrofit.training import Finetuned
    from retrofit.training.request import FinetuneRequest


def _describe(plan: Plan, request: FinetuneRequest, num_samples: int | None) -> str:
    report = plan.handle.report
    told = "samples that the dense model makes" if request.data == "self" else "samples"
    number = "" if num_samples is None else f"{num_samples} "
    return (
        f"{', '.join(report.families)}: {report}; {number}{told}, {request.held_out} of them held "
        f"out; {count(request.steps, 'step')} of {request.batch}, --train {request.train}, "
        f"objective {request.objective}, learning rate {request.lr:g}, seed {request.seed}"
    )


def tell_plan(
    plan: Plan, request: FinetuneRequest, num_samples: int | None, *, as_json: bool
) -> None:
    """Say what would learn, and from what."""
    if not as_json:
        print_lines(_describe(plan, request, num_samples), "dry run: nothing was written")
        return
    report = plan.handle.report
    print_json(
        result(
            family=report.families[0],
            **report_keys(report),
            samples=num_samples,
            request=request.to_dict(),
            dry_run=True,
        )
    )


def tell(
    plan: Plan,
    request: FinetuneRequest,
    done: Finetuned,
    out: Path,
    *,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Say what came out, and draw it."""
    from retrofit.training.report import HEADERS, draw_plot, score_rows

    draw_plot(done.outcome, done.folder, plot or done.folder / "plot.png")
    if as_json:
        print_json(_as_json(plan, request, done, out))
        return
    outcome = done.outcome
    print_table(HEADERS, score_rows(outcome))
    each = outcome.seconds / max(1, outcome.steps_run)
    print_lines(
        _describe(plan, request, done.num_train + done.num_held_out),
        f"{done.num_parameters / 1e6:.2f} million parameters learned, {each:.2f} s a step",
        f"wrote {out}; log, states and plot: {done.folder}",
        f"next: retrofit verify {out}",
    )


def _as_json(plan: Plan, request: FinetuneRequest, done: Finetuned, out: Path) -> dict[str, Any]:
    outcome, report = done.outcome, plan.handle.report
    return result(
        family=report.families[0],
        **report_keys(report),
        keep_asked=plan.recipe.keep,
        request=request.to_dict(),
        samples={"train": done.num_train, "held_out": done.num_held_out},
        parameters=done.num_parameters,
        dense=asdict(outcome.dense),
        looks={str(step): asdict(scores) for step, scores in outcome.looks.items()},
        recovered=outcome.recovered,
        seconds_a_step=outcome.seconds / max(1, outcome.steps_run),
        steps_run=outcome.steps_run,
        out=str(out),
        folder=str(done.folder),
    )
