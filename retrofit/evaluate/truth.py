"""Errors of views against a known truth, as numbers over many scenes, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ANGLES = (5, 15)  # degrees
RESAMPLES = 200  # of the scenes, for how sure a change is


@dataclass(frozen=True, kw_only=True)
class TruthMetric:
    """A number of many scenes against their truth.

    Attributes:
        name: Key in JSON, heading in tables.
        meaning: One line for people.
        better: Whether less or more of it is closer to the truth.
        floor: A dense number up to here is as good as none: what is lost or gained against it is
            said in the metric's own unit, not relative to it.
    """

    name: str
    meaning: str
    better: Literal["lower", "higher"]
    floor: float


TRUTH_METRICS = (
    TruthMetric(
        name="abs_rel", meaning="mean relative error of the depth", better="lower", floor=1e-3
    ),
    TruthMetric(
        name="points", meaning="mean distance from the true point", better="lower", floor=1e-3
    ),
    TruthMetric(
        name="rotation",
        meaning="rotation between two views, median error in degrees",
        better="lower",
        floor=0.1,
    ),
    TruthMetric(
        name="translation",
        meaning="direction from one view to another, median error in degrees",
        better="lower",
        floor=0.1,
    ),
    *(
        TruthMetric(
            name=f"{short}@{limit}",
            meaning=f"fraction of the pairs whose {what} is right within {limit} degrees",
            better="higher",
            floor=0.05,
        )
        for short, what in (("rra", "rotation"), ("rta", "translation"))
        for limit in ANGLES
    ),
)


@dataclass(frozen=True, kw_only=True)
class TrueScene:
    """N views of a scene whose cameras, and perhaps depth, are known.

    Attributes:
        images: As the network takes them, `[N, 3, H, W]` in [0, 1].
        extrinsics: World to camera, `[N, 3, 4]`.
        intrinsics: Of these images, `[N, 3, 3]`; None where depth is.
        depth: Along the camera's z axis, `[N, H, W]`, NaN where it is not known; None if nowhere.
    """

    images: Tensor
    extrinsics: Tensor
    intrinsics: Tensor | None = None
    depth: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SceneErrors:
    """Errors of one scene; NaN where the truth says nothing.

    Attributes:
        abs_rel: Mean of `|predicted - true| / true` over the pixels.
        points: Mean distance from the true point.
        rotation: Of every pair of views, degrees, `[N (N - 1) / 2]`.
        translation: Of its direction, degrees, `[N (N - 1) / 2]`.
    """

    abs_rel: float
    points: float
    rotation: Tensor
    translation: Tensor


@dataclass(frozen=True, kw_only=True)
class Change:
    """By how much an error is larger than dense's, or a fraction smaller.

    Attributes:
        value: Over all scenes; 0.02 is 2% worse, or worse by 0.02.
        low: 5th percentile over resamplings of the scenes, the same ones for dense.
        high: 95th percentile.
        relative: Whether it is a fraction of dense's number; where that is next to nothing (see
            `TruthMetric.floor`), it is the difference itself.
    """

    value: float
    low: float
    high: float
    relative: bool = True


def summarise(errors: Sequence[SceneErrors]) -> dict[str, float]:
    """Every metric over all scenes: means over scenes, medians and fractions over all pairs.

    What no scene's truth tells is left out.
    """
    found = _summarise(_stack(errors), torch.arange(len(errors))[None])
    return {name: value.item() for name, value in found.items() if not value.isnan()}


def changes(
    dense: Sequence[SceneErrors], patched: Sequence[SceneErrors], *, seed: int = 0
) -> dict[str, Change]:
    """Every metric of a variant against dense's on the same scenes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(dense), (RESAMPLES, len(dense)), generator=generator)
    index = torch.cat([torch.arange(len(dense))[None], drawn])
    before, after = _summarise(_stack(dense), index), _summarise(_stack(patched), index)
    made = {}
    for metric in TRUTH_METRICS:
        old, new = before[metric.name], after[metric.name]
        if old[0].isnan():
            continue
        loss = old - new if metric.better == "higher" else new - old
        relative = old[0].item() > metric.floor
        change = loss / old.clamp_min(metric.floor) if relative else loss
        low, high = torch.nanquantile(change[1:], torch.tensor([0.05, 0.95])).tolist()
        made[metric.name] = Change(value=change[0].item(), low=low, high=high, relative=relative)
    return made


def _stack(errors: Sequence[SceneErrors]) -> dict[str, Tensor]:
    """`[S, P]` for each kind of error, shorter scenes filled up with NaN."""
    return {
        "abs_rel": torch.tensor([[scene.abs_rel] for scene in errors]),
        "points": torch.tensor([[scene.points] for scene in errors]),
        "rotation": _pad([scene.rotation for scene in errors]),
        "translation": _pad([scene.translation for scene in errors]),
    }


def _pad(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=math.nan)


def _summarise(stacked: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Metrics of some choices of scenes `[R, S]`, `[R]` each."""
    chosen = {name: values[index].flatten(1) for name, values in stacked.items()}
    found = {name: chosen[name].nanmean(1) for name in ("abs_rel", "points")}
    found |= {name: chosen[name].nanmedian(1).values for name in ("rotation", "translation")}
    for short, name in (("rra", "rotation"), ("rta", "translation")):
        known = ~chosen[name].isnan()
        for limit in ANGLES:
            found[f"{short}@{limit}"] = (chosen[name] < limit).sum(1) / known.sum(1)
    return found
