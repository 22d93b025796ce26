"""What every benchmark command shares: its options, the machine, printing."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers import Missing
from retrofit.layout.grid import TokenGrid
from retrofit.layout.sites import AttentionSite
from retrofit.methods import Method
from retrofit.methods.run_state import RunState
from retrofit.patterns import AttentionCall, Pattern
from retrofit.profiling.bench.attention import Attention
from retrofit.profiling.bench.lines import Line
from retrofit.runtime.devices import device_name
from retrofit.runtime.machine import load_average, pin_to_one_core
from retrofit.runtime.versions import library_versions

Reader = Callable[[str], Any]
Clock = Callable[[], float]

IDLE = 0.3  # load average above which all threads would measure the neighbours
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIBRARIES = ("torch", "triton", "retrofit-attention", "natten", "tomesd")


class WrongOptionError(Exception):
    """An option that can't be; the message is one line for the person who typed it."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a benchmark runs.

    Attributes:
        device: `cpu` or `cuda`.
        threads: PyTorch's.
        core: The one that it is pinned to, None if it is not.
        seed: Of everything drawn.
    """

    device: str
    threads: int
    core: int | None
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """What a reader needs to judge the times."""
        return {
            "device": device_name(self.device),
            "cores": os.cpu_count(),
            "threads": self.threads,
            "pinned": self.core is not None,
            "seed": self.seed,
            "versions": library_versions(*LIBRARIES),
        }

    def generator(self, offset: int = 0) -> torch.Generator:
        """Draws what this run draws."""
        return torch.Generator().manual_seed(self.seed + offset)


def add_options(parser: argparse.ArgumentParser, *, devices: Sequence[str] = ("cpu",)) -> None:
    """The options of every benchmark."""
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")
    parser.add_argument(
        "--threads",
        default="1",
        help="1 (pinned to a core; the default), a number, or all (only on an idle machine)",
    )
    parser.add_argument("--seed", type=int, help="of everything drawn; fresh by default")
    parser.add_argument("--rounds", type=int, help="timed rounds; by default what the device needs")
    if len(devices) > 1:
        parser.add_argument("--device", choices=devices, default=devices[0])


def add_clock(parser: argparse.ArgumentParser) -> None:
    """The option of benchmarks of calls so long that they can't wait for an idle machine."""
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: seconds of this process, which other programs disturb least; one thread only",
    )


def read_clock(name: str, threads: int) -> Clock:
    """What `--clock` names.

    Raises:
        WrongOptionError: If it would add up the seconds of several threads.
    """
    if name == "cpu" and threads != 1:
        raise WrongOptionError(
            f"--clock cpu: adds up the seconds of all {threads} threads. Take --threads 1."
        )
    return CLOCKS[name]


def prepare(options: argparse.Namespace) -> Machine:
    """Set threads and pin.

    Raises:
        WrongOptionError: If an option does not fit this machine.
    """
    device = getattr(options, "device", "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise WrongOptionError("--device cuda: PyTorch sees no GPU here. Use --device cpu.")
    if options.rounds is not None and options.rounds < 1:
        raise WrongOptionError(f"--rounds {options.rounds}: expected at least 1.")
    core = None
    if device == "cpu":
        core = _set_threads(options.threads)
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    torch.manual_seed(seed)
    return Machine(device=device, threads=torch.get_num_threads(), core=core, seed=seed)


def _set_threads(text: str) -> int | None:
    """Returns the core, where there is one thread."""
    if text == "1":
        return pin_to_one_core()
    if text == "all":
        load = load_average()
        if load is not None and load >= IDLE:
            raise WrongOptionError(
                f"--threads all: the load average is {load}, expected below {IDLE}. Wait until "
                "the machine is idle, or measure with --threads 1."
            )
        torch.set_num_threads(os.cpu_count() or 1)
        return None
    if not text.isdigit() or not int(text):
        raise WrongOptionError(f"--threads {text}: expected a number or all.")
    torch.set_num_threads(int(text))
    return None


def report(
    lines: Iterable[dict[str, Any]],
    machine: Machine,
    as_text: Callable[[dict[str, Any]], str] | None,
) -> int:
    """Print lines as they come, as JSON without `as_text`; the exit status, 1 if one is refused."""
    is_right = True
    for line in lines:
        is_right = is_right and not line["refused"]
        if as_text is None:
            emit({**line, **machine.to_dict()})
        else:
            print(as_text(line), flush=True)
    print_clock(machine)
    return 0 if is_right else 1


def read_list(name: str, text: str, read: Callable[[str], Any]) -> list[Any]:
    """An option's values, separated by commas.

    Raises:
        WrongOptionError: If one can't be read.
    """
    try:
        values = [read(part.strip()) for part in text.split(",")]
    except (ValueError, KeyError) as error:
        raise WrongOptionError(
            f"--{name} {text}: can't read {error.args[0]!r}. Separate values by commas."
        ) from error
    return values


def read_dtype(name: str) -> torch.dtype:
    """A dtype by its name.

    Raises:
        ValueError: If there is none; the message lists those there are.
    """
    if name not in DTYPES:
        raise ValueError(f"{name} (known: {' '.join(DTYPES)})")
    return DTYPES[name]


def known(names: Collection[str]) -> Reader:
    """A reader for `read_list` that takes only these names."""

    def read(name: str) -> str:
        if name not in names:
            raise ValueError(f"{name} (known: {' '.join(names)})")
        return name

    return read


def lone_site(heads: int, head_dim: int) -> AttentionSite:
    """A site of no network, for methods that are run by themselves."""
    return AttentionSite(
        path="attn",
        index=0,
        block=0,
        kind="self",
        num_heads=heads,
        head_dim=head_dim,
        layout="grid",
    )


def attend_by(
    method: Method, attention: Attention, layout: TokenGrid
) -> tuple[torch.Tensor, Pattern]:
    """A method's attention as a patched layer of this shape runs it, and its pattern."""
    site = lone_site(attention.shape.heads, attention.shape.head_dim)
    call = AttentionCall(query=attention.query, key=attention.key, value=attention.value)
    return method.attend(site, layout, call, RunState())


def run_main(main: Callable[[], int]) -> None:
    """Leave with the exit code of a benchmark: 2 for a wrong option, in one line."""
    try:
        sys.exit(main())
    except WrongOptionError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def emit(line: Mapping[str, Any]) -> None:
    """One JSON object on a line of stdout, at once."""
    print(json.dumps(line), flush=True)


def emit_all(machine: Machine, lines: Sequence[Line], missing: Sequence[Missing]) -> None:
    """Every line with the machine's facts, then what could not run and why."""
    facts = machine.to_dict()
    for line in lines:
        emit({**line.to_dict(), **facts})
    for peer in missing:
        emit({"case": lines[0].case, "route": peer.name, "missing": peer.reason})


def say(text: str) -> None:
    """A line on stderr, for people."""
    sys.stderr.write(text + "\n")


def print_clock(machine: Machine) -> None:
    """On a GPU, the clock of its multiprocessors after the run, on stderr."""
    if machine.device != "cuda":
        return
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv"]
    if shutil.which(command[0]) is None:
        say("SM clock: unknown, nvidia-smi is not installed")
        return
    done = subprocess.run(command, capture_output=True, text=True)
    say("after the run: " + " | ".join(done.stdout.strip().splitlines()))
