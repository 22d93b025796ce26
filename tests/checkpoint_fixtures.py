"""Tiny checkpoints on disk, made once a run; tests copy what they change.

`tests.conftest` offers them to every test, and `run_command`, the command line in this process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from retrofit.checkpoints.manifest import MANIFEST, Manifest, _digest
from retrofit.commands import run
from retrofit.runtime.outputs import PARTIAL
from tests import tiny_pipelines

BLOCKS = ("--method", "block-sparse", "--set", "block_size=[16,16]", "--set", "keep=0.25")


class Answer(NamedTuple):
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


RunCommand = Callable[..., Answer]


@pytest.fixture
def run_command(capfd: pytest.CaptureFixture[str]) -> RunCommand:
    """`run_command("patch", folder, ...)`: paths may be given as they are."""

    def call(*arguments: object) -> Answer:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Answer(code, *capfd.readouterr())

    return call


@pytest.fixture
def refused(tmp_path: Path, run_command: RunCommand) -> Callable[..., str]:
    """Run a command that must fail: checks the code, that it is one line, and that all is as was.

    Returns the line.
    """

    def call(*arguments: object, code: int = 2) -> str:
        before = contents(tmp_path)
        answer = run_command(*arguments)
        lines = [line for line in answer.err.splitlines() if not line.startswith("proving")]
        assert answer.code == code, answer
        assert len(lines) == 1, answer.err
        assert lines[0].startswith("error: ") or code == 130
        assert "Traceback" not in answer.err
        assert answer.out == ""
        assert contents(tmp_path) == before
        assert [p for p in tmp_path.rglob("*") if PARTIAL in p.name] == []
        return lines[0]

    return call


def patch_words(model: object, out: object, *more: object) -> tuple[object, ...]:
    """The command that patches a checkpoint with small blocks."""
    return ("patch", model, *BLOCKS, *more, "-o", out)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer MiniLM with its tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "minilm"
    return tiny_pipelines.write_encoder_checkpoint(folder, num_hidden_layers=2)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline."""
    folder = tmp_path_factory.mktemp("source") / "sd"
    return tiny_pipelines.write_pipeline(tiny_pipelines.make_sd_pipeline(), folder)


@pytest.fixture(scope="session")
def patched(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder` patched with `BLOCKS`, with its proof."""
    out = tmp_path_factory.mktemp("patched") / "minilm-sparse"
    assert run(["patch", str(encoder), *BLOCKS, "-o", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def patched_pipeline(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pipeline` patched with hidiffusion, with its proof."""
    out = tmp_path_factory.mktemp("patched") / "sd-hidiffusion"
    assert run(["patch", str(pipeline), "--method", "hidiffusion", "-o", str(out)]) == 0
    return out


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """`copy_of(folder)`: a copy that a test may break."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def flip_byte(file: Path, place: int) -> None:
    """Change one bit of one byte."""
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.write_bytes(bytes(data))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object], *, sign: bool) -> None:
    """Edit `retrofit.json` by hand, and put the digest right again if `sign`."""
    file = folder / MANIFEST
    data = json.loads(file.read_text())
    change(data)
    if sign:
        data["digest"] = _digest(data)
    file.write_text(json.dumps(data))
    if sign:
        Manifest.read(folder)
