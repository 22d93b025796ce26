"""What a fine-tune came to: a table, a plot, the record and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retrofit.artifact.planning import Plan
from retrofit.artifact.saving import public_name
from retrofit.training.log import LOG
from retrofit.training.outcome import Outcome
from retrofit.training.request import FinetuneRequest

MEASURES = {
    "loss": "the model's loss",
    "weighted": "its weighted loss",
    "error": "distance from dense",
}
HEADERS = ("on held-out samples", "dense", "before", "after", "recovered")


def score_rows(outcome: Outcome) -> list[tuple[str, str, str, str, str]]:
    """One row a measure, as `HEADERS` names the columns."""
    dense, before, after = (asdict(s) for s in (outcome.dense, outcome.looks[0], outcome.last))
    recovered = outcome.recovered
    return [
        (
            told,
            f"{dense[name]:.4g}",
            f"{before[name]:.4g}",
            f"{after[name]:.4g}",
            f"{recovered[name]:.0%}" if name in recovered else "-",
        )
        for name, told in MEASURES.items()
        if after[name] is not None
    ]


def make_record(
    plan: Plan, components: list[str], request: FinetuneRequest, outcome: Outcome
) -> dict[str, Any]:
    """What `retrofit.json` says of a fine-tune."""
    return {
        "base": public_name(plan.checkpoint),
        "train": request.train,
        "components": components,
        "request": {**request.to_dict(), "data": Path(request.data).name, "prompts": None},
        "scores": {
            "dense": asdict(outcome.dense),
            "before": asdict(outcome.looks[0]),
            "after": asdict(outcome.last),
            "recovered": outcome.recovered,
        },
    }


def make_card(plan: Plan, request: FinetuneRequest, outcome: Outcome) -> str:
    """README.md of the checkpoint, with the metadata that the hub reads."""
    base, methods = public_name(plan.checkpoint), plan.recipe.methods
    relation = "adapter" if request.train in ("lora", "gates") else "finetune"
    library = "transformers" if plan.checkpoint.pipeline_class is None else "diffusers"
    rows = [HEADERS, ("---",) * len(HEADERS), *score_rows(outcome)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""---
base_model: {base}
base_model_relation: {relation}
library_name: {library}
tags:
- retrofit
- sparse-attention
- {methods.split(" ")[0]}
---

# {base} with {methods}

The attention of `{base}` was replaced by {methods} and fine-tuned with
[retrofit](https://pypi.org/project/retrofit-attention/): {request.steps} steps of
{request.batch} samples, `--train {request.train}`, objective {request.objective}, learning rate
{request.lr:g}, seed {request.seed}.

```py
import retrofit  # pip install retrofit-attention

model = retrofit.load("THIS_FOLDER")
```

{table}

{_warning(request)}
"""


def draw_plot(outcome: Outcome, folder: Path, file: Path) -> None:
    """The loss of every step, and the held-out measures at every look."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    losses: Mapping[int, float] = {e["step"]: e["loss"] for e in entries if "loss" in e}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(list(losses), list(losses.values()), linewidth=0.8)
    left.set(title="training loss", xlabel="step", yscale="log")
    looks = sorted(outcome.looks)
    for name, told in MEASURES.items():
        values = [asdict(outcome.looks[step])[name] for step in looks]
        if None in values:
            continue
        line = right.plot(looks, values, marker="o", markersize=3, label=told)[0]
        if name != "error":
            dense = asdict(outcome.dense)[name]
            right.axhline(dense, color=line.get_color(), linestyle=":", label=f"dense, {told}")
    right.set(title="held-out samples", xlabel="step", yscale="log")
    right.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _warning(request: FinetuneRequest) -> str:
    if request.train in ("lora", "gates"):
        return "The weights of the base model are in it unchanged: `retrofit unpatch` gives them."
    return "Its weights belong to this attention: loaded without retrofit it would be noise."
