"""The scripts in examples/shapes that measure rates and times, on a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "shapes"


def run_script(name: str, *arguments: object) -> str:
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_measurement_goes_on_where_it_stopped_and_draws_what_it_has(tmp_path: Path) -> None:
    output = tmp_path / "rates.jsonl"
    settings = ("--output", output, "--steps", 1, "--size", "128x128", "--setup", "both")
    run_script("measure.py", *settings, "--count", 1)
    first = output.read_text()
    text = run_script("measure.py", *settings, "--count", 2)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert output.read_text().startswith(first)
    assert [row["index"] for row in rows] == [0, 1]
    assert rows[0]["wanted"] == {"prompt": "a red circle", "shape": "circle", "color": "red"}
    assert "| 128x128 | both | " in text
    assert "/2 (" in text
    sheet = tmp_path / "sheet.png"
    assert run_script("measure.py", "--output", output, "--sheet", sheet) == text
    assert sheet.stat().st_size > 1000


@pytest.mark.parametrize("recipe", ["unet2d_hidiffusion", "unet2d_hidiffusion_turbo"])
def test_every_kind_of_step_is_timed_and_weighed(recipe: str) -> None:
    arguments = ("shapes", "--size", "144x128", "--dtype", "float32", "--device", "cpu")
    result = json.loads(run_script("step_time.py", *arguments, "--recipe", recipe))
    assert sum(kind["steps"] for kind in result["patched"]) == 50
    total = sum(kind["steps"] * kind["seconds"] for kind in result["patched"])
    assert result["patched_mean_seconds"] == pytest.approx(total / 50)
    assert result["saved"] == pytest.approx(1 - total / 50 / result["dense"]["seconds"])
    assert result["dense"]["peak_bytes"] > 10_000_000


def test_work_is_counted_without_running_anything() -> None:
    arguments = ("shapes", "--size", "256x256", "--dtype", "float32", "--device", "cpu")
    result = json.loads(run_script("step_time.py", *arguments, "--count"))
    assert [kind["steps"] for kind in result["patched"]] == [20, 30]
    halved, windows = (kind["teraflops"] for kind in result["patched"])
    assert halved < windows < result["dense"]["teraflops"]
    assert 0.1 < result["saved"] < 0.9


def test_the_prompts_in_the_file_are_those_of_the_measurements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "import evaluate; print(*(p['prompt'] for p in evaluate.fixed_prompts()), sep='\\n')"
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (FOLDER / "prompts.txt").read_text() == done.stdout
