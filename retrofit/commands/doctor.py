"""`retrofit doctor`: what this machine can use."""

from __future__ import annotations

from typing import Any

from retrofit.commands import options
from retrofit.commands.console import print_json, print_lines, print_table, result


def run(json: options.Json = False) -> None:
    r"""Say what this machine can use, and the command that fixes what it can't.

    A machine without a GPU is fine: every operator has a plain PyTorch route.

    [bold]Examples[/bold]

    $ retrofit doctor
    torch         yes  2.13.0
    gpu           yes  none: everything runs on the CPU, real models slowly
    memory        yes  12.1 of 16.0 GB free
    ...
    everything needed is there

    [bold]In Python[/bold]

    from retrofit.profiling.doctor import examine
    examine()["devices"]
    """
    from retrofit.profiling.doctor import examine, system

    sections = examine()
    if json:
        described: dict[str, Any] = {
            name: [vars(finding) for finding in findings] for name, findings in sections.items()
        }
        print_json(result(system=system(), **described))
        return
    print_lines(system())
    for name, findings in sections.items():
        rows = [(f.what, "yes" if f.ok else "no", f.found) for f in findings]
        if rows:
            print_table((name, "usable", "what was found"), rows)
    fixes = [f"{f.what}: {f.fix}" for findings in sections.values() for f in findings if f.fix]
    if fixes:
        print_lines("to fix:", *(f"  {fix}" for fix in fixes))
    else:
        print_lines("everything needed is there")
