"""The error boundary, and what starting the command line costs."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from retrofit import commands
from retrofit.commands import VERBS, describe_error, help_text, run
from retrofit.runtime.errors import NonFiniteError, NotFoundError
from tests.checkpoint_fixtures import patch_words

HEAVY = ("torch", "numpy", "transformers", "diffusers", "huggingface_hub", "matplotlib", "yaml")


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from retrofit.commands import run; code = run(['--help']); "
        f"print('loaded', [name for name in {HEAVY!r} if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("loaded [] 0\n"), done.stdout[-300:] + done.stderr


def test_importing_the_package_imports_nothing_heavy():
    program = (
        "import sys, retrofit; "
        f"print([name for name in {HEAVY!r} if name in sys.modules], dir(retrofit)[-1])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[] unpatch\n", done.stdout + done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_shows_examples_with_their_output(verb, run_command):
    answer = run_command(verb, "--help")
    assert answer.code == 0
    text = " ".join(answer.out.split())
    assert "Examples" in text
    assert f"$ retrofit {verb}" in text
    lines = (VERBS[verb].__doc__ or "").partition("Examples")[2].splitlines()
    shown = [line.strip() for line in lines if line.strip()]
    after = [b for a, b in zip(shown, shown[1:], strict=False) if a.startswith("$")]
    assert any(not line.startswith(("$", "[bold]")) for line in after), "no example has output"


def test_prose_of_a_help_fills_the_line_and_examples_stay_as_they_are():
    def verb():
        """One
        line.

        Two
        lines.

        [bold]Examples[/bold]

        $ a
        b
        """

    assert help_text(verb).split("\n\n") == [
        "One line.",
        "Two lines.",
        "[bold]Examples[/bold]",
        "$ a\nb",
    ]


def test_the_version_is_printed(run_command):
    from retrofit import __version__

    assert run_command("--version").out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["patc", "x"], "No such command 'patc'"),
        (["patch", "x", "--metod", "window"], "--method"),
        (["patch"], "Missing argument"),
        (["patch", "x", "--seed", "one"], "Invalid value for '--seed'"),
        (["unpatch", "x"], "--out"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_2(arguments, message, run_command):
    answer = run_command(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.count("\n") == 1
    assert message in answer.err
    assert "--help`" in answer.err


def _raise(error):
    def verb(**options):
        raise error

    return verb


def _full(path="out/model.safetensors"):
    return OSError(errno.ENOSPC, "No space left on device", path)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (NotFoundError("model: missing. Do this."), 2, "error: model: missing. Do this."),
        (NonFiniteError("unet: NaN"), 1, "error: unet: NaN"),
        (_full(), 1, "error: out/model.safetensors: the disk is full. Free some space"),
        (OSError(errno.EDQUOT, "quota", "out"), 1, "error: out: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "/cd"), 2, "error: /cd: not writable here"),
        (PermissionError(errno.EACCES, "denied", "out"), 2, "error: out: not writable here"),
        (OSError(errno.EIO, "Input/output error", "disk"), 1, "error: disk: Input/output error"),
        (ZeroDivisionError("division\nby zero"), 1, "error: ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), 130, "stopped; nothing was left half-written."),
        (typer.Abort(), 130, "error: stopped."),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(error, code, message, monkeypatch, run_command):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("one")(lambda: _raise(error)())
    app.command("other")(lambda: None)
    monkeypatch.setattr(commands, "app", app)
    answer = run_command("one")
    assert answer.code == code
    assert answer.err.startswith(message)
    assert answer.err.count("\n") == 1


def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch, run_command):
    answer = run_command("patch", "no-such-folder", "--method", "window", "--debug", "--dry-run")
    assert answer.code == 2
    assert "Traceback" in answer.err
    assert re.search(r"^error: no-such-folder: ", answer.err, re.MULTILINE)


def test_main_leaves_with_the_exit_code():
    with pytest.raises(SystemExit) as caught:
        commands.main(["methods", "no-such-method"])
    assert caught.value.code == 2


def test_an_error_without_a_path_still_says_what_to_do():
    line, code = describe_error(OSError(errno.ENOSPC, "No space left on device"))
    assert code == 1
    assert line.startswith("the output: the disk is full")


def test_cli_py_runs_from_a_checkout():
    from pathlib import Path

    root = Path(commands.__file__).parents[2]
    if not (root / "cli.py").exists():
        pytest.skip("installed without its checkout")
    done = subprocess.run(
        [sys.executable, str(root / "cli.py"), "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_run_gives_0_for_what_worked(capsys):
    assert run(["families"]) == 0
    assert "encoder" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("methods",), ("methods", "--json"), ("nosuch", "--json")])
def test_a_full_stdout_is_one_line(words):
    cli = Path(__file__).parents[2] / "cli.py"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, str(cli), *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")


def test_a_negative_seed_and_a_second_cpu_are_refused(refused, encoder, tmp_path):
    words = patch_words(encoder, tmp_path / "out")
    assert "--seed" in refused(*words, "--seed", "-1")
    assert "device 'cpu:99' can't be used here (there is one CPU)" in refused(
        *words, "--device", "cpu:99"
    )
    assert "--seed" in refused("compare", encoder, "--seed", "-1")
    assert "--seed" in refused("bench", "--seed", "-1")
