"""Ctrl-C: held back during an import, found again when a library swallowed it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from retrofit import commands
from retrofit.artifact.writing import new_folder
from retrofit.runtime.interrupts import raise_if_interrupted, watched


def test_it_is_raised_at_once_outside_imports():
    def pressed():
        with watched():
            signal.raise_signal(signal.SIGINT)
            pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        pressed()


def test_an_import_is_finished_first(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.3)\nDONE = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def import_it():
        with watched():
            import slow_to_import  # noqa: F401

            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        import_it()
    assert sys.modules.pop("slow_to_import").DONE


def test_one_that_a_library_swallowed_publishes_nothing(tmp_path):
    def write():
        with watched(), new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("whole")
            with suppress(BaseException):  # what a careless library does
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_pressing_again_does_not_stop_the_cleaning_up(tmp_path, monkeypatch):
    real = shutil.rmtree

    def impatient(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        real(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", impatient)

    def write():
        with watched(), new_folder(tmp_path / "out"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_being_terminated_cleans_up_too(tmp_path):
    def write():
        with watched(), new_folder(tmp_path / "out"):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        write()
    assert left.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_either_waits_for_an_import(number, tmp_path, monkeypatch):
    (tmp_path / "slower_to_import.py").write_text(
        f"import signal, time\nsignal.raise_signal({int(number)})\ntime.sleep(0.3)\nDONE = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def import_it():
        with watched():
            import slower_to_import  # noqa: F401

            time.sleep(5)

    with pytest.raises((KeyboardInterrupt, SystemExit)) as stopped:
        import_it()
    assert sys.modules.pop("slower_to_import").DONE
    assert isinstance(stopped.value, SystemExit) == (number == signal.SIGTERM)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
@pytest.mark.parametrize("made_of_it", [ValueError("could not determine the shape"), None])
def test_what_a_library_makes_of_it_is_not_what_is_reported(
    number, code, made_of_it, monkeypatch, capfd
):
    def verb(arguments, **options):
        with suppress(BaseException):
            signal.raise_signal(number)
        if made_of_it is not None:
            raise made_of_it

    monkeypatch.setattr(commands, "app", verb)
    assert commands.run(["reconstruct"]) == code
    assert capfd.readouterr().err == "stopped; nothing was left half-written.\n"


def test_the_next_block_starts_afresh():
    with pytest.raises(KeyboardInterrupt), watched():
        signal.raise_signal(signal.SIGINT)
    with watched():
        raise_if_interrupted()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_ignores_it_goes_on_ignoring():
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watched():
            signal.raise_signal(signal.SIGINT)
            raise_if_interrupted()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, usual)


def test_the_command_line_survives_it_while_pytorch_is_imported(tmp_path: Path):
    program = (
        "import signal, sys, builtins\n"
        "from retrofit.commands import main\n"
        "class Press:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch._C':\n"
        "            sys.meta_path.remove(self)\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press())\n"
        "main(['doctor'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr == "stopped; nothing was left half-written.\n"
