"""Dense against patched in memory: what is measured must be what happened."""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from retrofit import evaluate
from retrofit.evaluate import compare_models, measure
from retrofit.evaluate.measure import ModelCall, ModelInput
from retrofit.evaluate.metrics import cosine, metrics_for, neighbour_agreement, relative_error
from retrofit.evaluate.peak_memory import (
    MemoryJob,
    measure_peak_memory,
    with_peak_memory,
)
from retrofit.evaluate.plot import plot
from retrofit.evaluate.report import to_dict, verdict
from retrofit.evaluate.result import Comparison
from retrofit.evaluate.tables import table
from retrofit.methods.hidiffusion import HiDiffusionConfig
from retrofit.methods.window import WindowConfig
from retrofit.patching.patch import patch
from retrofit.patching.recipe import Recipe
from retrofit.runtime.errors import InputError, NonFiniteError, RetrofitError, UnsupportedError
from retrofit.runtime.timing import Spread
from tests import tiny_models

HALF = Recipe.of(WindowConfig(keep=0.5))
WHOLE = Recipe.of(WindowConfig(keep=1.0))


def _texts(count: int, *, length: int = 64) -> list[ModelInput]:
    inputs = []
    for seed in range(count):
        arguments = tiny_models.make_text_inputs(seed=seed, length=length)
        call = ModelCall(arguments=arguments)
        inputs.append(ModelInput(name=f"text {seed}", calls=(call,), tokens=length))
    return inputs


def _latents(seed: int = 0, steps: int = 4) -> ModelInput:
    arguments = tiny_models.make_unet_inputs(seed=seed)
    calls = [ModelCall(arguments=arguments, step=(step, steps)) for step in range(steps)]
    return ModelInput(name=f"latents {seed}", calls=tuple(calls))


