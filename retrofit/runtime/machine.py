"""The machine: its processor, the threads that compute, and what other programs take of it."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

MAX_THREADS = 1024
ROOM = 1.15  # times the cores: what may be wanted of them before times become longer
SHORTEST = 0.2  # seconds below which the clock ticks of the system say too little
WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has said how they wait.

    It must be called before torch is imported. By default they spin at the end of every operation.
    Where other programs hold the cores, they then spin through the time in which the thread that
    they wait for could run.
    """
    if not any(name in os.environ for name in WAITS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def use_threads(number: int) -> None:
    """Let PyTorch, our kernels and child processes compute in so many threads."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(number)
    torch.set_num_threads(number)


class OtherPrograms:
    """What other programs take of the processor, from the moment this is made."""

    def __init__(self) -> None:
        """Start to measure."""
        self._start = self._read()

    def cores(self) -> float | None:
        """How many cores they held, as a mean; None where too little time has passed to say."""
        start, now = self._start, self._read()
        seconds = now[0] - start[0]
        if seconds < SHORTEST:
            return None
        return max(0.0, (now[1] - start[1] - (now[2] - start[2])) / seconds)

    def crowd(self, device: str) -> bool:
        """Whether they and what runs on a device wanted more cores than there are."""
        import torch

        cores = self.cores()
        threads = torch.get_num_threads() if device.startswith("cpu") else 1
        return cores is not None and threads + cores > ROOM * (os.cpu_count() or 1)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: of the clock, of all processes, of this one and of its children that ended."""
        import psutil

        busy = psutil.cpu_times()
        kinds = ("user", "nice", "system", "irq", "softirq", "steal")
        own = sum(os.times()[:4])
        return time.monotonic(), sum(getattr(busy, kind, 0.0) for kind in kinds), own


def load_average() -> float | None:
    """Processes that wanted a core in the last minute, None where the system doesn't say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def processor_name() -> str:
    """`CPU, ` and the model, as reports name it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return f"CPU, {line.split(':', 1)[1].strip()}"
    return f"CPU, {platform.processor() or platform.machine()}"


def pin_to_one_core() -> int | None:
    """Keep this process on the core that is idlest now, and PyTorch to one thread.

    Returns:
        The core, None where the system can't pin.
    """
    import torch

    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    before = _idle_ticks()
    time.sleep(0.2)
    after = _idle_ticks()
    core = max(allowed, key=lambda number: after.get(number, 0) - before.get(number, 0))
    os.sched_setaffinity(0, {core})
    return core


def _idle_ticks() -> dict[int, int]:
    """Idle time of every core since the start, in ticks."""
    file = Path("/proc/stat")
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [line.split() for line in lines if line.startswith("cpu") and line[3].isdigit()]
    return {int(row[0][3:]): int(row[4]) for row in rows}
