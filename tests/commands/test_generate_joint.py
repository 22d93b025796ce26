"""`retrofit generate` with pipelines that are no UNets: text and picture in one sequence."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests import tiny_pipelines

MAKE = {
    "flux": (tiny_pipelines.make_flux_pipeline, 3),
    "sd3": (tiny_pipelines.make_sd3_pipeline, 5),
}


def pixels(file):
    with Image.open(file) as picture:
        return np.asarray(picture)


def test_a_size_beyond_the_positions_of_the_network_is_refused(run_command, tmp_path):
    model = tiny_pipelines.write_pipeline(tiny_pipelines.make_sd3_pipeline(), tmp_path / "sd3")
    answer = run_command("generate", model, "-p", "a cat", "--size", "136x64", "-o", "a.png")
    assert answer.code == 2
    assert "--size 136x64: expected at most 128 pixels a side" in answer.err
    assert len(answer.err.strip().splitlines()) == 1


@pytest.mark.parametrize("family", MAKE)
def test_a_transformer_draws_with_circles_and_makes_the_same_again(family, run_command, tmp_path):
    make, sites = MAKE[family]
    model = tiny_pipelines.write_pipeline(make(), tmp_path / family)
    size = "128x96" if family == "flux" else "48x40"
    common = ("-p", "a cat", "--size", size, "--steps", "2", "--no-time-saved")
    made = {}
    for name, method in {"dense": (), "clear": ("-m", "clear", "--set", "radius=2")}.items():
        answer = run_command("generate", model, *common, *method, "-o", tmp_path / f"{name}.png")
        assert answer.code == 0, answer.err
        made[name] = pixels(tmp_path / f"{name}.png")
        width, height = map(int, size.split("x"))
        assert made[name].shape == (height, width, 3)
    assert f"clear: patched {sites} of {sites} attention sites" in answer.out + answer.err
    assert (made["dense"] != made["clear"]).any()
    again = tmp_path / "again.png"
    answer = run_command("generate", "--like", tmp_path / "clear.png", "-o", again)
    assert answer.code == 0, answer.err
    assert (pixels(again) == made["clear"]).all()
