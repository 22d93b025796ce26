"""What can't be fine-tuned, or not like this: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil

import pytest

WINDOW = ("-m", "window", "--set", "keep=0.3")
FEW = ("batch=4", "held_out=8", "lr=1e-3", "size=32x32")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "not patched. Add --method or --recipe"),
        ((*WINDOW, "lr=high"), "lr: expected a number"),
        ((*WINDOW, "learning_rate=1"), "'learning_rate' is no setting"),
        ((*WINDOW, "lr"), "lr: expected NAME=VALUE, as in lr=1e-4"),
        ((*WINDOW, "train=some"), "train: expected"),
        ((*WINDOW, "train=gates"), "window has no gates or tables to learn"),
        ((*WINDOW, "batch=6", "grad_accum=4"), "grad_accum 4 does not divide batch 6"),
        ((*WINDOW, "held_out=40"), "expected at least 44 samples"),
        ((*WINDOW, "--tracker", "paper"), "--tracker paper: expected tensorboard or wandb"),
        ((*WINDOW, "size=33x32"), "--size 33x32: expected multiples of 2 pixels, got 33"),
        (("-m", "hidiffusion"), "depends on the step of a denoising run"),
        ((*WINDOW, "--data", "nowhere"), "--data nowhere: no such file or folder"),
        ((*WINDOW, "--data", "self"), "Add --prompts FILE"),
    ],
)
def test_a_request_that_can_not_be_met(words, told, refused, pipeline, pictures, tmp_path):
    data = () if "--data" in words else ("--data", pictures)
    line = refused("finetune", pipeline, *FEW, *words, *data, "-o", tmp_path / "out")
    assert told in line


def test_nothing_to_write_to_or_learn_from(refused, pipeline, pictures, tmp_path):
    line = refused("finetune", pipeline, *FEW, *WINDOW, "--data", pictures)
    assert "expected -o FOLDER" in line
    line = refused("finetune", pipeline, *FEW, *WINDOW, "-o", tmp_path / "out")
    assert "Add --data" in line
    line = refused("finetune", pipeline, *FEW[:2], *WINDOW, "--data", pictures, "--dry-run")
    assert "no learning rate" in line
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    line = refused("finetune", pipeline, *FEW, *WINDOW, "--data", pictures, "-o", tmp_path / "out")
    assert "out" in line


def test_pictures_without_captions_or_that_are_none(refused, pipeline, pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    (folder / "03.txt").unlink()
    words = (*FEW, *WINDOW, "--data", folder, "-o", tmp_path / "out")
    line = refused("finetune", pipeline, *words)
    assert "1 of 28 pictures have no caption, such as 03.png. Put it into 03.txt" in line
    (folder / "03.txt").write_text("a cat")
    (folder / "03.png").write_bytes(b"no picture")
    assert "03.png" in refused("finetune", pipeline, *words)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metadata.jsonl", '{"file_name": "00.png"}', "row 1: expected a column text or caption"),
        ("metadata.jsonl", '{"text": "a cat"}', "row 1: expected a column file_name"),
        ("metadata.jsonl", "{", "line 1: expected JSON"),
        ("metadata.csv", "file_name,text\nmissing.png,a cat\n", "missing.png: no such file"),
        ("metadata.csv", "file_name,text\n", "expected rows of file_name and text, got none"),
    ],
)
def test_a_table_that_can_not_be_used(name, content, told, refused, pipeline, pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    (folder / name).write_text(content)
    assert told in refused(
        "finetune", pipeline, *FEW, *WINDOW, "--data", folder, "-o", tmp_path / "out"
    )


def test_a_table_says_the_captions(run_command, pipeline, pictures, tmp_path):
    table = tmp_path / "table.jsonl"
    rows = [{"file_name": str(file), "text": "a dog"} for file in sorted(pictures.glob("*.png"))]
    table.write_text("\n".join(map(json.dumps, rows)))
    answer = run_command(
        "finetune", pipeline, *FEW, *WINDOW, "--data", table, "--dry-run", "--json"
    )
    assert answer.json["samples"] == 28


def test_a_family_that_can_not_be_trained(refused, texts, tmp_path):
    from tests import tiny_models

    folder = tmp_path / "vit"
    tiny_models.make_vit().save_pretrained(folder)
    line = refused(
        "finetune", folder, *FEW, "-m", "window", "--data", texts, "-o", tmp_path / "out"
    )
    assert "family vit can't be fine-tuned yet. Families that can: " in line
