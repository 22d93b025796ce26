"""Every key of a record with wrong values: exit code 2, one line, nothing written.

A few values for each key run always, a dozen where slow tests do.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from retrofit.artifact import verifying
from retrofit.checkpoints.manifest import MANIFEST, _digest
from retrofit.checkpoints.weights import read_header
from retrofit.commands import run
from retrofit.runtime.errors import CheckpointError
from tests.checkpoint_fixtures import contents

MISSING = object()
FEW: tuple[Any, ...] = (None, "x", [-1], MISSING)
MANY: tuple[Any, ...] = (
    *FEW,
    -1,
    [],
    {},
    True,
    0,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "a\0b",
    "\ud800",
    "../../x",
    [[[None]]],
    {"x": {"y": []}},
    ["x"] * 3,
)
SAID_BY_CHECKS = ("changed since patching", "edited after it was written", "missing, though")
ALIKE = (("files",), ("versions",), ("parameters",))
Path_ = tuple[str | int, ...]


def places(data: Any, place: Path_ = ()) -> Iterator[Path_]:
    """Every key of nested data; of lists, and of mappings by names, the first two."""
    items = list(data.items() if isinstance(data, dict) else enumerate(data[:2]))
    for key, value in items[:2] if place[-1:] in ALIKE else items:
        yield (*place, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*place, key))


def changed(data: Any, place: Path_, value: Any) -> Any:
    """The data with another value at one place."""
    copy = json.loads(json.dumps(data))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return copy


def cases(data: Any, values: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    for place in places(data):
        for value in values:
            shown = "nothing" if value is MISSING else ascii(value)
            yield f"{'.'.join(map(str, place))} = {shown}", changed(data, place, value)


def check(case: str, code: int, err: str, allowed: tuple[int, ...] = (2,)) -> str | None:
    """What is wrong with how a command ended, None if nothing is."""
    lines = [line for line in err.splitlines() if not line.startswith(("note: ", "checking "))]
    if code not in allowed:
        return f"{case}: exit code {code}: {err[-300:]}"
    if code and (len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > 1500):
        return f"{case}: {err[-300:]}"
    if "Traceback" in err or "--debug" in err:
        return f"{case}: {err[-300:]}"
    return None


@pytest.fixture
def ended(capfd):
    """Run a command; returns its exit code and what it said."""

    def call(*words: object) -> tuple[int, str]:
        capfd.readouterr()
        code = run([str(word) for word in words])
        return code, capfd.readouterr().err

    return call


def break_manifest(
    folder: Path, values: tuple[Any, ...], ended: Any, verbs: tuple[str, ...]
) -> list[str]:
    file = folder / MANIFEST
    record = json.loads(file.read_text())
    record["proof"]["networks"][0]["dense"]["samples"] = [0.5, 0.25]
    again = folder.parent / "again"
    before = contents(folder.parent)
    problems = []
    for case, data in cases(record, values):
        if data.get("digest") == record["digest"]:
            data["digest"] = _digest(data)
        file.write_text(json.dumps(data))
        written = file.read_bytes()
        for verb in verbs:
            code, err = ended(*(verb, folder, "-o", again)[: 4 if verb == "unpatch" else 2])
            # a value may be another right one: another name, another hash
            found = code == 1 and (verb == "verify" or any(said in err for said in SAID_BY_CHECKS))
            problems.append(check(f"{verb}: {case}", 2 if found else code, err, (0, 2)))
            if code == 0 and verb == "unpatch":
                shutil.rmtree(again)
            after = contents(folder.parent)
            assert after == before | {f"{folder.name}/{MANIFEST}": written}, case
    return [problem for problem in problems if problem]


def write_png(file: Path, record: Any) -> None:
    info = PngInfo()
    info.add_itxt("retrofit", json.dumps(record))
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)


@pytest.fixture
def record(monkeypatch) -> dict[str, Any]:
    """Of a picture of `shapes`; a request that is right ends before anything is loaded."""
    from retrofit.sampling import Generator
    from retrofit.sampling.request import Request

    def stop(self: Any) -> Any:
        raise RuntimeError("would run")

    monkeypatch.setattr(Generator, "open", stop)
    request = Request(
        model="shapes",
        prompts=("a", "b"),
        seeds=(0, 1),
        batch=2,
        width=128,
        height=128,
        steps=4,
        guidance=3.0,
        device="cpu",
        dtype="float32",
        threads=1,
        recipe={"method": "window", "parameters": {"window_size": 4}, "family": "unet2d"},
    )
    return {
        "schema": 1,
        "model": {"fingerprint": "0" * 64},
        "place": 0,
        "request": request.to_dict(),
        "versions": {"torch": "2"},
    }


def break_picture(folder: Path, record: Any, values: tuple[Any, ...], ended: Any) -> list[str]:
    problems = []
    for case, data in cases(record, values):
        write_png(folder / "like.png", data)
        code, err = ended(
            "generate", "shapes", "--like", folder / "like.png", "-o", folder / "out.png"
        )
        ran = "would run" in err
        problems.append(None if ran else check(case, code, err))
        assert [path.name for path in folder.iterdir()] == ["like.png"], case
    return [problem for problem in problems if problem]


def test_a_few_wrong_values_of_every_key_of_a_manifest(patched, copy_of, ended):
    assert break_manifest(copy_of(patched), FEW, ended, ("unpatch",)) == []


@pytest.mark.slow
def test_many_wrong_values_of_every_key_of_a_manifest(patched, copy_of, ended, monkeypatch):
    # in this process, where a traceback shows
    def repeat(folder: Any, device: Any, dtype: Any, trusted: bool) -> Any:
        asked = {"folder": folder, "device": device, "dtype": dtype, "trust_remote_code": trusted}
        return verifying._answer(asked)["proof"]

    monkeypatch.setattr(verifying, "_repeat", repeat)
    verbs = ("inspect", "unpatch", "verify")
    assert break_manifest(copy_of(patched), MANY, ended, verbs) == []


def test_a_few_wrong_values_of_every_key_of_a_picture(record, tmp_path, ended):
    assert break_picture(tmp_path, record, FEW, ended) == []


@pytest.mark.slow
def test_many_wrong_values_of_every_key_of_a_picture(record, tmp_path, ended):
    assert break_picture(tmp_path, record, MANY, ended) == []


def write_header(file: Path, header: Any, rest: bytes = b"\0" * 24) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]},
}


def test_many_wrong_values_of_every_key_of_a_header(tmp_path):
    file = tmp_path / "model.safetensors"
    write_header(file, HEADER)
    assert read_header(file)["b"].shape == (4,)
    accepted = []
    for case, header in cases(HEADER, MANY):
        write_header(file, header)
        said = refusal_of(file)
        if said is None:
            accepted += [case] if header != HEADER else []
        else:
            assert said.startswith(f"{file}: expected a whole safetensors file"), case
            assert len(said) < 1000, case
    assert all(case.startswith("__metadata__") for case in accepted), accepted


def refusal_of(file: Path) -> str | None:
    try:
        read_header(file)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"[" * 10_000, "too deep"),
        (b"[]", "expected a mapping, got list"),
        (b"\xff", "can't be read"),
        ({"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 24]}}, "a shape of whole"),
        ({"a": {"dtype": "X", "shape": [6], "data_offsets": [0, 24]}}, "a dtype of the format"),
        ({"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 1e400]}}, "two data_offsets"),
        ({"a": {"dtype": "F32", "shape": [6], "data_offsets": [-24, 0]}}, "two data_offsets"),
        ({"a": {"dtype": "F32", "shape": [5], "data_offsets": [4, 24]}}, "from 0 on, got 4"),
        ({"a": {"dtype": "F32", "shape": [7], "data_offsets": [0, 24]}}, "the bytes of F32 [7]"),
        ({"a": {"dtype": "F32", "shape": [2**63] * 65, "data_offsets": [0, 24]}}, "a shape of"),
        ({"__metadata__": [], "a": HEADER["a"]}, "expected texts by name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_header_says_what_is_wrong(header, said, refused, encoder, copy_of):
    folder = copy_of(encoder)
    write_header(folder / "model.safetensors", header)
    assert said in refused("patch", folder, "--method", "window", "-o", folder.parent / "out")


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"model": 1}', '{"model": {}}', "\0"])
def test_a_damaged_tokenizer_is_one_line(text, run_command, encoder, copy_of):
    folder = copy_of(encoder)
    (folder / "tokenizer.json").write_text(text)
    answer = run_command("compare", folder, "--method", "window", "--set", "window_size=8")
    assert answer.code == 2
    assert "tokenizer" in answer.err.splitlines()[-1]
    assert "--debug" not in answer.err


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model_index.json", {"_class_name": []}),
        ("model_index.json", {"_class_name": {"x": 1}}),
        ("model_index.json", {"_class_name": None}),
        ("unet/config.json", {"_class_name": 5}),
        ("unet/config.json", {"architectures": 5}),
        ("text_encoder/config.json", {"architectures": {"x": 1}}),
        ("text_encoder/config.json", {"auto_map": 5}),
        ("text_encoder/config.json", {"model_type": []}),
    ],
    ids=str,
)
def test_a_config_of_another_shape_is_one_line(file, changes, refused, pipeline, copy_of):
    folder = copy_of(pipeline)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    line = refused("patch", folder, "--method", "hidiffusion", "-o", folder.parent / "out")
    assert f"{folder / file}: {next(iter(changes))}: expected " in line


@pytest.mark.parametrize(
    "text",
    ["[]", "1", "null", "method: 5", "method: window\nfamily: [x]", "method: window\nsites: 5",
     "method: window\nparameters: 5", "method: window\ncomponents: {a: b}", "1: 2",
     "method: window\nparameters: {window_size: .nan}", "method: window\ndescription: [[]]",
     "? [a]\n: b", "method: window\nparameters: {window_size: 99999999999999999999999999}",
     "method: {a: b}", "a: 2001-01-01", "method: window\nparameters: {? 1 : 2}"],
)  # fmt: skip
def test_a_recipe_of_another_shape_is_one_line(text, refused, encoder, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    line = refused("patch", encoder, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert str(tmp_path / "recipe.yaml") in line
