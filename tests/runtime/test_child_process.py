"""A fresh process does its work, and never outlives the one that asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from retrofit.runtime.child_process import run_child

WORK = """
    import pathlib, sys, time
    if __name__ == "__main__":
        pathlib.Path(sys.argv[1]).write_text(str({pid}))
        {rest}
"""


@pytest.fixture
def module(tmp_path):
    """Write a module; gives the environment in which a child finds it."""

    def write(rest: str) -> dict[str, str]:
        text = textwrap.dedent(WORK).format(pid="__import__('os').getpid()", rest=rest)
        (tmp_path / "child_work.py").write_text(text)
        return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    return write


def test_it_gives_what_the_module_prints_and_its_exit_code(module, tmp_path):
    environment = module("print('done', sys.argv[2]); sys.exit(3)")
    done = run_child("child_work", [str(tmp_path / "pid"), "a b"], environment=environment)
    assert (done.stdout, done.returncode) == ("done a b\n", 3)
    assert (tmp_path / "pid").read_text() != str(os.getpid())


def test_a_failure_is_in_its_errors(module, tmp_path):
    done = run_child("child_work", [str(tmp_path / "pid")], environment=module("1 / 0"))
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_the_child_ends_with_its_parent(name, module, tmp_path):
    environment = module("time.sleep(600)")
    program = f"""
        from retrofit.runtime.child_process import run_child
        run_child("child_work", [{str(tmp_path / "pid")!r}])
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    child = psutil.Process(int(_read(tmp_path / "pid")))
    assert child.ppid() == parent.pid
    parent.send_signal(getattr(signal, name))
    parent.wait(timeout=30)
    gone, alive = psutil.wait_procs([child], timeout=30)
    assert not alive, gone


def _read(file: Path) -> str:
    """What a file holds, once it does."""
    for _ in range(3000):
        if file.exists() and file.read_text():
            return file.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{file} was never written")
