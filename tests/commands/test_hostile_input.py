"""Inputs that were made to hang, to fill the memory, or to reach what is not theirs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retrofit.checkpoints.manifest import MANIFEST
from tests.checkpoint_fixtures import patch_words
from tests.runtime.test_reading import LAUGHS, MERGES

WEIGHTS = "model.safetensors"


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(autouse=True)
def in_seconds():
    """None of these may take the time or the memory it asks for."""
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize("text", [LAUGHS, MERGES], ids=["aliases", "merges"])
@pytest.mark.parametrize("where", ["recipe", "setting"])
def test_yaml_that_grows_is_refused(text, where, refused, encoder, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("method: block-sparse\n" + text)
    words = (
        ("--recipe", file) if where == "recipe" else ("--method", "window", "--set", f"keep={text}")
    )
    line = refused("patch", encoder, *words, "-o", tmp_path / "out")
    said = (
        ("no aliases, got", "no merges, got")
        if where == "recipe"
        else ("--set keep=a0", "a number")
    )
    assert any(words in line for words in said)


def test_a_key_that_a_recipe_has_twice_is_named(refused, encoder, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("method: window\nmethod: block-sparse\n")
    line = refused("patch", encoder, "--recipe", file, "-o", tmp_path / "out")
    assert "every key once, got 'method' again in line 2" in line


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_in_a_checkpoint_is_refused_by_name(
    name, kind, refused, encoder, copy_of, tmp_path
):
    folder = copy_of(encoder)
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    for words in (("inspect", folder), patch_words(folder, tmp_path / "out"), ("verify", folder)):
        line = refused(*words)
        assert f"{folder / name}: expected a file, got a {kind}" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("patch", "MODEL", "--recipe", "PIPE", "-o", "OUT"), "PIPE: expected a file, got a pipe"),
        (("generate", "shapes", "--prompt-file", "PIPE", "-o", "OUT.png"), "got a pipe"),
        (("generate", "shapes", "-p", "x", "--image", "PIPE", "-o", "OUT.png"), "got a pipe"),
        (("generate", "--like", "PIPE", "-o", "OUT.png"), "got a pipe"),
        (("compare", "MODEL", "--method", "window", "--inputs", "PIPE"), "got a pipe"),
        (("reconstruct", "rooms", "PIPE", "PIPE2", "-o", "OUT"), "got a pipe"),
        (("inspect", "PIPE"), "got a pipe"),
    ],
    ids=lambda value: " ".join(value[:4:3]) if isinstance(value, tuple) else "",
)
def test_a_pipe_named_on_the_command_line_is_refused(words, said, run_command, encoder, tmp_path):
    for name in ("PIPE", "PIPE2"):
        os.mkfifo(tmp_path / name)
    place = {"MODEL": str(encoder)} | {
        name: str(tmp_path / name) for name in ("PIPE", "PIPE2", "OUT", "OUT.png")
    }
    answer = run_command(*(place.get(word, word) for word in words))
    assert answer.code == 2
    assert said in answer.err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["PIPE", "PIPE2"]


def test_a_header_above_the_formats_own_limit_is_not_read(refused, encoder, copy_of, tmp_path):
    folder = copy_of(encoder)
    with (folder / WEIGHTS).open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(110_000_000)
    line = refused(*patch_words(folder, tmp_path / "out"))
    assert "a header of 100000001 bytes, 100000000 at most" in line


def test_json_beyond_any_configs_size_is_not_read(refused, encoder, copy_of, tmp_path):
    folder = copy_of(encoder)
    (folder / "config.json").write_text('{"model_type": "bert", "x": "' + "x" * 90_000_000 + '"}')
    line = refused(*patch_words(folder, tmp_path / "out"))
    assert f"{folder / 'config.json'}: expected at most 32 MB, got 90.0 MB" in line


@pytest.mark.parametrize(
    ("component", "key", "value"),
    [
        ("", "num_hidden_layers", 1_000_000),
        ("", "max_position_embeddings", 10**13),
        ("", "vocab_size", 10**40),
        ("", "intermediate_size", 2**40),
        ("unet", "layers_per_block", 1_000_000),
        ("unet", "layers_per_block", [1, 10**7]),
        ("unet", "transformer_layers_per_block", 10**6),
        ("unet", "block_out_channels", [1] * 2_000_000),
        ("unet", "sample_size", 10**9),
        ("scheduler", "num_train_timesteps", 10**12),
    ],
    ids=lambda value: str(value)[:24],
)
def test_an_absurd_number_of_a_config_is_refused_before_it_is_built(
    component, key, value, refused, encoder, pipeline, copy_of, tmp_path
):
    folder = copy_of(pipeline if component else encoder)
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    change_json(folder / component / name, **{key: value})
    for words in (("inspect", folder), ("patch", folder, "--method", "window", "-o", "out")):
        line = refused(*words)
        assert f"{folder / component / name}: " in line
        assert key in line
        assert "expected at most" in line


def test_a_png_with_a_bomb_of_text_is_damaged(refused, tmp_path):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("retrofit", "x" * 5_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=info)
    assert "can't be read" in refused("generate", "--like", tmp_path / "bomb.png", "-o", "out.png")
