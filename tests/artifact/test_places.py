"""What of a source is copied, with which permissions, and what `--force` may delete."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from retrofit.artifact import planning, saving, writing
from retrofit.artifact.copying import copy_files
from retrofit.artifact.writing import new_folder, refuse_output, remove_leftovers
from retrofit.checkpoints import find_checkpoint, places
from retrofit.checkpoints.manifest import MANIFEST
from retrofit.checkpoints.places import is_inside, is_plain_name, list_files
from retrofit.runtime.errors import InputError, RetrofitError
from retrofit.runtime.outputs import PARTIAL
from tests.artifact.test_writing import write_hub_cache
from tests.checkpoint_fixtures import contents, edit_manifest, patch_words


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "unet").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "unet" / "weights").write_text("weights")
    return folder


@pytest.fixture
def secret(tmp_path):
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "id_rsa").write_text("private")
    return folder


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("data", "../secret"),
        ("key", "../secret/id_rsa"),
        ("up", ".."),
        ("unet/up", "../.."),
        ("root", "/"),
        ("absolute", "/etc/passwd"),
        ("zero", "/dev/zero"),
        ("gone", "nowhere"),
        ("loop", "loop"),
    ],
)
def test_a_link_that_leaves_the_source_is_refused_by_name(
    link, target, source, secret, refused, encoder, copy_of, tmp_path
):
    (source / link).symlink_to(target)
    with pytest.raises(InputError, match=f"{source / link}: a link that leads"):
        list_files(source)
    folder = copy_of(encoder)
    (folder / "unet").mkdir()
    (folder / link).symlink_to(target)
    line = refused(*patch_words(folder, tmp_path / "out"))
    assert str(folder / link) in line


def test_links_within_the_source_and_into_a_hub_cache_are_followed(source, tmp_path):
    (source / "vae").symlink_to("unet")
    (source / "copy.json").symlink_to("config.json")
    (source / "unet" / "again").symlink_to("..")
    assert list_files(source).keys() == {
        "config.json", "copy.json", "unet/weights", "vae/weights"
    }  # fmt: skip
    assert list_files(write_hub_cache(tmp_path)).keys() == {"config.json"}
    linked = tmp_path / "linked"
    linked.symlink_to(source)
    assert len(list_files(linked)) == 4


def test_links_that_multiply_end(tmp_path):
    for i in range(40):
        (tmp_path / f"d{i}").mkdir()
        for name in "ab":
            (tmp_path / f"d{i}" / name).symlink_to(f"../d{i + 1}")
    (tmp_path / "d40").mkdir()
    with pytest.raises(InputError, match="at most 100000 files and 500 links"):
        list_files(tmp_path)


def test_a_folder_that_can_not_be_read_is_named(source, monkeypatch):
    own = os.scandir

    def refuse(folder):
        if Path(folder).name == "unet":
            raise PermissionError(13, "Permission denied", str(folder))
        return own(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"unet: a folder that can't be read.*chmod u\+rx"):
        list_files(source)


def test_too_many_files_are_refused(source, monkeypatch):
    monkeypatch.setattr(places, "MOST_FILES", 1)
    with pytest.raises(InputError, match="at most 1 files"):
        list_files(source)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/x", "a\\b", "c:", "a\0"])
def test_names_that_are_no_part_of_a_path(name):
    assert not is_plain_name(name)


@pytest.mark.parametrize("path", ["", "/x", "../x", "a/../x", "a//b", "./a", "a/.", "a\\..\\b"])
def test_paths_that_may_lead_out(path):
    assert not is_inside(path)
    assert is_inside("unet/weights.safetensors")


@pytest.mark.parametrize("name", ["../secret/enc", ".", "/secret", "a/b", "..", ""])
def test_a_component_outside_the_checkpoint_is_refused(
    name, refused, pipeline, encoder, copy_of, tmp_path
):
    folder = copy_of(pipeline)
    shutil.copytree(encoder, tmp_path / "secret" / "enc")
    name = str(tmp_path / "secret" / "enc") if name == "/secret" else name
    file = folder / "model_index.json"
    index = json.loads(file.read_text()) | {name: ["transformers", "CLIPTextModel"]}
    file.write_text(json.dumps(index))
    for words in (("inspect", folder), ("patch", folder, "--method", "hidiffusion", "-o", "out")):
        assert f"model_index.json lists {name!r}, which leads out" in refused(*words)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", "a/b", "absent"])
def test_a_single_file_outside_the_checkpoint_is_refused(name, refused, patched, copy_of):
    folder = copy_of(patched)
    (folder / "config.json").unlink()
    file = folder / MANIFEST

    def change(data):
        data["single_file"] = name

    with pytest.raises(RetrofitError):
        edit_manifest(folder, change, sign=True)
    assert json.loads(file.read_text())["single_file"] == name
    assert "single_file: expected" in refused("verify", folder)


def modes(folder):
    return {
        path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in (folder, *folder.rglob("*"))
    }


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_copy_is_as_private_as_its_source(mode, encoder, copy_of, tmp_path, run_command):
    folder = copy_of(encoder)
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("x")
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode if path.is_dir() else mode & 0o666)
    assert run_command(*patch_words(folder, tmp_path / "out")).code == 0
    assert run_command("unpatch", tmp_path / "out", "-o", tmp_path / "again").code == 0
    assert modes(tmp_path / "again") == modes(folder)
    assert modes(tmp_path / "out") == modes(folder) | {MANIFEST: mode & 0o666}


def test_nobody_looks_into_a_private_copy_while_it_is_made(source, tmp_path):
    with new_folder(tmp_path / "out", mode=0o700) as hidden:
        copy_files(list_files(source), hidden, link=False, advance=lambda amount: None)
        assert stat.S_IMODE(hidden.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["link to a folder", "link to a file", "dangling", "empty folder"])
def test_force_deletes_nothing_of_the_users(kind, refused, encoder, patched, copy_of, tmp_path):
    earlier = copy_of(patched)
    mine = earlier / "mine"
    if kind == "empty folder":
        mine.mkdir()
    elif kind == "dangling":
        mine.symlink_to("nowhere")
    else:
        mine.symlink_to(encoder if kind == "link to a folder" else encoder / "config.json")
    assert "it holds mine" in refused(*patch_words(encoder, earlier, "--force"))
    assert os.path.lexists(mine)


def test_force_does_not_replace_a_folder_that_can_not_be_read(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "unet").mkdir(parents=True)
    own = os.scandir

    def refuse(folder):
        if Path(folder).name == "unet":
            raise PermissionError(13, "Permission denied", str(folder))
        return own(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="unet: a folder that can't be read"):
        refuse_output(out, source, force=True, names={"unet/weights"})


@pytest.mark.parametrize("ending", ["mine", "12-mine", "1x", ""])
@pytest.mark.parametrize("kind", [PARTIAL, writing.REPLACED])
def test_a_folder_of_the_user_is_no_leftover(ending, kind, tmp_path):
    mine = tmp_path / f".out{kind}{ending}"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    (tmp_path / f".out{PARTIAL}999999999").symlink_to(mine)
    with new_folder(tmp_path / "out"):
        pass
    assert (mine / "thesis.tex").exists()
    assert (tmp_path / f".out{PARTIAL}999999999").is_symlink()


def test_an_output_named_like_an_unfinished_one_is_refused(refused, encoder, tmp_path):
    line = refused(*patch_words(encoder, tmp_path / f".x{PARTIAL}1"))
    assert "no command reads. Give another name." in line
    line = refused("generate", "shapes", "-p", "a cat", "-o", tmp_path / f"x{PARTIAL}1.png")
    assert "no command reads. Give another name." in line


def test_threads_of_one_process_keep_their_hands_off_each_other(tmp_path):
    out = tmp_path / "out"
    started, done = threading.Barrier(2), []

    def write(name):
        try:
            with new_folder(out, replace=True) as folder:
                (folder / "name").write_text(name)
                started.wait(10)
                remove_leftovers(out)
                started.wait(10)
        except RetrofitError as error:
            done.append(str(error))
        else:
            done.append("written")

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert done == ["written", "written"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("can_exchange", [False, True])
def test_writers_to_one_output_write_it_or_say_that_another_did(replace, can_exchange, tmp_path):
    program = f"""
        import sys
        from pathlib import Path
        from retrofit.artifact import writing
        from retrofit.runtime.errors import InputError
        if not {can_exchange}:
            writing._exchange = lambda first, second: False
        out = Path({str(tmp_path / "a" / "b" / "out")!r})
        for number in range(60):
            try:
                with writing.new_folder(out, replace={replace}) as folder:
                    (folder / "x").write_text(str(number))
                    if number % 3 == 2:
                        raise InputError("failed")
            except InputError:
                pass
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert errors == [b"", b"", b""]
    assert contents(tmp_path).keys() == {"a/b/out/x"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("moment", ["after the proof", "while copying"])
@pytest.mark.parametrize("link", [False, True])
def test_a_source_that_changes_after_the_proof_is_noticed(
    name, moment, link, encoder, copy_of, tmp_path, monkeypatch
):
    folder = copy_of(encoder)
    plan = planning.plan_patch(find_checkpoint(folder), "block-sparse", block_size=[16, 16])
    changed = folder / name

    def change(*_: object) -> None:
        data = changed.read_bytes()
        # a config stays JSON: what reads it again must not be what notices
        changed.write_bytes(data + b" " if name.endswith(".json") else data[:-1] + b"\x7f")

    if moment == "after the proof":
        change()
        advance = saving.ignore_progress
    else:
        pending = [change]

        def advance(amount):
            if pending:
                pending.pop()()

    with pytest.raises(RetrofitError, match="changed while it was being patched") as caught:
        saving.write_patched(plan, tmp_path / "out", proof=None, link=link, advance=advance)
    assert caught.value.exit_code == 1
    assert str(changed) in str(caught.value)
    assert not (tmp_path / "out").exists()
