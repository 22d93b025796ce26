"""Accelerators of every kind, by a stand-in for `torch.accelerator`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite
from retrofit.methods import block_choice
from retrofit.methods.block_sparse import BlockSparseConfig
from retrofit.methods.run_state import RunState
from retrofit.patterns import AttentionCall, blocks
from retrofit.profiling import doctor
from retrofit.runtime import devices, memory
from retrofit.runtime.devices import device_name, on_accelerator, pick_device
from retrofit.runtime.machine import processor_name
from retrofit.runtime.memory import memory_info, peak_memory, restart_peak
from retrofit.runtime.timing import GPU_ROUNDS, Contender, race, timed

CARD = 141_000_000_000


class Accelerator:
    """Stands in for `torch.accelerator`: what it was asked, in order, and what it holds."""

    def __init__(self, kind: str, *, counts_memory: bool = True) -> None:
        self.kind = kind
        self.counts_memory = counts_memory
        self.peak = 700
        self.asked: list[str] = []

    def current_accelerator(self, check_available: bool = False) -> torch.device:
        assert check_available  # a build for one says nothing of a driver
        return torch.device(self.kind)

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: object = None) -> None:
        assert torch.device(device).type == self.kind  # torch refuses any other
        self.asked.append("synchronize")

    def memory_stats(self, device: object = None) -> dict[str, int]:
        if not self.counts_memory:
            raise RuntimeError("Allocator for mps is not a DeviceAllocator")
        return {memory.PEAK: self.peak}

    def reset_peak_memory_stats(self, device: object = None) -> None:
        self.asked.append("reset")
        self.peak = 0

    def empty_cache(self) -> None:
        self.asked.append("empty")


MODULES = {
    "cuda": SimpleNamespace(
        get_device_name=lambda device: f"Card of {device}",
        mem_get_info=lambda device: (CARD // 2, CARD),
        get_device_capability=lambda device: (9, 0),
    ),
    "xpu": SimpleNamespace(
        get_device_name=lambda device: f"Card of {device}",
        mem_get_info=lambda device: (CARD // 2, CARD),
    ),
    "mps": SimpleNamespace(),  # it has neither
}


@pytest.fixture(params=["cuda", "xpu", "mps"])
def accelerator(request, monkeypatch) -> Accelerator:
    found = Accelerator(request.param, counts_memory=request.param != "mps")
    monkeypatch.setattr(torch, "accelerator", found)
    monkeypatch.setattr(torch, "get_device_module", lambda d: MODULES[torch.device(d).type])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return found


def test_without_an_accelerator_the_cpu_is_taken(monkeypatch):
    none = SimpleNamespace(current_accelerator=lambda check_available: None)
    monkeypatch.setattr(torch, "accelerator", none)
    assert pick_device(None) == "cpu"


def test_the_accelerator_is_taken_whatever_it_is(accelerator):
    assert pick_device(None) == accelerator.kind
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", False), ("meta", False), ("cuda", True), ("cuda:1", True), ("xpu", True)],
)
def test_what_runs_beside_the_cpu_is_known(device, expected):
    assert on_accelerator(device) is expected
    assert on_accelerator(torch.device(device)) is expected


def test_a_call_is_timed_between_two_waits_for_the_device(accelerator):
    def run() -> str:
        accelerator.asked.append("run")
        return "output"

    output, seconds = timed(run, torch.device(accelerator.kind, 0))
    assert accelerator.asked == ["synchronize", "run", "synchronize"]
    assert (output, seconds > 0) == ("output", True)
    accelerator.asked.clear()
    timed(run)
    assert accelerator.asked == ["run"]  # a CPU has nothing to wait for


def test_a_race_waits_for_the_device_in_every_round(accelerator, monkeypatch):
    monkeypatch.setattr("retrofit.runtime.timing.time_on_gpu", lambda run: run() or 1.0)
    contender = Contender(name="only", run=lambda: accelerator.asked.append("run"))
    result = race([contender], device=f"{accelerator.kind}:0")
    assert result.rounds == GPU_ROUNDS
    if accelerator.kind != "cuda":  # there Triton's timer waits
        waits = accelerator.asked.count("synchronize")
        assert waits == 2 * accelerator.asked.count("run")


def test_a_device_is_named_as_its_module_names_it(accelerator):
    named = "mps" if accelerator.kind == "mps" else f"Card of {accelerator.kind}:0"
    assert device_name(f"{accelerator.kind}:0") == named
    assert device_name("cpu") == processor_name()


def test_free_memory_is_the_cards_or_that_which_it_shares(accelerator):
    info = memory_info(accelerator.kind)
    shared = memory_info("cpu")[1]
    assert info[1] == (shared if accelerator.kind == "mps" else CARD)


def test_the_peak_is_the_allocators_where_it_counts(accelerator):
    restart_peak(accelerator.kind)
    accelerator.peak += 30
    if accelerator.counts_memory:
        assert peak_memory(accelerator.kind) == 30
    else:
        assert accelerator.asked == []
        assert peak_memory(accelerator.kind) > 10_000_000  # this process, PyTorch included


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux restarts it")
def test_the_peak_of_a_cpu_is_what_was_held_since_its_restart():
    size = 96 * 2**20
    restart_peak()
    before = peak_memory()
    held = torch.ones(size // 4)
    after = peak_memory()
    assert after - before > 0.9 * size
    del held
    restart_peak()
    assert peak_memory() < after - 0.9 * size


def test_doctor_lists_the_accelerator(accelerator):
    found = doctor.examine_devices()
    assert found[0].what == f"{accelerator.kind}:0"
    words = "capability 9.0" if accelerator.kind == "cuda" else "PyTorch routes only"
    assert words in found[0].found
    assert [finding.what for finding in found[1:]] == ["cpu"]


def test_memory_is_given_back_only_where_there_is_an_accelerator(accelerator, monkeypatch):
    memory.empty_cache()
    assert accelerator.asked == ["empty"]
    monkeypatch.setattr(accelerator, "is_available", lambda: False)
    memory.empty_cache()
    assert accelerator.asked == ["empty"]


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(devices.UnsupportedError, match="device 'warp' can't be used here"):
        pick_device("warp")
    assert pick_device("warp", fall_back=True) == "cpu"


class NoFloat64(TorchDispatchMode):
    """Refuses float64, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not isinstance(out, torch.Tensor) or out.dtype != torch.float64, func
        return out