def test_inputs_take_the_dtype_of_most_weights_and_not_of_the_first():
    model = tiny_models.make_wan().to(torch.bfloat16)
    model.scale_shift_table.data = model.scale_shift_table.data.float()  # as diffusers loads it
    assert next(model.parameters()).dtype == torch.float32
    call = ModelCall(arguments=tiny_models.make_wan_inputs())
    output = measure.run_input(model, ModelInput(name="clip", calls=(call,)), None)
    assert torch.isfinite(output).all()
    assert measure.describe_machine(model)["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def compared() -> Comparison:
    model = tiny_models.make_minilm()
    return compare_models(model, {"half": HALF, "whole": WHOLE}, _texts(5), rounds=2)


def test_metrics_equal_a_comparison_made_by_hand(compared: Comparison) -> None:
    model = tiny_models.make_minilm()
    inputs = tiny_models.make_text_inputs(seed=3, length=64)
    with torch.no_grad():
        dense = model(**inputs).last_hidden_state
        with patch(model, HALF):
            windowed = model(**inputs).last_hidden_state
    error = (windowed - dense).norm() / dense.norm()
    metrics = compared.variants[0].metrics
    assert metrics["relative_error"].values[3] == pytest.approx(float(error), rel=1e-5)
    assert error > 0.01
    angle = nn.functional.cosine_similarity(dense.flatten(), windowed.flatten(), dim=0)
    assert metrics["cosine"].values[3] == pytest.approx(float(angle), abs=1e-6)
    pooled = [nn.functional.normalize(t.mean(1)[0], dim=0) for t in (dense, windowed)]
    assert metrics["embedding_cosine"].values[3] == pytest.approx(
        float(pooled[0] @ pooled[1]), abs=1e-6
    )


def test_window_over_everything_differs_from_dense_by_nothing(compared: Comparison) -> None:
    whole = compared.variants[1]
    assert max(whole.metrics["relative_error"].values) < 1e-5
    assert min(whole.metrics["cosine"].values) > 1 - 1e-6


def test_keep_is_reported_as_asked_and_as_measured(compared: Comparison) -> None:
    half, whole = compared.variants
    assert (half.keep_asked, whole.keep_asked) == (0.5, 1.0)
    assert half.keep_measured == pytest.approx(0.5, abs=0.02)
    assert whole.keep_measured == 1.0
    assert compared.dense.keep_measured is None
    assert half.calls == {"patched": 5 * 6, "dense": 0}


def test_every_input_is_timed_in_every_round_against_its_own_dense_run(
    compared: Comparison,
) -> None:
    for row in compared.rows:
        assert len(row.seconds.values) == 2 * 5
    ratios = [
        dense / patched
        for dense, patched in zip(
            compared.dense.seconds.values, compared.variants[0].seconds.values, strict=True
        )
    ]
    assert list(compared.variants[0].speed.values) == ratios
    assert set(compared.dense.speed.values) == {1.0}


def test_order_of_variants_turns_so_that_none_always_follows_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[bool] = []
    real = measure.time_input

    def watch(module: Any, item: ModelInput, handle: Any) -> tuple[Tensor, float]:
        order.append(handle is not None)
        return real(module, item, handle)

    monkeypatch.setattr(evaluate, "time_input", watch)
    compare_models(tiny_models.make_bert(), {"half": HALF}, _texts(2), rounds=2)
    assert order == [False, True, True, False, False, True, True, False]


def test_known_slowdown_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that charges 10 ms a dense call and 5 ms a patched one gives a speed of 2."""
    now = itertools.count()
    charged: dict[str, float] = {"time": 0.0}
    real = measure.run_input

    def run(module: Any, item: ModelInput, handle: Any) -> Tensor:
        charged["time"] += 0.010 if handle is None else 0.005
        return real(module, item, handle)

    monkeypatch.setattr(measure, "run_input", run)
    monkeypatch.setattr("time.perf_counter", lambda: charged["time"] + 1e-9 * next(now))
    found = compare_models(tiny_models.make_bert(), {"half": HALF}, _texts(3), rounds=3)
    assert found.variants[0].speed.median == pytest.approx(2.0, rel=1e-3)
    assert not found.noisy
    assert "half is 2.00x as fast as dense here" in verdict(found)


def test_model_is_left_as_it_was() -> None:
    model = tiny_models.make_bert()
    inputs = _texts(1)
    before = measure.run_input(model, inputs[0], None)
    compare_models(model, {"half": HALF}, inputs, rounds=1)
    assert torch.equal(measure.run_input(model, inputs[0], None), before)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_model_is_left_as_it_was_when_an_input_fails() -> None:
    model = tiny_models.make_bert()
    wrong = ModelCall(arguments={"input_ids": torch.full((1, 8), 10_000)})
    with pytest.raises(IndexError):
        compare_models(model, {"half": HALF}, [ModelInput(name="wrong", calls=(wrong,))])
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_denoising_steps_are_told_to_the_method() -> None:
    unet = tiny_models.make_sd15_unet()
    recipe = Recipe.of(HiDiffusionConfig(min_scale=0.0))
    found = compare_models(unet, {"hidiffusion": recipe}, [_latents()], rounds=1)
    row = found.variants[0]
    assert found.family == "unet2d"
    assert row.metrics["relative_error"].median > 0.01
    assert row.keep_asked is None
    assert row.report is not None
    assert row.report.skipped


def test_calls_of_one_input_are_compared_together() -> None:
    unet = tiny_models.make_sd15_unet()
    with torch.no_grad():
        joined = measure.run_input(unet, _latents(steps=3), None)
        single = measure.run_input(unet, _latents(steps=1), None)
    assert joined.shape == (1, 3 * math.prod(single.shape[1:]))
    assert torch.equal(joined[:, : joined.shape[1] // 3], single.flatten(1))


def test_method_that_does_not_fit_is_refused_before_anything_is_timed() -> None:
    with pytest.raises(UnsupportedError, match="hidiffusion does not fit this model"):
        compare_models(tiny_models.make_bert(), {"hi": Recipe.of(HiDiffusionConfig())}, _texts(1))


@pytest.mark.parametrize(
    ("variants", "count", "rounds"), [({}, 1, 1), ({"half": HALF}, 0, 1), ({"half": HALF}, 1, 0)]
)
def test_nothing_to_compare_is_refused(variants: Any, count: int, rounds: int) -> None:
    with pytest.raises(InputError, match="expected at least one variant, input and round"):
        compare_models(tiny_models.make_bert(), variants, _texts(count), rounds=rounds)


def test_nan_in_the_dense_model_stops_and_says_whose_it_is() -> None:
    model = tiny_models.make_bert()
    model.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="text 0: NaN or infinity in the dense output"):
        compare_models(model, {"half": HALF}, _texts(1), rounds=1)


def test_relative_error_and_cosine_of_known_vectors() -> None:
    dense = torch.tensor([3.0, 4.0])
    assert relative_error(dense, torch.tensor([3.0, 5.0])) == pytest.approx(0.2)
    assert relative_error(dense, dense) == 0.0
    assert cosine(dense, 2 * dense) == pytest.approx(1.0)
    assert cosine(dense, torch.tensor([-4.0, 3.0])) == pytest.approx(0.0)


def test_neighbour_agreement_counts_the_neighbours_that_stay() -> None:
    turns = torch.tensor([0.0, 0.1, 0.3, 0.7, 1.5])
    dense = torch.stack([turns.cos(), turns.sin()], dim=1)
    moved = torch.tensor([0.0, 0.1, 1.4, 0.7, 1.5])
    patched = torch.stack([moved.cos(), moved.sin()], dim=1)
    assert neighbour_agreement(dense, dense.clone(), count=2) == [1.0] * 5
    # the third moved next to the fifth: it was the second's, fourth's and its own loss
    assert neighbour_agreement(dense, patched, count=1) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_neighbours_are_left_out_where_there_are_too_few_inputs() -> None:
    assert "neighbours_top5" not in {m.name for m in metrics_for("embeddings", 19)}
    assert "neighbours_top5" in {m.name for m in metrics_for("embeddings", 20)}
    assert [m.name for m in metrics_for("prediction", 99)] == ["relative_error", "cosine"]


def test_spread_gives_median_and_quantiles() -> None:
    spread = Spread(values=(4.0, 1.0, 3.0, 2.0))
    assert spread.median == 2.5
    assert spread.to_dict() == {"median": 2.5, "min": 1.0, "max": 4.0, "mean": 2.5}


def _with_speed(comparison: Comparison, *speed: float) -> Comparison:
    row = replace(comparison.variants[0], speed=Spread(values=speed))
    return replace(comparison, rows=(comparison.dense, row), noisy=False)


def test_verdict_says_a_loss_as_plainly_as_a_win(compared: Comparison) -> None:
    assert "half is 1.50x as fast as dense" in verdict(_with_speed(compared, 1.4, 1.5, 1.6))
    slower = verdict(_with_speed(compared, 0.7, 0.8, 0.9))
    assert slower.startswith("every variant is slower than dense here; the quickest, half")
    same = verdict(_with_speed(compared, 0.9, 1.05, 1.2))
    assert same.startswith("no variant is faster than dense by more than the noise")
    assert all("changes the output by" in text for text in (slower, same))


def test_verdict_names_the_limit_that_attention_sets(compared: Comparison) -> None:
    limited = replace(compared, attention_share=0.2)
    assert "doing none of it would give about 1.25x" in verdict(limited)


def test_data_holds_every_measurement_and_is_json(compared: Comparison) -> None:
    data = json.loads(json.dumps(to_dict(compared)))
    assert data["dense"]["seconds"]["median"] > 0
    half = data["variants"][0]
    assert half["recipe"] == HALF.to_dict() | {"parameters": half["recipe"]["parameters"]}
    assert len(half["metrics"]["relative_error"]["values"]) == 5
    assert len(half["patched"]) == 6
    assert {"device", "dtype", "threads", "versions"} <= data["machine"].keys()
    assert data["verdict"] == verdict(compared)


def test_table_has_a_cell_for_every_heading(compared: Comparison) -> None:
    headers, rows = table(compared)
    assert all(len(row) == len(headers) for row in rows)
    assert headers == ["", "dense", "half", "whole"]
    assert {"keep asked / measured", "neighbours top1, higher is closer"} <= {r[0] for r in rows}


def test_plot_draws_a_picture_that_shows_every_variant(
    compared: Comparison, tmp_path: Path
) -> None:
    plot(compared, tmp_path / "plot.png", "tiny")
    with Image.open(tmp_path / "plot.png") as picture:
        assert min(picture.size) > 200
        colors = picture.convert("RGB").getcolors(2**24)
    assert colors is not None
    assert len(colors) > 20


def test_peak_memory_is_measured_in_fresh_processes() -> None:
    inputs = _texts(1)
    found = compare_models(tiny_models.make_bert(), {"half": HALF}, inputs, rounds=1)
    found = with_peak_memory(found, functools.partial(tiny_models.make_bert, 0), inputs)
    dense, half = (row.peak_bytes for row in found.rows)
    assert dense is not None
    assert half is not None
    assert 2**26 < dense < 2**33
    assert abs(half - dense) < 2**26
    assert "memory" in verdict(found)
    assert table(found)[1][-1][0] == "peak memory, MiB"


def test_failing_memory_process_says_what_failed() -> None:
    job = MemoryJob(open_target=functools.partial(int, "x"), recipe=None, inputs=())
    with pytest.raises(RetrofitError, match="ended with 1 .*invalid literal for int"):
        measure_peak_memory(job)


def test_more_memory_than_the_allowance_is_said(compared: Comparison) -> None:
    dense = replace(compared.dense, peak_bytes=1000 * 2**20)
    for extra, exceeds in ((60, False), (70, True)):
        row = replace(compared.variants[0], peak_bytes=(1000 + extra) * 2**20)
        found = replace(compared, rows=(dense, row))
        assert found.memory_exceeds(row) is exceeds
        assert ("7% more memory than dense" in verdict(found)) is exceeds
