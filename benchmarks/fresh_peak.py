"""Peak memory of a call in a process that has done nothing but load the network and call it once.

What a call makes resident depends on what its process did before: one that has planned has a heap
full of holes, into which the call's tensors go instead of side by side. So each peak is measured
as a user's process has it: the checkpoint is loaded, patched, called, and called again.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.opening import load_networks
from retrofit.families.examples import InputSize
from retrofit.patching.networks import FoundNetwork, find_networks
from retrofit.patching.patch import patch
from retrofit.runtime.child_process import run_child
from retrofit.runtime.memory import peak_memory, resident_memory, restart_peak

ROOT = Path(__file__).parent.parent
Inputs = dict[str, Any]


def fresh_peak(
    folder: Path,
    dtype: torch.dtype,
    size: InputSize,
    method: str | None,
    settings: Mapping[str, Any],
) -> int | None:
    """Bytes that a call makes resident, in a process of its own; None where no system says.

    Args:
        folder: The checkpoint, one network.
        dtype: It is loaded in.
        size: Of the input, in the network's own units.
        method: That patches it, None for the dense network.
        settings: Of the method.

    Raises:
        RuntimeError: If the process failed; its own words.
    """
    asked = {
        "folder": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "size": vars(size),
        "method": method,
        "settings": dict(settings),
        "threads": torch.get_num_threads(),
    }
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    child = run_child("benchmarks.fresh_peak", [json.dumps(asked)], environment=environment)
    if child.returncode:
        raise RuntimeError(child.stderr.strip())
    peak: int | None = json.loads(child.stdout.splitlines()[-1])
    return peak


def open_network(folder: Path, dtype: torch.dtype, size: InputSize) -> tuple[FoundNetwork, Inputs]:
    """A checkpoint's one network and inputs for it."""
    name = str(dtype).removeprefix("torch.")
    module = load_networks(find_checkpoint(str(folder)), [""], device="cpu", dtype=name)
    (network,) = find_networks(module, ())
    assert network.family.inputs is not None  # noqa: S101 - it was planned
    drawn = network.family.inputs.make(network.module, size, torch.Generator().manual_seed(0))
    return network, {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in drawn.items()
    }


@contextmanager
def patched(
    network: FoundNetwork, method: str | None, settings: Mapping[str, Any]
) -> Iterator[nn.Module]:
    """The network while it is patched, at the first step of a run."""
    if method is None:
        yield network.module
        return
    with patch(network.module, method, **settings) as handle:
        if network.family.denoises:
            handle.at_step(0, 1)
        yield network.module


def peak_of(run: Callable[[], Any]) -> int | None:
    """Bytes that a call makes resident beside what is so before; None off Linux."""
    gc.collect()
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what is freed goes back, so that it is counted again
    restart_peak()
    before = resident_memory()
    output = run()
    peak = peak_memory() - before
    del output
    return peak


def main() -> None:
    """Load, patch, call, and call again; print the peak of that."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    size = InputSize(**asked["size"])
    network, inputs = open_network(Path(asked["folder"]), getattr(torch, asked["dtype"]), size)
    with torch.no_grad(), patched(network, asked["method"], asked["settings"]) as module:
        module(**inputs)
        print(json.dumps(peak_of(lambda: module(**inputs))))


if __name__ == "__main__":
    main()
