"""`bench`: operators and whole models, dense against patched in one run."""

from __future__ import annotations

import json

import pytest
import torch

from retrofit.profiling.bench import patterns

TINY = ("--tokens", "144", "--rounds", "2", "--device", "cpu", "--dtype", "float32")
HALF = ("-m", "window", "--set", "keep=0.5", "--device", "cpu", "--rounds", "1")


def test_operators_are_timed_beside_dense(run_command, tmp_path):
    picture = tmp_path / "bench.png"
    answer = run_command("bench", *TINY, "--plot", picture, "--json")
    assert answer.code == 0, answer.err
    lines = answer.json["lines"]
    assert {line["case"] for line in lines} == {
        "block-sparse, keep 0.1",
        "block-sparse, keep 0.5",
        "windows, half a side",
        "window around each, a third",
        "t3, frame by frame",
        "t3, boxes",
    }
    for line in lines:
        assert line["refused"] == ""
        assert line["seq_len"] == 144
        assert line["rounds"] == 2
        assert line["speed"]["min"] <= line["speed"]["median"] <= line["speed"]["max"]
        assert line["error"] <= line["tolerance"]
    assert answer.json["machine"]["threads"] == torch.get_num_threads()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_says_where_an_operator_loses(run_command, monkeypatch):
    from retrofit.runtime.timing import Race

    # every contender but dense takes twice as long
    monkeypatch.setattr(Race, "speed", lambda self, name, base: patterns_speed(0.5))
    answer = run_command("bench", *TINY)
    assert answer.code == 0, answer.err
    assert answer.out.count("slower than dense") == 7  # six rows and the last line
    assert "slower than dense in 6 of 6 cases, the longest of them at 144 tokens" in answer.out


def patterns_speed(value):
    from retrofit.runtime.timing import Spread

    return Spread(values=(value, value))


def test_an_operator_that_is_wrong_has_no_time(run_command, monkeypatch):
    right = patterns.block_sparse_attention
    monkeypatch.setattr(
        patterns, "block_sparse_attention", lambda *args, **more: right(*args, **more) * 1.01
    )
    answer = run_command("bench", *TINY, "--json")
    refused = [line for line in answer.json["lines"] if line["refused"]]
    assert {line["case"] for line in refused} == {
        "block-sparse, keep 0.1",
        "block-sparse, keep 0.5",
    }
    assert all(line["speed"] is None and line["seconds"] is None for line in refused)
    assert all("wrong output" in line["refused"] for line in refused)


def test_a_model_is_timed_dense_and_patched(run_command, encoder, tmp_path):
    picture, file = tmp_path / "made" / "model.png", tmp_path / "also" / "model.json"
    sizes = ("--tokens", "48", "--tokens", "96")
    answer = run_command("bench", encoder, *HALF, *sizes, "--plot", picture, "-o", file, "--json")
    assert answer.code == 0, answer.err
    assert [size["tokens"] for size in answer.json["sizes"]] == [48, 96]
    for size in answer.json["sizes"]:
        (variant,) = size["variants"]
        assert variant["name"] == "window keep=0.5"
        assert variant["speed"]["median"] > 0
        assert size["limit"] > 1
    assert answer.json["method"] == "window"
    assert json.loads(file.read_text()) == answer.json
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_gets_a_table(run_command, encoder):
    answer = run_command("bench", encoder, *HALF, "--tokens", "48")
    assert answer.code == 0, answer.err
    assert "48 tokens" in answer.out
    assert "window keep=0.5" in answer.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "window"), "are for a model"),
        (("--size", "64x64"), "are for a model"),
        (("--tokens", "0"), "--tokens"),
        (("--tokens", "9"), "expected 64 or more"),
        (("--rounds", "0"), "--rounds"),
        (("--dtype", "int8"), "expected float32, bfloat16 or float16"),
        (("--plot", "bench.txt"), "ending in .png"),
        (("--out", f"{__file__}/x.json"), "is a file. Give a name in another place"),
        (("no-such-model", "-m", "window"), "no-such-model"),
    ],
    ids=["method", "size", "zero", "few", "rounds", "dtype", "plot", "folder", "model"],
)
def test_wrong_input_is_one_line(run_command, arguments, message):
    answer = run_command("bench", *arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert message in answer.err
    assert len(answer.err.strip().splitlines()) == 1


def test_a_file_that_exists_is_not_written_over(run_command, tmp_path):
    file = tmp_path / "bench.json"
    file.write_text("mine")
    answer = run_command("bench", *TINY, "-o", file)
    assert answer.code == 2
    assert "exists already" in answer.err
    assert file.read_text() == "mine"


def test_a_model_without_a_method_has_nothing_to_time(run_command, encoder):
    answer = run_command("bench", encoder, "--tokens", "48")
    assert answer.code == 2
    assert "Name a method" in answer.err
