"""Threads that wait, other programs, and the core that a measurement is pinned to."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from retrofit.runtime import machine
from retrofit.runtime.machine import OtherPrograms, wait_passively

MAIN = """
import os, sys
from retrofit.commands import main
try:
    main(["--version"])
except SystemExit:
    print(os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)
"""


@pytest.fixture(autouse=True)
def _same_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_command_line_lets_threads_sleep_before_torch_starts_them():
    environment = {name: value for name, value in os.environ.items() if name not in machine.WAITS}
    done = subprocess.run(
        [sys.executable, "-c", MAIN], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.splitlines()[-1] == "PASSIVE False"


@pytest.mark.parametrize("name", machine.WAITS)
def test_what_the_user_says_of_waiting_stays(name, monkeypatch):
    for other in machine.WAITS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "ACTIVE")
    wait_passively()
    assert {other: os.environ.get(other) for other in machine.WAITS if other in os.environ} == {
        name: "ACTIVE"
    }


def times(monkeypatch, seconds, busy, own):
    """Let the system say these times, in seconds."""
    monkeypatch.setattr(machine.time, "monotonic", lambda: seconds)
    fields = {"user": busy, "system": 0.0, "idle": 1e6, "guest": busy}
    monkeypatch.setattr("psutil.cpu_times", lambda: SimpleNamespace(**fields))
    monkeypatch.setattr(machine.os, "times", lambda: (own, 0.0, 0.0, 0.0, seconds))


def test_other_programs_are_what_is_busy_beside_this_one(monkeypatch):
    times(monkeypatch, seconds=100.0, busy=50.0, own=7.0)
    others = OtherPrograms()
    times(monkeypatch, seconds=100.1, busy=50.2, own=7.1)
    assert others.cores() is None  # too soon to say
    times(monkeypatch, seconds=102.0, busy=54.0, own=8.0)
    assert others.cores() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("device", "threads", "cores", "is_crowded"),
    [
        ("cpu", 2, 0.1, False),
        ("cpu", 2, 1.0, True),
        ("cpu", 1, 1.0, False),  # there is a core for each
        ("cpu", 1, 2.0, True),
        ("cuda:0", 2, 1.0, False),  # one thread feeds it
        ("cpu", 2, None, False),
    ],
)
def test_a_machine_is_crowded_where_more_is_wanted_than_there_are_cores(
    device, threads, cores, is_crowded, monkeypatch
):
    torch.set_num_threads(threads)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(OtherPrograms, "cores", lambda self: cores)
    assert OtherPrograms().crowd(device) is is_crowded


def test_threads_are_those_of_torch_and_of_child_processes(run_command, encoder):
    answer = run_command("plan", encoder, "-m", "window", "--tokens", 96, "--threads", 2, "--json")
    assert answer.json["machine"]["threads"] == 2
    assert os.environ["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize("verb", ["bench", "compare", "patch", "plan", "reconstruct", "verify"])
@pytest.mark.parametrize("threads", [0, 100_000])
def test_threads_out_of_range_are_refused(verb, threads, refused, tmp_path):
    model = () if verb == "bench" else (tmp_path,)
    out = ("-o", tmp_path / "out") if verb in ("patch", "reconstruct") else ()
    line = refused(verb, *model, *out, "--threads", threads)
    assert f"--threads {threads}: expected 1 to 1024" in line


def test_pinning_takes_the_idlest_core_and_one_thread(monkeypatch):
    ticks = iter([{0: 100, 1: 100, 2: 100}, {0: 101, 1: 120, 2: 105}])
    pinned = []
    monkeypatch.setattr(machine, "_idle_ticks", lambda: next(ticks))
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(
        machine.os, "sched_setaffinity", lambda pid, cores: pinned.append(cores), raising=False
    )
    assert machine.pin_to_one_core() == 1
    assert pinned == [{1}]
    assert torch.get_num_threads() == 1
