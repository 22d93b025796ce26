"""Run a module of this package in a fresh process that never outlives the one that asked.

The child holds the reading end of a pipe whose writing end only the parent has. However the parent
ends, `kill -9` included, the system closes that end, and the child, which waits for nothing else on
its standard input, leaves at once.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

ORPHANED = 128 + 15  # exit code of a child whose parent is gone; nobody is left to read it


def run_child(
    module: str, arguments: Sequence[str] = (), *, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments...` in a fresh process, and wait for it.

    Ctrl-C and whatever else interrupts the wait ends the child too. What it prints is captured.

    Args:
        module: Its full name; it does its work under `if __name__ == "__main__"`.
        arguments: For its `sys.argv`. It must not read its standard input.
        environment: Instead of this process's own.
    """
    # -P: a folder called `retrofit` or `json` where the user stands must not be imported
    command = [sys.executable, "-P", "-m", "retrofit.runtime.child_process", module, *arguments]
    reading, writing = os.pipe()
    try:
        with subprocess.Popen(
            command,
            stdin=reading,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=None if environment is None else dict(environment),
        ) as child:
            os.close(reading)
            reading = -1
            try:
                out, err = child.communicate()
            except BaseException:
                child.kill()
                raise
            return subprocess.CompletedProcess(command, child.returncode, out, err)
    finally:
        for descriptor in (reading, writing):
            if descriptor >= 0:
                os.close(descriptor)


def _leave_with_parent() -> None:
    """Wait for the pipe to break, from a thread; nothing is ever written to it."""
    while os.read(0, 1):
        pass
    os._exit(ORPHANED)


def main() -> None:
    """Watch the parent, then run a module as `python -m` does."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
