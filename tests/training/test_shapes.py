"""The bundled picture model, whose pictures a sparse attention has ruined, draws again."""

from __future__ import annotations

import retrofit
from benchmarks.finetune import SHAPES, draw_pictures, judge_pictures
from retrofit.checkpoints import find_checkpoint
from retrofit.training import Running, finetune, plan_finetune, read_request


def test_fifty_steps_bring_the_pictures_back(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SHAPES))
    draw_pictures(tmp_path / "pictures", 232, seed=5)
    request = read_request(
        {"data": str(tmp_path / "pictures"), "held_out": 32, "steps": 50, "lr": 3e-4}
    )
    plan = plan_finetune(find_checkpoint("shapes"), "clear", request, radius=3)
    done = finetune(plan, request, tmp_path / "tuned", Running())
    assert done.outcome.recovered["weighted"] >= 0.65
    tuned = retrofit.load(tmp_path / "tuned", dtype="float32")
    judged = judge_pictures(tuned, tmp_path / "sheet.png")
    assert judged["right"] >= 28, judged
