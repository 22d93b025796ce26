"""A markdown table of what `benchmarks.quick --json` printed.

python -m benchmarks.summary benchmarks/results/2026-11-21/quick.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Machine first, then a row for each case."""
    first = lines[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    loads = [line["load"] for line in lines if line["load"] is not None]
    rows = [
        f"{first['device']}, {first['threads']} thread of {first['cores']} cores, "
        f"{'pinned' if first['pinned'] else 'not pinned'}, load {min(loads)} to {max(loads)}; "
        f"{versions}.",
        "",
        "| goal | case | ratio | min to max | must | target | |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*rows, *map(_row, lines)])


def _row(line: dict[str, Any]) -> str:
    head = f"| {line['goal']} | {line['case']} |"
    limits = f"{line['must']:.2f} | {line['target']:.2f}"
    if line["refused"]:
        return f"{head} | | {limits} | not timed: {line['refused']} |"
    reached = "target" if line["ratio"] >= line["target"] else "must"
    if line["ratio"] < line["must"]:
        reached = "**below**"
    noisy = ", noisy" if line["noisy"] else ""
    spread = f"{line['min']:.2f} to {line['max']:.2f}"
    return f"{head} {line['ratio']:.2f} | {spread} | {limits} | {reached}{noisy} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.summary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path)
    file: Path = parser.parse_args(arguments).file
    if not file.is_file():
        raise common.WrongOptionError(f"{file}: no such file.")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    if not lines:
        raise common.WrongOptionError(f"{file}: holds no line.")
    print(table(lines))
    return 0


if __name__ == "__main__":
    common.run_main(main)
