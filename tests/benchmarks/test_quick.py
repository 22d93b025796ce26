"""`python -m benchmarks.quick`: its lines, its refusal, its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import common, quick, summary
from retrofit.layout.grid import TokenGrid
from retrofit.patterns import Neighborhood
from retrofit.profiling.bench import patterns

KEYS = {"goal", "case", "ratio", "must", "target", "load", "refused"}


@pytest.fixture
def small(monkeypatch):
    """Sizes that take milliseconds, and no pinning of the process that runs the tests."""
    monkeypatch.setattr(quick, "SEQ_LEN", 512)
    video = TokenGrid(frames=3, height=8, width=10)
    monkeypatch.setattr(quick, "WINDOWS", Neighborhood(layout=video, window_size=(3, 3, 5)))
    monkeypatch.setattr(common, "pin_to_one_core", lambda: 0)
    monkeypatch.setattr(quick, "FIRST_CALLS", 1)
    monkeypatch.setattr(
        quick, "time_first_calls", lambda cache: {"block-sparse": 1.5, "windows": 0.5}
    )


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_goal_has_its_lines(small, capsys):
    assert quick.main(["--json", "--rounds", "3", "--seed", "1"]) == 0
    lines = lines_of(capsys)
    goals = [line["goal"] for line in lines]
    counts = {goal: goals.count(goal) for goal in goals}
    assert counts == {"C1": 8, "C2": 8, "C4": 4, "C7": 2, "C8": 2, "C9": 4}
    for line in lines:
        assert set(line) >= KEYS
        assert 0 < line["min"] <= line["ratio"] <= line["max"]
        assert line["must"] <= line["target"]
        assert line["refused"] == ""
        assert {"torch", "python"} <= set(line["versions"])
        assert line["seed"] == 1


def test_efficiency_counts_the_pairs_that_are_kept(small, capsys):
    quick.main(["--json", "--rounds", "3", "--only", "C1"])
    for line in lines_of(capsys):
        assert line["ratio"] == pytest.approx(line["efficiency"]["median"])
        block = line["block_size"][0]
        assert line["kept"] == pytest.approx(line["list_mean"] * block / 512)
        tflops = 4 * 2 * 64 * 512**2 * line["kept"] / line["seconds"] / 1e12
        assert line["tflops_kept"] == pytest.approx(tflops)


def test_limits_are_divided_by_what_was_measured(small, capsys):
    quick.main(["--json", "--only", "C9"])
    ratios = {line["case"]: line["ratio"] for line in lines_of(capsys)}
    assert set(ratios.values()) == {2.0, 6.0}
    assert all(("windows" in case) == (ratio == 6.0) for case, ratio in ratios.items())


@pytest.mark.parametrize("goal", ["C1", "C4", "C7", "C8"])
def test_wrong_output_is_not_timed(small, capsys, monkeypatch, goal):
    def slightly_wrong(function):
        def run(*args, **kwargs):
            out = function(*args, **kwargs)
            return ~out if out.dtype == torch.bool else out * 1.01

        return run

    for module, name in (
        (patterns, "block_sparse_attention"),
        (patterns, "attend"),
        (quick, "select_blocks"),
    ):
        monkeypatch.setattr(module, name, slightly_wrong(getattr(module, name)))
    assert quick.main(["--json", "--rounds", "3", "--only", goal]) == 1
    lines = lines_of(capsys)
    assert lines
    for line in lines:
        assert line["ratio"] is None
        assert "wrong output" in line["refused"]


def test_a_line_for_people_says_what_was_reached(small, capsys):
    assert quick.main(["--rounds", "3", "--only", "C9"]) == 0
    out = capsys.readouterr().out
    assert "must 1.00 target 2.00  target" in out
    assert len(out.splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "C99"], "no goal C99"),
        (["--threads", "many"], "expected a number or all"),
        (["--rounds", "0"], "expected at least 1"),
    ],
    ids=["goal", "threads", "rounds"],
)
def test_wrong_options_are_one_line(arguments, message):
    with pytest.raises(common.WrongOptionError, match=message):
        quick.main(arguments)


def test_all_threads_are_refused_on_a_busy_machine(monkeypatch):
    monkeypatch.setattr(common, "load_average", lambda: 1.5)
    with pytest.raises(common.WrongOptionError, match="load average is 1.5"):
        quick.main(["--threads", "all"])


def test_a_wrong_option_leaves_with_2():
    command = [sys.executable, "-m", "benchmarks.quick", "--only", "C99"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --only C99")
    assert len(done.stderr.splitlines()) == 1


def test_the_slow_choice_agrees_with_the_operator():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 1024, 16, generator=generator) for _ in range(2))
    slow = quick.choose_slowly(query, key, (128, 64), 0.3)
    fast = quick.select_blocks(query, key, block_size=(128, 64), keep=0.3)
    assert quick.disagreement(fast, slow) == 0.0
    assert slow.sum(-1).unique().tolist() == [4]


def test_cases_past_the_budget_get_one_round_and_say_so(small, capsys, monkeypatch):
    monkeypatch.setattr(quick, "BUDGET", -1.0)
    assert quick.main(["--json", "--only", "C7"]) == 0
    for line in lines_of(capsys):
        assert line["rounds"] == 1
        assert line["noisy"]


def test_a_summary_names_what_was_reached(small, capsys, tmp_path):
    quick.main(["--json", "--only", "C9"])
    file = tmp_path / "quick.jsonl"
    file.write_text(capsys.readouterr().out)
    assert summary.main([str(file)]) == 0
    out = capsys.readouterr().out
    assert out.count("| C9 |") == 4
    assert out.count("| target |") == 5  # the header too
    with pytest.raises(common.WrongOptionError, match="no such file"):
        summary.main([str(tmp_path / "none")])
