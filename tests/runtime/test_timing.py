"""The measuring core: what is checked, in which order things run, what is reported."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from retrofit.runtime.timing import Contender, Race, Spread, filled_with_nan, race, timed, turned


class FakeClock:
    """Time that passes only when a contender runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def contender(name, clock, ran, seconds, **more):
    """Takes `seconds` of a fake clock, in turn where there are several."""
    durations = itertools.cycle(seconds)

    def run():
        ran.append(name)
        clock.now += next(durations)
        return torch.ones(3)

    return Contender(name=name, run=run, **more)


def test_rounds_are_interleaved_and_the_order_turns():
    clock, ran = FakeClock(), []
    three = [contender(name, clock, ran, [1.0]) for name in "abc"]
    result = race(three, rounds=4, clock=clock)
    # one run each to check, one to warm up, then the rounds
    assert "".join(ran) == "abc" + "abc" + "abc" + "bca" + "cab" + "abc"
    assert result.rounds == 4


def test_speed_is_the_ratio_within_each_round():
    clock, ran = FakeClock(), []
    # check and warm-up take the first two durations
    dense = contender("dense", clock, ran, [9.0, 9.0, 2.0, 4.0, 8.0])
    sparse = contender("sparse", clock, ran, [7.0, 7.0, 1.0, 1.0, 1.0])
    result = race([dense, sparse], rounds=3, clock=clock)
    assert result.seconds["dense"] == pytest.approx((2.0, 4.0, 8.0))
    speed = result.speed("sparse", "dense")
    assert speed.values == pytest.approx((2.0, 4.0, 8.0))
    assert speed.median == pytest.approx(4.0)
    assert result.first == {"dense": 9.0, "sparse": 7.0}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.5, 7), (2.5, 3)], ids=["quick", "slow"])
def test_slow_calls_get_fewer_rounds(seconds, rounds):
    clock = FakeClock()
    result = race([contender("only", clock, [], [seconds])], clock=clock)
    assert result.rounds == rounds


def test_no_round_begins_past_the_deadline_once_there_are_three():
    clock = FakeClock()
    result = race([contender("only", clock, [], [1.0])], rounds=50, stop_at=6.5, clock=clock)
    assert result.rounds == 5
    late = race([contender("only", clock, [], [1.0])], rounds=50, stop_at=0.0, clock=clock)
    assert late.rounds == 3


def test_wrong_output_is_not_timed():
    clock, ran = FakeClock(), []
    right = contender("right", clock, ran, [1.0], error=lambda out: 1e-7, tolerance=1e-6)
    wrong = contender("wrong", clock, ran, [1.0], error=lambda out: 0.3, tolerance=1e-6)
    result = race([right, wrong], rounds=2, clock=clock)
    assert set(result.seconds) == {"right"}
    assert result.refused == {"wrong": "wrong output: relative error 0.3, allowed 1e-06"}
    assert ran.count("wrong") == 1


def test_an_error_that_is_nan_counts_as_wrong():
    result = race([Contender(name="nan", run=lambda: 0, error=lambda out: math.nan, tolerance=1)])
    assert "wrong output" in result.refused["nan"]
    assert result.seconds == {}


def test_a_contender_that_fails_is_reported_with_its_reason():
    def fail():
        raise ValueError("no such\nkernel")

    result = race([Contender(name="broken", run=fail), Contender(name="fine", run=lambda: 0)])
    assert result.refused == {"broken": "ValueError: no such kernel"}
    assert set(result.seconds) == {"fine"}


def test_memory_that_is_never_written_holds_nan_while_checked():
    seen = []

    def run():
        return torch.empty(1000)

    def error(output):
        seen.append(output)
        return 0.0

    race([Contender(name="lazy", run=run, error=error)], rounds=1)
    assert all(bool(output.isnan().all()) for output in seen)
    assert len(seen) == 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_filling_with_nan_leaves_the_settings_as_they_were():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with filled_with_nan():
            pass
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("times", "noisy"), [((1.0, 1.2, 1.1), False), ((1.0, 1.4, 1.1), True)])
def test_a_baseline_that_varies_by_a_quarter_makes_a_run_noisy(times, noisy):
    result = Race(seconds={"a": times}, errors={}, refused={}, first={}, load=(0.0, 0.0))
    assert result.is_noisy("a") is noisy


def test_orders_begin_one_further_on_in_every_round():
    assert [turned("abc", turn) for turn in range(4)] == [
        list(order) for order in ("abc", "bca", "cab", "abc")
    ]
    assert turned([], 3) == []


def test_a_spread_knows_its_width_and_its_ratio_to_another():
    spread = Spread(values=(2.0, 4.0, 8.0))
    assert spread.width == pytest.approx(6 / 4)
    assert spread.scaled(0.5).values == (1.0, 2.0, 4.0)
    assert spread.ratio_to(Spread(values=(1.0, 4.0, 2.0))).values == (2.0, 1.0, 4.0)
    with pytest.raises(ValueError, match="shorter"):
        spread.ratio_to(Spread(values=(1.0,)))


def test_seconds_are_of_the_clock_that_is_given():
    clock = FakeClock()
    only = contender("only", clock, [], [3.0])
    assert timed(only.run, clock=clock)[1] == 3.0
