"""Memory: how much is free, and the most that was held at once."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch

from retrofit.runtime.devices import Device, on_accelerator

logger = logging.getLogger(__name__)
KIB = 1024
PEAK = "allocated_bytes.all.peak"


def memory_info(device: Device) -> tuple[int, int]:
    """Free and all bytes of a device; of main memory for a CPU and for a GPU that shares it."""
    if on_accelerator(device):
        ask = getattr(torch.get_device_module(device), "mem_get_info", None)
        if ask is not None:
            free, total = ask(device)
            return int(free), int(total)
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


def empty_cache() -> None:
    """Give memory that an accelerator's allocator holds back for later to other processes."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def restart_peak(device: Device = "cpu") -> None:
    """Forget the peak so far, where the device or the system can."""
    if _device_peak(device) is not None:
        torch.accelerator.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        logger.info("the peak is that of the process's whole life (%s)", error)


def peak_memory(device: Device = "cpu") -> int:
    """The most bytes held at once since `restart_peak`.

    Those that the device's allocator gave out, where it counts them; else those of this process
    that were resident.
    """
    counted = _device_peak(device)
    return _largest_resident() if counted is None else counted


def resident_memory() -> int:
    """Bytes of this process that are resident."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _device_peak(device: Device) -> int | None:
    """What an accelerator's allocator counts; None for a CPU, and for one that does not."""
    if not on_accelerator(device):
        return None
    try:
        return torch.accelerator.memory_stats(device).get(PEAK)
    except RuntimeError:  # the allocator of MPS keeps no statistics in some versions
        return None


def _largest_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KIB
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
