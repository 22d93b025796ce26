"""Files from others: what would hang, never end or grow is refused before it is read."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from retrofit.runtime.errors import InputError
from retrofit.runtime.reading import (
    YAML_BYTES,
    open_regular,
    parse_json,
    parse_yaml,
    read_bytes,
    read_text,
)

LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {k0: x}\n" + "".join(
    f"a{i}: &a{i} {{k{i}: x, <<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, r"no aliases, got \*a0 in line 2"),
        (MERGES, "no (aliases|merges), got"),
        ("a: 1\n<<: {b: 2}", "no merges, got << in line 2"),
        ("a: 1\nb: 2\na: 3", "every key once, got 'a' again in line 3"),
        ("a: {b: 1, b: 2}", "every key once, got 'b' again in line 1"),
        ("a: !!python/object/apply:os.system [x]", "no tags, got"),
        ("a: !!int ''", "no tags, got"),
        ("[" * 5000, "at most 20 levels"),
        ("{a: " * 100, "at most 20 levels"),
        ("- x\n" * 20_000, "at most 20 levels and 10000 values"),
        ("# " + "x" * YAML_BYTES, "at most 100 kB"),
        ("a: 0x" + "f" * 5000, "no whole number above 64 bits"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: 2001-99-99", "month must be in"),
        ("a: [1", "while parsing"),
        ("a: \x00", "unacceptable character"),
        ("{[1]: 2}", "unhashable"),
    ],
    ids=lambda value: None if len(value) > 60 else value[:30],
)
def test_yaml_that_surprises_is_refused_at_once(text: str, expected: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match=expected) as caught:
        parse_yaml(text)
    assert time.perf_counter() - started < 5
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_ordinary_yaml_is_read_as_before() -> None:
    text = "a: [1, 2.5, [true, null]]\nb: {c: '<<', d: 1e-3}\n'1': x\n1: y\n"
    assert parse_yaml(text) == {
        "a": [1, 2.5, [True, None]],
        "b": {"c": "<<", "d": "1e-3"},
        "1": "x",
        1: "y",
    }


def test_json_that_nests_too_deep_is_an_error_like_any_other() -> None:
    with pytest.raises(ValueError, match="too deep"):
        parse_json("[" * 200_000)


@pytest.fixture(params=["pipe", "socket", "folder", "device", "link to a device"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    file = tmp_path / "special"
    if request.param == "pipe":
        os.mkfifo(file)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(os.path.relpath(file))
    elif request.param == "folder":
        file.mkdir()
    elif request.param == "device":
        file = Path("/dev/zero")
    else:
        file.symlink_to("/dev/zero")
    return file, f"got a {request.param.split()[-1]}"


def test_what_is_no_file_is_refused_by_name(special: tuple[Path, str]) -> None:
    file, said = special
    with pytest.raises(InputError, match=said) as caught:
        read_text(file)
    assert str(caught.value).startswith(f"{file}: expected a file")


def test_a_file_above_its_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(b"")
    os.truncate(file, 10**12)  # a hole, which takes no room
    with pytest.raises(InputError, match=r"expected at most 1 MB, got 1000000\.0 MB"):
        read_bytes(file, 1_000_000)
    with open_regular(file) as stream:
        assert stream.read(3) == b"\0\0\0"


def test_a_pipe_that_takes_the_place_of_a_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_text("x")
    os.mkfifo(pipe)
    own = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: own(pipe, *rest))
    with pytest.raises(InputError, match="got a pipe"):
        open_regular(file)
