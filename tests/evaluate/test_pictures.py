"""Whole pictures, dense and patched, side by side: drawn, timed, judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrofit.commands import run
from retrofit.evaluate.judging import read_judge, wilson_interval
from retrofit.evaluate.pictures import compare_pictures
from retrofit.evaluate.sheet import draw_sheet, table, to_dict
from retrofit.methods.hidiffusion import HiDiffusionConfig
from retrofit.patching.recipe import Recipe
from retrofit.runtime.errors import InputError, NotFoundError
from retrofit.sampling import Generator, Request

CHECK = Path(__file__).parents[2] / "examples" / "shapes" / "check.py"
PATCH = {"long": Recipe.of(HiDiffusionConfig(first_steps=(1.0, 1.0)))}


def ask(count: int = 2) -> Request:
    prompts = ("a red star", "a blue ring")[:count]
    return Request(
        model="shapes", prompts=prompts, seeds=(5, 6), width=256, height=192, steps=2, device="cpu"
    )


@pytest.fixture(scope="module")
def rows():
    return compare_pictures(ask(), PATCH, judge=read_judge(CHECK))


def test_every_prompt_is_drawn_at_the_training_size_dense_and_patched(rows) -> None:
    assert [row.name for row in rows] == ["dense, training size", "dense", "long"]
    assert [row.size for row in rows] == [(128, 128), (256, 192), (256, 192)]
    assert all([p.prompt for p in row.pictures] == list(ask().prompts) for row in rows)
    assert rows[0].speed is None
    assert rows[1].speed.values == (1.0, 1.0)
    expected = tuple(
        dense.seconds / patched.seconds
        for dense, patched in zip(rows[1].pictures, rows[2].pictures, strict=True)
    )
    assert rows[2].speed.values == expected


def test_pictures_are_those_that_generate_makes(rows) -> None:
    for what, row in ((None, rows[1]), (PATCH["long"], rows[2])):
        with Generator(ask(), what) as generator:
            made = list(generator.pictures())
        for mine, compared in zip(made, row.pictures, strict=True):
            assert np.array_equal(np.asarray(mine.image), np.asarray(compared.image))
            assert mine.record["request"]["recipe"] == compared.record["request"]["recipe"]


def test_the_judge_sees_pixels_and_prompt(tmp_path: Path, rows) -> None:
    seen = []

    def judge(picture, prompt):
        seen.append((picture.shape, picture.dtype, prompt))
        return {"mean": float(picture.mean()), "red": "red" in prompt}

    judged = compare_pictures(ask(), {}, judge=judge)
    assert (seen[-1][0], seen[-1][1]) == ((192, 256, 3), np.uint8)
    dense = judged[-1]
    assert dense.scores["red"].values == (1.0, 0.0)
    assert dense.scores["mean"].values[1] == pytest.approx(
        np.asarray(dense.pictures[1].image).mean()
    )
    headers, cells = table(judged)
    assert headers[-2:] == ["mean", "red"]
    low, high = wilson_interval(1, 2)
    assert cells[-1][-1] == f"1/2 ({low:.0%} to {high:.0%})"
    assert to_dict(dense)["scores"]["red"]["interval"] == [low, high]
    assert set(to_dict(rows[2])["scores"]) == {"one object", "right colour", "right shape"}


def test_the_sheet_has_a_line_for_each_row(tmp_path: Path, rows) -> None:
    draw_sheet(rows, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 192, 3 * (192 + 46))
        pixels = np.asarray(sheet.convert("RGB"))
    assert all(pixels[i * 238 + 60 : i * 238 + 220, 20:180].std() > 5 for i in range(3))


def test_the_command_draws_judges_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue ring\n")
    sheet = tmp_path / "made" / "too" / "sheet.png"
    words = ["compare", "shapes", "-m", "hidiffusion", "--size", "128x192", "--steps", "1"]
    words += ["--prompt-file", prompts, "--pictures", "1", "--judge", CHECK, "--sheet", sheet]
    words += ["--rounds", "1", "--num-inputs", "1", "--no-memory", "--device", "cpu", "--json"]
    code = run([str(word) for word in words])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    said = json.loads(printed.out)
    assert said["sheet"] == str(sheet)
    assert [row["size"] for row in said["pictures"]] == [[128, 128], [128, 192], [128, 192]]
    assert said["pictures"][2]["prompts"] == ["a red star"]
    assert sheet.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sheet", "x.png"], "--sheet: needs --prompt-file"),
        (["--steps", "3"], "--steps: needs --prompt-file"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt: can't be read"),
        (["--prompt-file", "p.txt", "--sheet", "x.gif"], "--sheet x.gif: expected a name ending"),
        (["--prompt-file", "p.txt", "--judge", "j.py"], "--judge j.py: no such file"),
        (["--prompt-file", "p.txt", "--judge", "p.txt"], "--judge p.txt: expected a Python file"),
        (["--prompt-file", "p.txt", "--pictures", "0"], "--pictures"),
        (["--prompt-file", "p.txt", "--size", "250x256"], "The nearest are"),
    ],
)
def test_wrong_input_about_pictures_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words,
    expected,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a red star\n")
    code = run(["compare", "shapes", "-m", "hidiffusion", *words])
    printed = capsys.readouterr()
    assert code == 2
    assert expected in printed.err
    assert printed.err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["p.txt"]


def test_pictures_of_an_encoder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests import tiny_pipelines

    (tmp_path / "p.txt").write_text("a red star\n")
    encoder = tiny_pipelines.write_encoder_checkpoint(tmp_path / "encoder")
    code = run(["compare", str(encoder), "-m", "window", "--prompt-file", str(tmp_path / "p.txt")])
    assert code == 2
    assert "text-to-image" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "def score(:",
        "x = 1",
        "raise ValueError('no')",
        "def score(picture, prompt): return picture.convert('L')",
        "def score(picture, prompt): return 'fine'",
        "def score(picture, prompt): return {'sharp': 'very'}",
        "def score(picture, prompt): return {'sharp': float('nan')}",
    ],
)
def test_a_judge_that_can_not_judge_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "judge.py"
    file.write_text(text)
    with pytest.raises(InputError, match=r"--judge .*judge\.py"):
        read_judge(file)
    with pytest.raises(NotFoundError, match="no such file"):
        read_judge(tmp_path / "other.py")


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_judge_that_fails_late_loses_nothing_but_its_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    (tmp_path / "p.txt").write_text("a red star\n")
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def score(picture, prompt):\n"
        "    if picture.std() > 0: raise ValueError('boom')\n"
        "    return {'sharp': 1}\n"
    )
    words = ["compare", "shapes", "-m", "hidiffusion", "--size", "128x128", "--steps", "1"]
    words += ["--prompt-file", tmp_path / "p.txt", "--judge", judge, "--sheet", tmp_path / "s.png"]
    words += ["--rounds", "1", "--num-inputs", "1", "--no-memory", "--device", "cpu"]
    code = run([str(word) for word in [*words, *(["--json"] if as_json else [])]])
    printed = capsys.readouterr()
    assert code == 1  # 2 would say that nothing was written
    assert "score(picture, 'a red star') fails with ValueError('boom')" in printed.err
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (3 * 192, 2 * (192 + 46))
    if as_json:
        said = json.loads(printed.out)
        assert said["exit_code"] == 1
        assert said["variants"][0]["speed"]["median"] > 0
        assert [row["scores"] for row in said["pictures"]] == [{}, {}]
        assert said["sheet"] == str(tmp_path / "s.png")
    else:
        assert "verdict: " in printed.out
        assert "seconds each" in printed.out
        assert "sharp" not in printed.out


def test_a_judge_that_fails_later_names_the_prompt_and_other_names_are_refused(
    tmp_path: Path,
) -> None:
    file = tmp_path / "judge.py"
    file.write_text(
        "def score(picture, prompt):\n"
        "    if prompt == 'b': raise ValueError('boom')\n"
        "    return {prompt: picture[0, 0, 0]}\n"
    )
    judge = read_judge(file, "a")
    picture = np.full((4, 5, 3), 7, np.uint8)
    assert judge(picture, "a") == {"a": 7.0}
    with pytest.raises(InputError, match=r"score\(picture, 'b'\) fails with ValueError\('boom'\)"):
        judge(picture, "b")
    with pytest.raises(InputError, match=r"expected the names \['a'\].*got \['c'\]"):
        judge(picture, "c")
