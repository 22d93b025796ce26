"""Misspelt names are told before anything heavy is imported, with what was meant."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from retrofit.commands.early import methods_and_settings
from retrofit.methods import METHODS

HEAVY = ("torch", "diffusers", "transformers", "numpy")


def test_names_and_settings_read_from_sources_are_those_of_the_classes():
    expected = {n: {f.name for f in dataclasses.fields(c)} for n, c in METHODS.items()}
    assert {name: set(settings) for name, settings in methods_and_settings().items()} == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("patch", "no-such-model", "-m", "window", "-o", "x"), "no such folder or file"),
        (("patch", "shapes", "-m", "windw", "-o", "x"), "Did you mean window?"),
        (("patch", "shapes", "-m", "window", "--set", "kep=0.5", "-o", "x"), "no parameter of"),
        (("compare", "rom", "-m", "window"), "Did you mean rooms?"),
        (("compare", "rooms", "-m", "window", "-m", "exakt"), "Did you mean exact?"),
        (("generate", "a red star", "-o", "a.png"), "Put the prompt after -p"),
        (("generate", "shapes", "a red star", "-o", "a.png"), "Put the prompt after -p."),
        (("patch", "shapes", "-m", "window", "--keep", "0.25"), "--set keep=VALUE"),
        (("methods", "windw"), "Did you mean window?"),
    ],
)
def test_a_wrong_name_is_told_without_heavy_imports(words, said, tmp_path):
    code = (
        "import sys; from retrofit.commands import run; code = run(sys.argv[1:]);"
        f"print([name for name in {HEAVY!r} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.strip() == "[]"


def test_a_config_for_a_folder_is_refused(encoder, run_command):
    answer = run_command("inspect", encoder, "--config", encoder)
    assert (answer.code, "is for a single file" in answer.err) == (2, True)
