"""The goals that a CPU can check in at most four minutes, one line for each case.

`python -m benchmarks.quick --json` prints one JSON object a line: `goal`, `case`, `ratio` (higher
is better in every line), `must`, `target`, `load` and what was measured. Ratios of C1 and C2 are
efficiencies (dense time x kept / sparse time), those of C4 and C7 speed against
`scaled_dot_product_attention`, those of C8 and C9 the limit over what was measured. An output that
is not right is not timed: its `ratio` is null, `refused` says why, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import common
from benchmarks.choosing import TIES, attend, choose_slowly, disagreement, share_of
from benchmarks.first_calls import time_first_calls
from benchmarks.goals import C1, C2, C4, C7, C8, C9, FIRST_LIMIT, SHARE_LIMIT, Goal
from retrofit.kernels import backends, select_blocks
from retrofit.layout.grid import TokenGrid
from retrofit.patterns import Neighborhood
from retrofit.profiling.bench.attention import Attention, Shape
from retrofit.profiling.bench.lines import Line, time_routes
from retrofit.profiling.bench.patterns import block_sparse_route, draw_block_mask, pattern_route
from retrofit.runtime.machine import load_average
from retrofit.runtime.timing import Contender, Race, Spread, race

SEQ_LEN = 8192
HEADS = 2
BLOCKS = (64, 128)
KEEPS = (0.05, 0.1, 0.25, 0.5)
WINDOWS = Neighborhood(layout=TokenGrid(frames=21, height=24, width=40), window_size=(21, 11, 17))
BUDGET = 170.0  # seconds after which every case gets as few rounds as can be
FIRST_CALLS = 3  # fresh processes


Measured = Iterator[dict[str, Any]]


class Quick:
    """One run; every method measures a group of goals and yields its lines."""

    def __init__(self, machine: common.Machine, rounds: int | None) -> None:
        """Start the clock."""
        self.machine = machine
        self.asked_rounds = rounds
        self.generator = machine.generator()
        self.stop_at = time.perf_counter() + BUDGET

    @property
    def rounds(self) -> int | None:
        """One for each case that begins past the budget; its line is marked noisy."""
        return 1 if time.perf_counter() > self.stop_at else self.asked_rounds

    def blocks(self, dtype: torch.dtype) -> Measured:
        """C1 (float32) or C2 (bfloat16), and C4: random block lists."""
        attention = Attention(
            Shape(heads=HEADS, seq_len=SEQ_LEN, dtype=dtype), generator=self.generator
        )
        for keep in (*KEEPS, 1.0):
            routes = [self._block_route(attention, block, keep) for block in BLOCKS]
            lines = time_routes(
                f"keep={keep}", attention, routes, rounds=self.rounds, stop_at=self.stop_at
            )
            for line, block in zip(lines, BLOCKS, strict=True):
                case = f"{_name(dtype)} blk{block} N={SEQ_LEN} keep={keep:g}"
                if keep == 1.0:
                    yield self._line(C4[dtype], f"{case} (dense)", line, line.speed)
                else:
                    goal = C1 if dtype == torch.float32 else C2
                    more = {"keep_asked": keep}
                    yield self._line(goal, case, line, line.efficiency, **more)

    def _block_route(self, attention: Attention, block: int, keep: float) -> Any:
        mask = draw_block_mask(HEADS, SEQ_LEN, (block, block), keep, self.generator)
        return block_sparse_route(attention, mask, (block, block), name=f"blk{block}")

    def windows(self, dtype: torch.dtype) -> Measured:
        """C7: windows pushed inward at the borders of a grid, against dense."""
        shape = Shape(heads=2, seq_len=WINDOWS.layout.num_tokens, dtype=dtype)
        attention = Attention(shape, generator=self.generator)
        (line,) = time_routes(
            "inward window",
            attention,
            [pattern_route(attention, WINDOWS)],
            rounds=self.rounds,
            stop_at=self.stop_at,
        )
        case = f"{_name(dtype)} inward window 11x17 of 21x24x40, all frames, against dense"
        yield self._line(C7, case, line, line.speed)

    def prediction(self, dtype: torch.dtype) -> Measured:
        """C8: choosing the blocks, as a share of choosing them and attending."""
        attention = Attention(
            Shape(heads=HEADS, seq_len=SEQ_LEN, dtype=dtype), generator=self.generator
        )
        block_size, keep = (128, 64), 0.1
        contenders = _choose_and_attend(attention, block_size, keep)
        result = race(contenders, rounds=self.rounds or 15, stop_at=self.stop_at)
        base = self._base(C8, f"{_name(dtype)} 128x64 N={SEQ_LEN} keep={keep}")
        if result.refused:
            reasons = "; ".join(f"{name}: {why}" for name, why in result.refused.items())
            yield {**base, "ratio": None, "refused": reasons}
        else:
            yield {**base, **_share(result), **attention.shape.to_dict()}

    def first_call(self) -> Measured:
        """C9: the first call in a fresh process, compiled anew or loaded from the cache."""
        took: dict[str, list[float]] = {}
        load = load_average()
        for i in range(FIRST_CALLS):
            if i and time.perf_counter() > self.stop_at:
                break
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("compile", "load"):
                    for name, seconds in time_first_calls(cache).items():
                        took.setdefault(f"{name}, {kind}", []).append(seconds)
        for name, values in took.items():
            spread = Spread(values=tuple(values))
            yield {
                **self._base(C9, f"first call, {name}, N={SEQ_LEN}"),
                "ratio": FIRST_LIMIT / spread.median,
                "min": FIRST_LIMIT / max(values),
                "max": FIRST_LIMIT / min(values),
                "seconds": spread.median,
                "limit_seconds": FIRST_LIMIT,
                "rounds": len(values),
                "noisy": False,
                "load": load,
            }

    def _base(self, goal: Goal, case: str) -> dict[str, Any]:
        return {
            "goal": goal.name,
            "case": case,
            "ratio": None,
            "must": goal.must,
            "target": goal.target,
            "load": load_average(),
            "refused": "",
            **self.machine.to_dict(),
        }

    def _line(
        self, goal: Goal, case: str, line: Line, ratio: Spread | None, **more: Any
    ) -> dict[str, Any]:
        data = {**line.to_dict(), **self._base(goal, case), **more}
        data["load"] = line.load[1]
        data["refused"] = line.refused
        data["backend"] = _backend(line)
        for name in ("seconds", "base_seconds"):
            data[name] = None if data[name] is None else data[name]["median"]
        if ratio is not None:
            data |= {"ratio": ratio.median, "min": min(ratio.values), "max": max(ratio.values)}
        return data


def _choose_and_attend(
    attention: Attention, block_size: tuple[int, int], keep: float
) -> list[Contender]:
    """The choice of blocks, and attention to those blocks."""
    query, key = attention.query, attention.key

    def choose() -> torch.Tensor:
        return select_blocks(query, key, block_size=block_size, keep=keep)

    expected = choose_slowly(query, key, block_size, keep)
    return [
        Contender(
            name="choose",
            run=choose,
            error=lambda made: disagreement(made, expected),
            tolerance=TIES,
        ),
        attend(attention, choose(), block_size),
    ]


def _share(result: Race) -> dict[str, Any]:
    """How much of both together the choice is, against the limit."""
    shares = share_of(result, "choose")
    return {
        "ratio": SHARE_LIMIT / shares.median,
        "min": SHARE_LIMIT / max(shares.values),
        "max": SHARE_LIMIT / min(shares.values),
        "share": shares.median,
        "share_limit": SHARE_LIMIT,
        "seconds": Spread(values=result.seconds["choose"]).median,
        "attend_seconds": Spread(values=result.seconds["attend"]).median,
        "rounds": result.rounds,
        "noisy": result.is_noisy("attend"),
        "error": result.errors["choose"],
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _backend(line: Line) -> str:
    """The backend that the operator chooses by itself."""
    operator = "neighborhood_attention" if "grid" in line.details else "block_sparse_attention"
    call: dict[str, Any] = {"device": "cpu", "dtype": line.shape.dtype, "head_dim": 64}
    answers = backends(operator, **call, num_tokens=line.shape.seq_len)
    return next(name for name, (is_usable, _) in answers.items() if is_usable)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every line; 0 if all outputs were right."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quick",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_options(parser)
    parser.add_argument(
        "--only", help="goals to measure, separated by commas; all of C1,C2,C4,C7,C8,C9 by default"
    )
    options = parser.parse_args(arguments)
    wanted = _read_goals(options.only)
    machine = common.prepare(options)
    quick = Quick(machine, options.rounds)
    single, half = torch.float32, torch.bfloat16
    groups: list[tuple[set[str], Callable[[], Measured]]] = [
        ({"C1", "C4"}, lambda: quick.blocks(single)),
        ({"C2", "C4"}, lambda: quick.blocks(half)),
        ({"C7"}, lambda: quick.windows(single)),
        ({"C7"}, lambda: quick.windows(half)),
        ({"C8"}, lambda: quick.prediction(single)),
        ({"C8"}, lambda: quick.prediction(half)),
        ({"C9"}, quick.first_call),
    ]
    is_right = True
    for goals, measure in groups:
        if not goals & wanted:
            continue
        for line in measure():
            if line["goal"] in wanted:
                is_right = is_right and not line["refused"]
                common.emit(line) if options.json else print(_as_text(line), flush=True)
    return 0 if is_right else 1


def _read_goals(text: str | None) -> set[str]:
    known = {"C1", "C2", "C4", "C7", "C8", "C9"}
    wanted = known if text is None else {part.strip().upper() for part in text.split(",")}
    if unknown := wanted - known:
        raise common.WrongOptionError(
            f"--only {text}: no goal {', '.join(sorted(unknown))}. "
            f"Known: {', '.join(sorted(known))}."
        )
    return wanted


def _as_text(line: dict[str, Any]) -> str:
    head = f"{line['goal']}  {line['case']:<62}"
    if line["refused"]:
        return f"{head} not timed: {line['refused']}"
    reached = "target" if line["ratio"] >= line["target"] else "must"
    if line["ratio"] < line["must"]:
        reached = "BELOW"
    noisy = ", noisy" if line["noisy"] else ""
    return (
        f"{head} {line['ratio']:6.2f} ({line['min']:.2f} to {line['max']:.2f})  "
        f"must {line['must']:.2f} target {line['target']:.2f}  {reached}  "
        f"load {line['load']}{noisy}"
    )


if __name__ == "__main__":
    common.run_main(main)