def test_devices_without_float64_compute_in_float32(monkeypatch):
    assert devices.widest_float(torch.device("cpu")) is torch.float64
    assert devices.widest_float(torch.device("mps")) is torch.float32
    for has_it, expected in ((True, torch.float64), (False, torch.float32)):
        described = SimpleNamespace(has_fp64=has_it)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda d, said=described: said)
        assert devices.widest_float(torch.device("xpu")) is expected


@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_block_sparse_needs_no_float64(keep, monkeypatch):
    query, key, value = torch.randn(3, 1, 2, 96, 16)
    call = AttentionCall(query=query, key=key, value=value, attn_mask=torch.ones(1, 1, 96, 96) > 0)
    call.attn_mask[..., 80:] = False
    method = BlockSparseConfig(keep=keep, block_size=(16, 16))
    site = AttentionSite(path="attn", index=0, block=0, kind="self", num_heads=2, head_dim=16)

    def attend():
        out, pattern = method.attend(site, TokenGrid(width=96), call, RunState())
        return out, pattern.keep()

    expected, kept = attend()
    for module in (block_choice, blocks):
        monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)
    with NoFloat64():
        out, keep_found = attend()
    torch.testing.assert_close(out, expected)
    assert keep_found == pytest.approx(kept)


def test_what_is_judged_is_float64_on_the_cpu_where_its_device_has_none(monkeypatch):
    x = torch.randn(5)
    asked = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: asked.append(self) or self)
    assert devices.to_float64(x).dtype is torch.float64
    assert not asked
    monkeypatch.setattr(devices, "widest_float", lambda device: torch.float32)
    assert devices.to_float64(x).dtype is torch.float64
    assert len(asked) == 1
