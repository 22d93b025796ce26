"""Graphs of every family: the eager patched output, as little work, no trace of this machine."""

from __future__ import annotations

import pytest
import torch

from retrofit.checkpoints import find_checkpoint
from retrofit.export import ExportRequest, plan_export
from retrofit.export.formats import trace, write_pt2
from retrofit.export.measure import count_graph, count_work, distance, run_dense
from retrofit.export.network import open_subject, plain_operators
from retrofit.profiling.inspection import AskedSize
from tests.tiny_models import FAMILY_MODELS

PICTURE, VIDEO = AskedSize(width=256, height=256), AskedSize(width=256, height=256, frames=9)
PAIRS = [
    ("bert", "block-sparse", {"keep": 0.25, "block_size": [16, 16]}, AskedSize(tokens=256)),
    ("roberta", "window", {"keep": 0.25}, AskedSize(tokens=256)),
    ("vit", "neighborhood", {"keep": 0.3}, AskedSize()),
    ("dinov2-registers", "block-sparse", {"keep": 0.5, "block_size": [16, 16]}, AskedSize()),
    ("sd15", "window", {"keep": 0.25}, PICTURE),
    ("sdxl", "block-sparse", {"keep": 0.25, "block_size": [16, 16]}, PICTURE),
    ("wan-t2v", "t3", {}, VIDEO),
    ("flux", "clear", {"radius": 3}, PICTURE),
    ("sd3", "clear", {"radius": 3}, PICTURE),
]


@pytest.mark.parametrize(
    ("name", "method", "settings", "size"), PAIRS, ids=[f"{p[0]}-{p[1]}" for p in PAIRS]
)
def test_a_plain_graph_is_the_patched_network(name, method, settings, size, tmp_path):
    FAMILY_MODELS[name].make_model().save_pretrained(tmp_path / "model")
    request = ExportRequest(format="pt2", portable=True, size=size)
    plan = plan_export(find_checkpoint(str(tmp_path / "model")), method, request, **settings)
    subject = open_subject(plan, size, device="cpu")
    patched = subject.run()
    assert distance(run_dense(subject), patched) > 1e-3
    with plain_operators():
        program = trace(subject, dynamic_batch=False)
    with torch.no_grad():
        # the weights are drawn to make attention sharp, which magnifies rounding
        assert distance(program.module()(**subject.inputs), patched) < 5e-5
    work = count_work(subject)
    assert work["ideal"] < work["dense"]
    assert count_graph(subject, program) <= 1.5 * work["ideal"]

    write_pt2(program, subject, tmp_path / "model.pt2")
    assert not [n for n in program.graph.nodes if "retrofit" in str(n.target)]
    data = (tmp_path / "model.pt2").read_bytes()
    assert b"/site-packages/" not in data
    assert program.example_inputs is None
