"""The command line: one file per verb; here the app, `main` and the error boundary.

Nothing heavy is imported before a command runs: `retrofit --help` answers in under a second.
"""

from __future__ import annotations

import errno
import inspect as inspect_module
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from retrofit.commands import (
    bench,
    compare,
    doctor,
    export,
    families,
    finetune,
    generate,
    inspect,
    methods,
    patch,
    plan,
    recipes,
    reconstruct,
    unpatch,
    verify,
)
from retrofit.commands.console import print_json, result, say
from retrofit.commands.early import checked, methods_and_settings
from retrofit.commands.notes import showing_notes
from retrofit.runtime.errors import RetrofitError, StoppedError
from retrofit.runtime.interrupts import raise_if_interrupted, watched
from retrofit.runtime.machine import wait_passively
from retrofit.runtime.outputs import FULL

BY_SIGNAL = 128  # exit codes above are 128 and the number of a signal
INTERRUPTED = 130
PERMISSIONS = (errno.EACCES, errno.EPERM, errno.EROFS)

VERBS: dict[str, Callable[..., None]] = {
    "doctor": doctor.run,
    "methods": methods.run,
    "families": families.run,
    "recipes": recipes.run,
    "inspect": inspect.run,
    "plan": plan.run,
    "patch": patch.run,
    "verify": verify.run,
    "compare": compare.run,
    "generate": generate.run,
    "reconstruct": reconstruct.run,
    "finetune": finetune.run,
    "export": export.run,
    "unpatch": unpatch.run,
    "bench": bench.run,
}


def help_text(verb: Callable[..., None]) -> str:
    """A verb's docstring with its prose unwrapped, so that it fills any terminal's width."""
    prose, header, examples = inspect_module.cleandoc(verb.__doc__ or "").partition("[bold]")
    paragraphs = [" ".join(paragraph.split()) for paragraph in prose.split("\n\n")]
    return "\n\n".join(paragraphs).rstrip() + "\n\n" + header + examples


app = typer.Typer(
    name="retrofit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _verb in VERBS.items():
    app.command(_name, help=help_text(_verb))(checked(_verb))


def show_version(asked: bool) -> None:
    """Print the version and leave, before anything else is looked at."""
    if asked:
        from retrofit import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Show the version and leave."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; works after any verb.")
    ] = False,
) -> None:
    r"""Replace the attention of a pretrained checkpoint, prove it, save it, undo it.

    [bold]Examples[/bold]

    $ retrofit doctor
    $ retrofit inspect stabilityai/stable-diffusion-xl-base-1.0 --size 2048x2048
    $ retrofit patch sdxl/ --method hidiffusion -o sdxl-hidiffusion/
    $ retrofit verify sdxl-hidiffusion/
    $ retrofit unpatch sdxl-hidiffusion/ -o sdxl-again/

    Exit codes: 0 done; 2 wrong input, nothing written; 1 a failure; 130 Ctrl-C. With --json an
    error is an object too, with `error` and `exit_code`.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their advice on loading is not for our users
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    wait_passively()
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run the command line: results to stdout, one line to stderr for an error.

    Args:
        arguments: Without the program's name. `--debug` may stand anywhere.

    Returns:
        0 done, 2 wrong input, 1 a failure, 130 Ctrl-C, 143 SIGTERM.
    """
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with watched(), showing_notes():
            code = _run_verb(arguments)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as left:
        code = left.code
    except Exception as error:  # noqa: BLE001 - the boundary: nothing passes as a traceback
        if debug:
            traceback.print_exc()
        line, code = describe_error(error)
        line = line if isinstance(error, StoppedError) else f"error: {line}"
        finished = getattr(error, "finished", {})
        return _fail(line, code, as_json="--json" in arguments, finished=finished)
    if isinstance(code, int) and code > BY_SIGNAL:
        line = "stopped; nothing was left half-written."
        return _fail(line, code, as_json="--json" in arguments)
    return code if isinstance(code, int) else 0


def _run_verb(arguments: list[str]) -> Any:
    """Its exit code; whatever a library made of an interruption, it is one."""
    try:
        code = app(arguments, prog_name="retrofit", standalone_mode=False)
        sys.stdout.flush()
    except StoppedError:
        raise
    except Exception:
        raise_if_interrupted()
        raise
    raise_if_interrupted()
    return code


def _fail(line: str, code: int, *, as_json: bool, finished: Mapping[str, Any] | None = None) -> int:
    """Say what went wrong: a line for people, and an object where one was asked for."""
    say(line)
    try:
        if as_json:
            said = {"error": line.removeprefix("error: "), "exit_code": code}
            print_json({**result(), **(finished or {}), **said})
        sys.stdout.flush()
    except OSError:  # full or closed, which the line may be about; Python would say so again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def describe_error(error: Exception) -> tuple[str, int]:
    """An exception as one line for people, and its exit code."""
    if isinstance(error, RetrofitError):
        return _one_line(error), error.exit_code
    if isinstance(error, typer.Abort):
        return "stopped.", INTERRUPTED
    if hasattr(error, "format_message"):  # a usage error of typer's, wherever it keeps the class
        command = getattr(getattr(error, "ctx", None), "command_path", "retrofit")
        hint = _hint(error, command)
        return f"{_one_line(error.format_message())} {hint}See `{command} --help`.", 2
    if isinstance(error, OSError) and error.errno is not None:
        return _describe_os_error(error)
    return f"{type(error).__name__}: {_one_line(error)} Add --debug to see where.", 1


def _hint(error: Any, command: str) -> str:
    """What was probably meant by a usage error of typer's."""
    option = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
    if option and any(option in settings for settings in methods_and_settings().values()):
        return f"A method's setting is given as --set {option}=VALUE. "
    if "unexpected extra argument" in str(error.format_message()) and command.endswith("generate"):
        return "Put the prompt after -p. "
    return ""


def _describe_os_error(error: OSError) -> tuple[str, int]:
    where = error.filename2 or error.filename or "the output"
    if error.errno in FULL:
        return f"{where}: the disk is full. Free some space, or give another folder.", 1
    if error.errno == errno.ENAMETOOLONG:
        return f"{where}: the name is too long for this disk. Give a shorter one.", 2
    if error.errno in PERMISSIONS:
        return f"{where}: not writable here ({error.strerror}). Give another folder.", 2
    return f"{where}: {error.strerror}. Add --debug to see where.", 1


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())
