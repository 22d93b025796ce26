"""Building the native kernels: what can go wrong on somebody else's machine."""

from __future__ import annotations

import ctypes
import os
import platform
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from retrofit.kernels import _native, backends, block_sparse_attention, explain
from retrofit.kernels._native import find_compiler, load_library
from retrofit.kernels.block_sparse import native as block_sparse_native

COMPILER = find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
DRIVER = Path(__file__).parent / "native_driver.c"
FIND_TARGET = 'while [ "$1" != -o ]; do shift; done'
SMALL = "int answer(void) { return 42; }\n"


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests build, whatever the environment says about the kernels."""
    monkeypatch.delenv("RETROFIT_NATIVE", raising=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "operator" / "native.c"
    path.parent.mkdir()
    path.write_text(SMALL)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own; the second choice, the folder for temporary files, is taken away."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    occupied = tmp_path / "occupied"
    occupied.write_text("a file, where a folder should be made")
    monkeypatch.setattr(_native.tempfile, "gettempdir", lambda: str(occupied))
    _native._load.cache_clear()
    yield tmp_path / "cache" / "retrofit"
    _native._load.cache_clear()


def write_compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_a_library_is_built_once_and_found_again(source: Path, cache: Path) -> None:
    library, reason = load_library(source)
    assert library is not None, reason
    assert library.answer() == 42
    built = list(cache.glob("*.so"))
    assert len(built) == 1
    assert not stat.S_IMODE(cache.stat().st_mode) & 0o077
    before = built[0].stat().st_mtime_ns
    _native._load.cache_clear()
    assert load_library(source)[0] is not None
    assert built[0].stat().st_mtime_ns == before


@needs_compiler
def test_a_change_of_an_included_file_builds_anew(source: Path, cache: Path) -> None:
    (source.parent / "part.h").write_text("#define ANSWER 1\n")
    source.write_text('#include "part.h"\nint answer(void) { return ANSWER; }\n')
    assert load_library(source)[0].answer() == 1  # type: ignore[union-attr]
    (source.parent / "part.h").write_text("#define ANSWER 2\n")
    _native._load.cache_clear()
    assert load_library(source)[0].answer() == 2  # type: ignore[union-attr]


def test_no_compiler_is_a_reason(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    library, reason = load_library(source)
    assert library is None
    assert reason.startswith("no C compiler (cc, gcc, clang, or $CC); install one")


def test_a_compiler_that_fails_half_way_leaves_nothing(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'{FIND_TARGET}\nprintf garbage > "$2"\necho "x.c:1: error: full disk" >&2\nexit 3'
    monkeypatch.setenv("CC", write_compiler(tmp_path / "cc", script))
    library, reason = load_library(source)
    assert library is None
    assert "failed with status 3: x.c:1: error: full disk" in reason
    assert not list(cache.glob("*.so"))


def test_a_compiler_that_dies_silently_leaves_nothing_and_says_so(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", write_compiler(tmp_path / "cc", "kill -9 $$"))
    library, reason = load_library(source)
    assert library is None
    assert "failed with status -9: no message" in reason
    assert not list(cache.glob("*.so"))


def test_a_library_that_cannot_be_loaded_is_a_reason(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'{FIND_TARGET}\necho garbage > "$2"'
    monkeypatch.setenv("CC", write_compiler(tmp_path / "cc", script))
    library, reason = load_library(source)
    assert library is None
    assert "can't be loaded" in reason


@needs_compiler
def test_flags_that_the_compiler_does_not_know_are_left_out(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert COMPILER is not None
    script = f'case " $* " in *=native*) exit 1;; esac\nexec {COMPILER[0]} "$@"'
    monkeypatch.setenv("CC", write_compiler(tmp_path / "picky", script))
    library, reason = load_library(source)
    assert library is not None, reason


@needs_compiler
def test_a_cache_that_cannot_be_written_gives_way_to_temporary_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(_native.tempfile, "gettempdir", lambda: str(tmp_path))
    _native._load.cache_clear()
    library, reason = load_library(source)
    _native._load.cache_clear()
    assert library is not None, reason
    assert str(tmp_path / f"retrofit-{os.getuid()}") in reason


def test_a_cache_that_others_write_to_is_refused(source: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    library, reason = load_library(source)
    assert library is None
    assert f"{cache} can be written by others" in reason


@needs_compiler
def test_processes_that_build_at_once_share_one_library(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tmp_path / "count"
    assert COMPILER is not None
    script = f'echo x >> {count}\nsleep 0.5\nexec {COMPILER[0]} "$@"'
    monkeypatch.setenv("CC", write_compiler(tmp_path / "slow", script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    code = (  # the module by itself: three imports of torch at once would take seconds
        "import importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('native', r'{_native.__file__}')\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"library, reason = module.load_library(pathlib.Path(r'{source}'))\n"
        "sys.exit(0 if library is not None and library.answer() == 42 else reason)\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    assert count.read_text() == "x\n"


@pytest.mark.parametrize("value", ["0", "off", "False"])
def test_the_switch_turns_native_off_whatever_was_loaded(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("RETROFIT_NATIVE", value)
    is_usable, reason = backends("block_sparse_attention", device="cpu")["native"]
    assert not is_usable
    assert reason == "switched off by RETROFIT_NATIVE"
    x = torch.randn(1, 1, 20, 8)
    kept = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    assert block_sparse_attention(x, x, x, kept).isfinite().all()
    chosen = {row["operator"]: row["backend"] for row in explain(device="cpu") if row["is_chosen"]}
    assert chosen["block_sparse_attention"] == chosen["select_blocks"] == "torch"


def widths() -> list[tuple[str, ...]]:
    """Flags for the vector widths beside the native one; the baseline has 16 bytes."""
    is_intel = platform.machine().lower() in ("x86_64", "amd64")
    return [(), ("-DVECTOR_BYTES=32", "-march=native")] if is_intel else [()]


def run_driver(flags: tuple[str, ...], target: Path, calls: int) -> None:
    assert COMPILER is not None
    command = [*COMPILER, *flags, "-pthread", str(DRIVER), "-o", str(target), "-lm"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(target), str(calls)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == f"{calls} calls, 0 failed"


@needs_compiler
@pytest.mark.parametrize("flags", widths(), ids=lambda f: " ".join(f) or "baseline")
def test_every_vector_width_gives_the_same(flags: tuple[str, ...], tmp_path: Path) -> None:
    run_driver(("-O1", *flags), tmp_path / "driver", calls=40)


@needs_compiler
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_native_kernels_are_clean_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    flag = f"-fsanitize={sanitizer}"
    assert COMPILER is not None
    has_it = subprocess.run(
        [*COMPILER, flag, str(probe), "-o", str(tmp_path / "probe")], capture_output=True
    )
    if has_it.returncode:
        pytest.skip(f"the compiler has no {flag}")
    flags = ("-O0", "-g", "-march=native", flag, "-fno-sanitize-recover=all")
    run_driver(flags, tmp_path / "driver", calls=30)


def test_call_layouts_match_the_compiled_ones() -> None:
    library, reason = block_sparse_native.library()
    if library is None:
        pytest.skip(reason)
    size = ctypes.sizeof(block_sparse_native.Call)
    assert library.retrofit_native_call_size() == size
    assert "vectors" in block_sparse_native.describe_instructions()
