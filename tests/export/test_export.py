"""Exports at the command line: written, run in a fresh process, verified, refused."""

from __future__ import annotations

import json
import shutil

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from retrofit.export import PROBE, RECORD

WINDOW = ("-m", "window", "--set", "keep=0.3", "--tokens", "128")
BLOCKS = ("-m", "block-sparse", "--set", "keep=0.25", "--set", "block_size=[16,16]")


def test_a_portable_pt2_of_any_number_of_rows(run_command, encoder, tmp_path):
    out = tmp_path / "out"
    answer = run_command(
        "export", encoder, *BLOCKS, "--tokens", 128, "--portable", "--dynamic", "batch", "-o", out,
        "--json",
    )  # fmt: skip
    assert answer.code == 0, answer
    assert answer.json["verified"]["difference"] < 1e-5
    assert answer.json["keep_measured"] == 0.25
    assert run_command("verify", out).code == 0

    probe = load_file(out / PROBE)
    module = torch.export.load(out / "model.pt2").module()
    ids, mask = probe["in.input_ids"], probe["in.attention_mask"]
    three = [torch.cat([x, x[:1]]) for x in (ids, mask)]
    rows = module(input_ids=three[0], attention_mask=three[1])[0]
    assert torch.allclose(rows[2], rows[0], atol=1e-5)
    assert torch.allclose(rows[:2], probe["out.0"], atol=1e-4)
    card = (out / "README.md").read_text()
    assert "import retrofit" not in card
    code = card.split("```py\n")[1].split("```")[0].replace("model.pt2", str(out / "model.pt2"))
    found: dict = {"input_ids": ids, "attention_mask": mask}
    exec(code, found)
    assert torch.allclose(found["outputs"][0], probe["out.0"], atol=1e-4)


def test_an_onnx_file_that_its_runtime_opens(run_command, encoder, tmp_path):
    out = tmp_path / "out"
    answer = run_command("export", encoder, *WINDOW, "--format", "onnx", "-o", out)
    assert answer.code == 0, answer
    assert "with retrofit, transformers and diffusers blocked" in answer.out
    probe = load_file(out / PROBE)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    names = [value.name for value in session.get_inputs()]
    assert names == ["input_ids", "attention_mask"]
    given = {name: probe[f"in.{name}"].numpy() for name in names}
    assert abs(session.run(None, given)[0] - probe["out.0"].numpy()).max() < 1e-4


def test_our_operators_and_a_damaged_export(run_command, patched, tmp_path):
    out = tmp_path / "out"
    answer = run_command("export", patched, "--tokens", 128, "-o", out)
    assert answer.code == 0, answer
    probe = load_file(out / PROBE)
    probe["out.0"] += 1
    from safetensors.torch import save_file

    save_file(probe, out / PROBE)
    answer = run_command("verify", out)
    assert answer.code == 1
    assert "of the largest value away" in answer.err
    record = json.loads((out / RECORD).read_text())
    (out / RECORD).write_text(json.dumps({**record, "schema": 9}))
    answer = run_command("verify", out)
    assert answer.code == 2
    assert "expected a record of schema 1" in answer.err
    (out / RECORD).write_text(json.dumps(record))
    (out / "model.pt2").write_bytes(b"nothing")
    answer = run_command("verify", out)
    assert answer.code == 1
    assert "does not run in a fresh process" in answer.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((*WINDOW, "--format", "tflite"), "--format tflite: expected pt2 or onnx"),
        ((*WINDOW, "--dynamic", "length"), "--dynamic length: expected batch"),
        ((), "not patched. Add --method or --recipe"),
        (("-m", "window", "--set", "keep=1.0", "--tokens", "32"), "changes nothing"),
    ],
)
def test_what_can_not_be_exported(words, told, run_command, encoder, tmp_path):
    answer = run_command("export", encoder, *words, "-o", tmp_path / "out")
    assert answer.code == 2, answer
    assert told in answer.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_methods_that_need_the_step_and_outputs_that_exist(
    refused, pipeline, patched, encoder, tmp_path
):
    line = refused("export", pipeline, "-m", "hidiffusion", "-o", tmp_path / "out")
    assert "changes with the step of a denoising run" in line
    line = refused("export", patched, *BLOCKS, "-o", tmp_path / "out")
    assert "already patched" in line
    assert "expected -o FOLDER" in refused("export", encoder, *BLOCKS)
    shutil.copytree(encoder, tmp_path / "out")
    assert "out" in refused("export", encoder, *BLOCKS, "-o", tmp_path / "out")
