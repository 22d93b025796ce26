"""A folder is written whole or not at all, whatever stops it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from retrofit.artifact import writing
from retrofit.artifact.copying import copy_files, total_size
from retrofit.artifact.writing import (
    new_folder,
    refuse_full_disk,
    refuse_output,
)
from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.fingerprint import hash_file
from retrofit.checkpoints.places import list_files
from retrofit.runtime.errors import CheckpointError, InputError, RetrofitError
from retrofit.runtime.outputs import PARTIAL


def _ignore(amount):
    pass


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "unet").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "unet" / "weights.safetensors").write_bytes(os.urandom(3_000_001))
    return folder


def test_a_finished_folder_has_its_name_and_no_sibling(source, tmp_path):
    with new_folder(tmp_path / "out") as folder:
        copy_files(list_files(source), folder, link=False, advance=_ignore)
        assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert {k: p.read_bytes() for k, p in list_files(tmp_path / "out").items()} == {
        k: p.read_bytes() for k, p in list_files(source).items()
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "full"), ValueError])
def test_a_failure_leaves_nothing(error, tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise error

    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind), new_folder(tmp_path / "out") as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_takes_the_folders_it_made_with_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_replacing_keeps_what_was_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "old").read_text() == "old"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replacing_leaves_only_the_new_folder(can_exchange, tmp_path, monkeypatch):
    if not can_exchange:
        monkeypatch.setattr(writing, "_exchange", lambda first, second: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with new_folder(tmp_path / "out", replace=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


@pytest.mark.parametrize("name", ["out", "q[1]"])
def test_what_appears_while_writing_is_kept(name, tmp_path):
    out = tmp_path / name

    def write():
        with new_folder(out) as folder:
            (folder / "new").write_text("new")
            out.mkdir()
            (out / "precious").write_text("years of work")

    with pytest.raises(InputError, match="something was written there meanwhile"):
        write()
    assert (out / "precious").read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [out]


def test_leftovers_of_a_name_with_brackets_are_found(tmp_path):
    (tmp_path / f".q[1]{PARTIAL}999999999").mkdir()
    with new_folder(tmp_path / "q[1]"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["q[1]"]


KILLED = {
    "in a file": "patch_write('os.write')",
    "between files": "patch_write('sample_file')",
    "before the rename": "patch_write('_take_name')",
    "after the rename": "patch_write('_flush_folder', only=str(out.parent))",
}


@pytest.mark.parametrize("moment", KILLED)
@pytest.mark.parametrize("replacing", [False, True])
def test_killed_at_any_moment_nothing_half_written_is_taken(moment, replacing, source, tmp_path):
    out = tmp_path / "out"
    if replacing:
        with new_folder(out) as folder:
            (folder / "old").write_text("old")
    program = f"""
        import os, signal
        from pathlib import Path
        from retrofit.artifact import copying, writing
        from retrofit.checkpoints.places import list_files
        source, out = Path({str(source)!r}), Path({str(out)!r})
        def patch_write(name, only=None):
            owner = os if name.startswith("os.") else writing
            owner = copying if name == "sample_file" else owner
            own = getattr(owner, name.removeprefix("os."))
            def dying(*arguments, **options):
                if only in (None, str(arguments[0])):
                    os.kill(os.getpid(), signal.SIGKILL)
                return own(*arguments, **options)
            setattr(owner, name.removeprefix("os."), dying)
        {KILLED[moment]}
        with writing.new_folder(out, replace=True) as folder:
            files = list_files(source)
            copying.copy_files(files, folder, link=False, advance=lambda n: None)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    after = {path.name for path in out.iterdir()} if out.exists() else None
    if moment == "after the rename":
        assert after == {"config.json", "unet"}
    else:
        assert after == ({"old"} if replacing else None)
        left = [path for path in tmp_path.iterdir() if PARTIAL in path.name]
        assert len(left) == 1
        with pytest.raises(CheckpointError, match="interrupted run"):
            find_checkpoint(left[0])
    with new_folder(out, replace=True) as folder:
        (folder / "again").write_text("again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_run_that_still_writes_is_left_alone(tmp_path):
    running = tmp_path / f".out{PARTIAL}{os.getppid()}"
    running.mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert running.exists()


def test_a_result_that_was_moved_aside_comes_back(tmp_path):
    aside = tmp_path / f".out{writing.REPLACED}1"
    aside.mkdir()
    (aside / "old").write_text("old")
    writing.remove_leftovers(tmp_path / "out")
    assert (tmp_path / "out" / "old").read_text() == "old"


def write_hub_cache(folder):
    """A repository in the hub's cache, whose snapshot links to its blobs."""
    repo = folder / "hub" / "models--owner--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    blob = repo / "blobs" / ("0123456789" * 4)
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_links_share_the_bytes(source, tmp_path):
    with new_folder(tmp_path / "out") as folder:
        copied = copy_files(list_files(source), folder, link=True, advance=_ignore)
    first, second = (root / "config.json" for root in (source, tmp_path / "out"))
    assert first.stat().st_ino == second.stat().st_ino
    assert copied["config.json"].sha256 == hash_file(first)


def test_a_link_of_a_symlink_shares_the_file_behind_it(source, tmp_path):
    snapshot = write_hub_cache(tmp_path)
    with new_folder(tmp_path / "out") as folder:
        copy_files(list_files(snapshot), folder, link=True, advance=_ignore)
    assert not (tmp_path / "out" / "config.json").is_symlink()


def test_linking_across_disks_is_refused_with_the_fix(source, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with (
        pytest.raises(InputError, match="Leave out --link"),
        new_folder(tmp_path / "out") as folder,
    ):
        copy_files(list_files(source), folder, link=True, advance=_ignore)
    assert not (tmp_path / "out").exists()


def test_every_byte_is_reported(source, tmp_path):
    seen = []
    with new_folder(tmp_path / "out") as folder:
        copy_files(list_files(source), folder, link=False, advance=seen.append)
    assert sum(seen) == total_size(list_files(source))


def test_version_control_and_caches_are_not_the_checkpoint(source):
    for name in (".git", ".cache", "__pycache__"):
        (source / name).mkdir()
        (source / name / "x").write_text("x")
    assert list_files(source).keys() == {"config.json", "unet/weights.safetensors"}


def test_a_folder_that_links_to_itself_ends(source):
    (source / "unet" / "again").symlink_to(source, target_is_directory=True)
    assert list_files(source).keys() == {"config.json", "unet/weights.safetensors"}


def test_outputs_that_must_not_be_written_are_refused(source, tmp_path):
    names = {"config.json"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("file")
    for out, force, message in (
        (source / "out", False, "inside the checkpoint"),
        (source, True, "is the checkpoint itself"),
        (source.parent, True, "contains the checkpoint"),
        (tmp_path / "full", False, "exists. Give another folder, or replace it with --force"),
        (tmp_path / "full", True, "holds thesis.tex"),
        (tmp_path / "file", True, "exists and is no folder"),
    ):
        with pytest.raises(InputError, match=message):
            refuse_output(out, source, force=force, names=names)
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_an_empty_folder_or_an_earlier_result_may_be_taken(source, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse_output(tmp_path / "empty", source, force=False, names=set())
    (tmp_path / "earlier").mkdir()
    for name in ("config.json", "retrofit.json"):
        (tmp_path / "earlier" / name).write_text("{}")
    refuse_output(tmp_path / "earlier", source, force=True, names={"config.json"})


def test_a_disk_that_can_not_hold_it_is_known_before(tmp_path):
    refuse_full_disk(tmp_path / "out", 1)
    with pytest.raises(RetrofitError, match=r"the disk has .* GB left") as caught:
        refuse_full_disk(tmp_path / "out", 10**18)
    assert caught.value.exit_code == 1
