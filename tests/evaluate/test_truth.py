"""What a comparison says of errors against a truth: relative to dense, or not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retrofit.evaluate.plot import draw_truth
from retrofit.evaluate.report import to_dict, verdict
from retrofit.evaluate.result import Comparison, Row
from retrofit.evaluate.tables import table
from retrofit.evaluate.truth import TRUTH_METRICS, SceneErrors, changes, summarise
from retrofit.runtime.timing import Spread

ONE = Spread(values=(1.0,))
DOUBLE = Spread(values=(2.0, 2.0))


def scene_of(error: float, angles: Sequence[float]) -> SceneErrors:
    turned = torch.tensor(list(angles))
    return SceneErrors(abs_rel=error, points=error, rotation=turned, translation=turned)


def compared(dense: list[SceneErrors], *patched: list[SceneErrors]) -> Comparison:
    """Of variants that are all twice as fast, with no number but those of the truth."""
    rows = [
        Row(
            name=f"variant {index}",
            seconds=ONE,
            speed=DOUBLE,
            metrics={"relative_error": ONE},
            truth=summarise(errors),
            truth_change=changes(dense, errors),
        )
        for index, errors in enumerate(patched)
    ]
    return Comparison(
        family="vggt",
        rows=(Row(name="dense", seconds=ONE, speed=ONE, truth=summarise(dense)), *rows),
        metrics=(),
        inputs=("a",) * len(dense),
        lengths=(None,) * len(dense),
        tokens=100,
        rounds=1,
        machine={"device": "CPU", "dtype": "float32", "threads": 1},
        load=(None, None),
        noisy=False,
        truth_metrics=TRUTH_METRICS,
        scenes=len(dense),
    )


def cells(comparison: Comparison) -> dict[str, list[str]]:
    """What the table says of each number against the truth, in dense's and the variants' column."""
    return {row[0].partition(" (truth)")[0]: row[1:] for row in table(comparison)[1]}


def test_where_dense_made_the_truth_errors_stand_for_themselves() -> None:
    dense, patched = [scene_of(1.5e-7, [0.0] * 4)], [scene_of(0.09, [3.0, 8, 8, 20])]
    found = compared(dense, patched)
    assert found.dense_is_truth
    assert cells(found)["point error"] == ["0.0000\nthe truth", "0.0900\n"]
    said = verdict(found)
    assert "dense is the truth here, against which variant 0 has" in said
    assert "point error 0.0900, rotation error in degrees 8.00" in said
    assert "suffers" not in said
    assert not any("%" in cell for row in cells(found).values() for cell in row)
    assert to_dict(found)["dense_is_truth"] is True
    assert found.variants[0].truth_change["points"].relative is False


def test_a_change_of_next_to_nothing_is_said_in_the_metrics_own_unit() -> None:
    dense = [scene_of(0.1, [6.0] * 4)]
    found = compared(dense, [scene_of(0.1, [3.0, 6, 6, 6])], [scene_of(0.1, [6.0] * 4)])
    assert not found.dense_is_truth
    assert cells(found)["RTA@5"] == ["0.0000\n", "0.2500\n0.2500 better", "0.0000\nthe same"]
    assert cells(found)["point error"] == ["0.1000\n", "0.1000\nthe same", "0.1000\nthe same"]
    change = found.variants[0].truth_change["rta@5"]
    assert (change.value, change.relative) == (-0.25, False)


def test_a_number_next_to_nothing_is_never_called_the_worst() -> None:
    dense = [scene_of(1e-5, [4.0, 8.0, 8.0])]
    found = compared(dense, [scene_of(0.5, [4.0, 9.0, 9.0])])
    assert not found.dense_is_truth
    assert "against the truth rotation error in degrees suffers most: it grows by 12.5%" in verdict(
        found
    )


@pytest.mark.parametrize(("scenes", "is_sure"), [(1, False), (2, False), (3, True)])
def test_the_verdict_says_which_way_a_number_moves(scenes: int, is_sure: bool) -> None:
    dense = [scene_of(0.1, [1.0, 2, 3, 4, 9])] * scenes
    fewer = verdict(compared(dense, [scene_of(0.1, [1.0, 2, 3, 9, 9])] * scenes))
    assert "RRA@5 suffers most: it falls by 25.0%" in fewer
    assert ("over resampled scenes" in fewer) is is_sure
    more = verdict(compared(dense, [scene_of(0.3, [1.0, 2, 3, 4, 9])] * scenes))
    assert "depth AbsRel suffers most: it grows by 200.0%" in more
    same = verdict(compared(dense, dense))
    assert "no number is worse than dense's" in same


def drawn_truth(comparison: Comparison) -> Axes:
    axis = Figure().subplots()
    draw_truth(axis, comparison)
    return axis


def test_the_picture_leaves_out_and_names_what_has_no_relative_change() -> None:
    dense = [scene_of(0.1, [1.0, 2, 6, 9])] * 3
    axis = drawn_truth(compared(dense, [scene_of(0.2, [1.0, 2, 3, 4])] * 3))
    assert not axis.get_xlabel()
    assert min(axis.get_xlim()) > -0.7  # RRA@5 doubles
    assert [line.get_marker() for line in axis.lines].count("<") == 2
    box = axis.get_legend().get_bbox_to_anchor().transformed(axis.transAxes.inverted())
    assert box.x0 == pytest.approx(1)
    made = drawn_truth(compared([scene_of(0.0, [0.0] * 4)], [scene_of(0.2, [1.0, 2, 3, 9])]))
    assert "left out, as dense is the truth:" in made.get_xlabel()
    assert "point error" in made.get_xlabel()
    few = drawn_truth(compared([scene_of(0.1, [20.0] * 4)] * 3, [scene_of(0.1, [1.0] * 4)] * 3))
    assert "dense's is about 0" in few.get_xlabel()
    assert "RTA@15" in few.get_xlabel()
