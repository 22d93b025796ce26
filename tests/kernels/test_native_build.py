"""Building the native kernels: what can go wrong on somebody else's machine."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from retrofit.kernels import _native, backends, block_sparse_attention, explain
from retrofit.kernels._native import find_compiler, load_library
from retrofit.kernels.block_sparse import native as block_sparse_native
from retrofit.runtime.private_folder import PrivateFolder

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
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _native._load.cache_clear()
    yield tmp_path / "cache" / "retrofit"
    _native._load.cache_clear()


def load_again(source: Path) -> ctypes.CDLL | None:
    """As a new process does."""
    _native._load.cache_clear()
    return load_library(source)[0]


def count_compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the compiler write a line into a file at every call."""
    assert COMPILER is not None
    count = tmp_path / "count"
    count.write_text("")
    script = f'echo x >> {count}\nexec {COMPILER[0]} "$@"'
    monkeypatch.setenv("CC", write_compiler(tmp_path / "counting", script))
    return count


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
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda file: os.truncate(file, 100), "cut short"),
        (lambda file: file.write_bytes(b"garbage"), "replaced"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), "one byte changed"),
        (lambda file: file.unlink(), "deleted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("which", ["*.so", "*.sha256"])
def test_a_damaged_library_or_record_is_built_again(
    source: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    what: str,
    which: str,
) -> None:
    count = count_compilations(tmp_path, monkeypatch)
    assert load_library(source)[0] is not None
    damage(next(cache.glob(which)))
    library = load_again(source)
    assert library is not None
    assert library.answer() == 42
    assert count.read_text() == "x\nx\n"
    assert load_again(source) is not None
    assert count.read_text() == "x\nx\n"


@needs_compiler
def test_a_library_that_links_elsewhere_is_not_loaded(
    source: Path, cache: Path, tmp_path: Path
) -> None:
    assert load_library(source)[0] is not None
    file = next(cache.glob("*.so"))
    planted = tmp_path / "planted.so"
    file.rename(planted)
    file.symlink_to(planted)
    library = load_again(source)
    assert library is not None
    assert library.answer() == 42
    assert not file.is_symlink()


@needs_compiler
def test_a_recorded_library_that_cannot_be_loaded_is_built_again(source: Path, cache: Path) -> None:
    assert load_library(source)[0] is not None
    file = next(cache.glob("*.so"))
    file.unlink()
    file.write_bytes(b"not a library")
    file.with_name(f"{file.name}.sha256").write_bytes(_native._record(b"not a library"))
    library = load_again(source)
    assert library is not None
    assert library.answer() == 42


@needs_compiler
def test_another_compiler_builds_anew(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_library(source)[0] is not None
    count_compilations(tmp_path, monkeypatch)
    assert load_again(source) is not None
    assert len(list(cache.glob("*.so"))) == 2


def plant(folder: Path) -> None:
    """Leave a folder as somebody else may have."""
    folder.mkdir(parents=True)
    folder.chmod(0o777)


@needs_compiler
@pytest.mark.parametrize("kind", ["open to others", "link", "link above", "foreign", "file"])
def test_a_cache_that_others_may_change_is_not_used(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "retrofit").mkdir(parents=True, mode=0o700)
    if kind == "open to others":
        plant(cache)
    elif kind == "link":
        cache.parent.mkdir()
        cache.symlink_to(elsewhere)
    elif kind == "link above":
        cache.parent.symlink_to(elsewhere)
    elif kind == "foreign":
        cache.mkdir(parents=True, mode=0o700)
        is_root = os.getuid() == 0
        if is_root:
            os.chown(cache, 12345, -1)
        else:
            monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        cache.parent.write_text("a file")
    library, reason = load_library(source)
    expected = {
        "open to others": f"{cache} can be written by others",
        "link": f"{cache} is a symbolic link",
        "link above": f"{cache.parent} is a symbolic link",
        "foreign": "another user",
        "file": f"{cache.parent} can't be made or opened",
    }
    assert expected[kind] in reason
    if kind != "foreign" or os.getuid() == 0:
        assert library is not None
        assert library.answer() == 42
        assert "for this process only" in reason
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_what_lies_in_the_folder_for_temporary_files_is_not_loaded(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    (tmp_path / "shared").mkdir()
    cache.parent.write_text("a file")
    planted = tmp_path / "shared" / f"retrofit-{os.getuid()}"
    planted.mkdir(mode=0o700)
    library, reason = load_library(source)
    assert library is not None, reason
    assert list((tmp_path / "shared").iterdir()) == [planted]
    assert not list(planted.iterdir())


@needs_compiler
def test_a_folder_swung_elsewhere_after_the_check_is_not_read(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_library(source)[0] is not None
    planted = tmp_path / "planted"
    shutil.copytree(cache, planted)
    for file in planted.iterdir():
        file.write_bytes(b"planted")
    look = PrivateFolder.open_file

    def swing(folder: PrivateFolder, name: str) -> int:
        if not cache.is_symlink():
            cache.rename(tmp_path / "moved")
            cache.symlink_to(planted)
        return look(folder, name)

    monkeypatch.setattr(PrivateFolder, "open_file", swing)
    library = load_again(source)
    assert library is not None
    assert library.answer() == 42
    assert all(file.read_bytes() == b"planted" for file in planted.iterdir())


def test_an_open_quote_in_cc_is_a_reason(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "gcc 'x")
    library, reason = load_library(source)
    assert library is None
    assert reason.startswith("CC=gcc 'x can't be read (No closing quotation).")
    kept = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    x = torch.randn(1, 1, 20, 8)
    assert block_sparse_attention(x, x, x, kept).isfinite().all()


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
