"""`retrofit generate` with a pipeline that is no UNet: FLUX."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests import tiny_pipelines


def pixels(file):
    with Image.open(file) as picture:
        return np.asarray(picture)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    return tiny_pipelines.write_pipeline(tiny_pipelines.make_flux_pipeline(), folder / "flux")


def test_flux_draws_with_circles_and_makes_the_same_again(flux, run_command, tmp_path):
    common = ("-p", "a cat", "--size", "128x96", "--steps", "2", "--no-time-saved")
    made = {}
    for name, method in {"dense": (), "clear": ("-m", "clear", "--set", "radius=2")}.items():
        answer = run_command("generate", flux, *common, *method, "-o", tmp_path / f"{name}.png")
        assert answer.code == 0, answer.err
        made[name] = pixels(tmp_path / f"{name}.png")
        assert made[name].shape == (96, 128, 3)
    assert "clear: patched 3 of 3 attention sites" in answer.out + answer.err
    assert (made["dense"] != made["clear"]).any()
    again = tmp_path / "again.png"
    answer = run_command("generate", "--like", tmp_path / "clear.png", "-o", again)
    assert answer.code == 0, answer.err
    assert (pixels(again) == made["clear"]).all()
