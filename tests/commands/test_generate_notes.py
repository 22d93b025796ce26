"""What `retrofit generate` says beside its pictures, where they may not be what was hoped for."""

from __future__ import annotations

from PIL import Image

SMALL = ("--size", "64x64", "--steps", "1", "--no-time-saved")


def test_a_prompt_outside_the_bundled_models_words_is_named(run_command, tmp_path):
    dog = run_command("generate", "-p", "a dog", *SMALL, "-o", tmp_path / "dog.png")
    assert dog.code == 0
    assert "shapes draws only circle, cross, ring, square, star, triangle" in dog.err
    star = run_command("generate", "-p", "a red Star.", *SMALL, "-o", tmp_path / "star.png")
    assert "draws only" not in star.err


def test_few_steps_far_above_the_training_size_are_noted(pipeline, run_command, tmp_path):
    words = ("generate", pipeline, "-p", "a cat", "--no-time-saved")
    far = run_command(*words, "--size", "128x128", "--steps", "2", "-o", tmp_path / "a.png")
    assert "note: 2 steps at 4 times the training size of 32x32 mostly give noise" in far.err
    near = run_command(*words, "--size", "64x64", "--steps", "2", "-o", tmp_path / "b.png")
    assert "give noise" not in near.err


def test_every_file_is_told_with_its_prompt_and_seed_and_a_sheet_shows_them(
    pipeline, run_command, tmp_path
):
    words = ("generate", pipeline, "-p", "a cat", "-p", "a dog", "-n", "2", "--steps", "1")
    sheet = ("--sheet", tmp_path / "sheet.png")
    answer = run_command(*words, *sheet, "-o", tmp_path / "a.png")
    assert answer.code == 0, answer.err
    assert f"wrote {tmp_path / 'a-3.png'}: 32x32, 'a dog', seed 2" in answer.out
    assert Image.open(tmp_path / "sheet.png").size == (3 * 192, 2 * (192 + 46))
    again = run_command(*words, *sheet, "-o", tmp_path / "b.png")
    assert (again.code, "--sheet" in again.err) == (2, True)
