"""Output that can't be written, and runs that are stopped in the middle: nothing is left over."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from retrofit.artifact import copying, saving, writing
from retrofit.runtime.errors import InputError
from retrofit.runtime.outputs import refuse_place
from tests.checkpoint_fixtures import patch_words

WEIGHTS = "model.safetensors"


def test_an_output_that_exists(refused, encoder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "exists" in refused(*patch_words(encoder, tmp_path / "out"))
    assert "holds thesis.tex" in refused(*patch_words(encoder, tmp_path / "out", "--force"))


def test_force_replaces_only_what_patch_wrote(
    refused, encoder, patched, copy_of, tmp_path, run_command
):
    finetuned = copy_of(encoder)
    assert "has no retrofit.json" in refused(*patch_words(encoder, finetuned, "--force"))
    earlier = copy_of(patched)
    (earlier / ".git").mkdir()
    (earlier / ".git" / "HEAD").write_text("ref")
    assert "it holds .git/HEAD" in refused(*patch_words(encoder, earlier, "--force"))
    shutil.rmtree(earlier / ".git")
    with (earlier / WEIGHTS).open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"mine")
    assert "its bytes changed since patching" in refused(*patch_words(encoder, earlier, "--force"))
    assert "--force replaces only" in refused("unpatch", patched, "-o", earlier, "--force")
    shutil.rmtree(earlier)
    again = copy_of(patched)
    assert run_command(*patch_words(encoder, again, "--force", "--no-proof")).code == 0


@pytest.mark.parametrize("more", ["out", "deeper/out"])
def test_an_output_below_a_file(more, refused, encoder, tmp_path):
    (tmp_path / "afile").write_text("kept")
    line = refused(*patch_words(encoder, tmp_path / "afile" / more))
    assert f"{tmp_path / 'afile'} is a file" in line
    assert "read-only" not in line


def test_an_output_inside_the_checkpoint(refused, encoder, copy_of):
    folder = copy_of(encoder)
    assert "inside the checkpoint" in refused(*patch_words(folder, folder / "out"))


def test_a_disk_too_small_is_known_before_copying(refused, encoder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    line = refused(*patch_words(encoder, tmp_path / "out", "--no-proof"), code=1)
    assert "GB left" in line


def test_a_disk_that_fills_up_while_copying(refused, encoder, tmp_path, monkeypatch):
    own = os.write

    def fill(descriptor, data):
        if len(data) > 10_000:
            own(descriptor, data[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return own(descriptor, data)

    monkeypatch.setattr(os, "write", fill)
    line = refused(*patch_words(encoder, tmp_path / "out", "--no-proof"), code=1)
    assert WEIGHTS in line
    assert "the disk is full" in line


@pytest.mark.parametrize(("foreseen", "message"), [(True, "GB left"), (False, "disk is full")])
def test_a_real_file_system_that_is_full(
    foreseen, message, encoder, run_command, tmp_path, monkeypatch
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here; the tests above stand in")
    if not foreseen:
        monkeypatch.setattr(saving, "refuse_full_disk", lambda out, needed: None)
    try:
        answer = run_command(*patch_words(encoder, disk / "out", "--no-proof"))
        assert answer.code == 1
        assert message in answer.err
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_turns_out_read_only(number, refused, encoder, tmp_path, monkeypatch):
    mkdir = os.mkdir

    def refuse(path, *arguments, **options):
        if os.path.basename(path).startswith(".retrofit-"):  # the look before anything is done
            return mkdir(path, *arguments, **options)
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    line = refused(*patch_words(encoder, tmp_path / "out", "--no-proof"))
    assert "not writable here" in line
    assert str(tmp_path) in line


def test_a_folder_that_is_read_only(refused, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    line = refused(*patch_words(encoder, tmp_path / "out"))
    assert "read-only" in line
    assert "may write" in line


@pytest.mark.parametrize("place", ["_copy_and_hash", "_take_name"])
def test_ctrl_c_in_the_middle(place, encoder, tmp_path, run_command, monkeypatch):
    module = copying if place == "_copy_and_hash" else writing
    own = getattr(module, place)

    def interrupt(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return own(*arguments, **options)

    monkeypatch.setattr(module, place, interrupt)
    answer = run_command(*patch_words(encoder, tmp_path / "out", "--no-proof"))
    assert answer.code == 130
    assert answer.err == "stopped; nothing was left half-written.\n"
    assert list(tmp_path.iterdir()) == []


def test_kill_9_in_the_middle_of_patching(encoder, tmp_path, run_command):
    out = tmp_path / "out"
    program = f"""
        import os, signal
        from retrofit.artifact import copying
        own, calls = copying._copy_and_hash, []
        def die(*arguments, **options):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*arguments, **options)
        copying._copy_and_hash = die
        from retrofit.commands import run
        run({[str(a) for a in patch_words(encoder, out, "--no-proof")]!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    for command in (("inspect", left), ("verify", left), patch_words(left, tmp_path / "x")):
        answer = run_command(*command)
        assert answer.code == 2
        assert "interrupted run" in answer.err
    assert run_command(*patch_words(encoder, out, "--no-proof")).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder that takes nothing new")
@pytest.mark.parametrize("more", ["", "deeper/"])
def test_a_folder_that_takes_nothing_new_is_named_as_such(more, refused, encoder, pipeline):
    """`/proc`, where even root makes nothing, though access rights say otherwise."""
    line = refused(*patch_words(encoder, f"/proc/{more}nope"))
    assert f"/proc/{more}nope: /proc is " in line
    assert "can't be written to. Give another folder" in line or "read-only" in line
    drawn = ("generate", pipeline, "-p", "a cat", "-o", f"/proc/{more}nope.png")
    assert f"-o /proc/{more}nope.png: /proc is " in refused(*drawn)


def test_looking_whether_a_place_takes_something_leaves_nothing(tmp_path):
    refuse_place("-o out", tmp_path / "a" / "b" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [(errno.ENOSPC, OSError, "No space"), (errno.ENOENT, InputError, "can't be written to")],
)
def test_a_full_disk_is_told_from_a_folder_that_takes_nothing(
    number, kind, words, tmp_path, monkeypatch
):
    def fail(**settings):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.mkdtemp", fail)
    with pytest.raises(kind, match=words):
        refuse_place("-o out", tmp_path / "out")
