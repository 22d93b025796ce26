"""The benchmark commands at sizes that take milliseconds, and the peers' lists against ours."""

from __future__ import annotations

import functools
import json
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import (
    block_sparse,
    common,
    exact,
    flex,
    mask_cost,
    methods,
    models,
    peers,
    planned,
    prediction,
    quick,
    windows,
)
from retrofit.layout.grid import TokenGrid
from retrofit.patterns import Neighborhood
from retrofit.profiling.bench.attention import Attention, Route, Shape
from retrofit.profiling.bench.lines import time_routes
from retrofit.profiling.bench.patterns import block_sparse_route, draw_block_mask, pattern_route
from retrofit.profiling.inspection import AskedSize
from tests import tiny_models

FLEX_WARNING = "ignore:flex_attention called without torch.compile"


@pytest.fixture(autouse=True)
def unpinned(monkeypatch):
    """The process that runs the tests stays where it is, and flex is not compiled."""
    monkeypatch.setattr(common, "pin_to_one_core", lambda: 0)
    monkeypatch.setattr(flex, "compiled_flex", lambda mode: flex_attention)


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("seq_len", [256, 250], ids=["whole blocks", "short last block"])
def test_peers_get_the_same_lists(seq_len):
    attention = Attention(Shape(heads=2, seq_len=seq_len, head_dim=16), torch.Generator())
    mask = draw_block_mask(2, seq_len, (32, 32), 0.3, torch.Generator().manual_seed(1))
    ours = block_sparse_route(attention, mask, (32, 32))
    problem = peers.BlockProblem(
        attention=attention, block_mask=mask, block_size=(32, 32), ours=ours
    )
    others = peers.block_peers(problem, ["gather", "row_loop"])
    lines = time_routes("case", attention, [ours, *others], rounds=1)
    assert [line.refused for line in lines] == [""] * 3
    # without its compiler FlexAttention ignores lists, so they are looked at themselves
    assert torch.equal(flex.flex_lists(mask, (32, 32), seq_len).to_dense().bool(), mask)


@pytest.mark.filterwarnings(FLEX_WARNING)
@pytest.mark.parametrize("name", list(windows.PRESETS))
def test_window_peers_compute_the_same_pattern(name):
    grids = {"t3-small": (4, 8, 8), "inward-small": (3, 10, 14), "msw-small": (1, 12, 12)}
    inner = {"inward-small": (3, 5, 7), "msw-small": (1, 6, 6)}
    grid = grids[name]
    shape = Shape(heads=2, seq_len=grid[0] * grid[1] * grid[2], head_dim=16)
    attention = Attention(shape, torch.Generator().manual_seed(0))
    for pattern in windows.PRESETS[name].patterns:
        pattern = replace(pattern, window=inner.get(name, pattern.window))
        problem = windows.make(attention, grid, pattern)
        found = [peer(problem) for peer in windows.PEERS.values()]
        routes = [peer for peer in found if isinstance(peer, Route)]
        assert routes
        lines = time_routes("case", attention, [problem.ours, *routes], rounds=1)
        assert [line.refused for line in lines] == [""] * (1 + len(routes))
        for peer in found:
            assert isinstance(peer, Route) or peer.reason


@pytest.mark.parametrize("name", ["sparge", "block_sparse_attn", "flashinfer", "flex_flash"])
def test_a_peer_that_is_not_installed_is_missing_with_the_reason(name, monkeypatch):
    module = {
        "sparge": "spas_sage_attn",
        "block_sparse_attn": "block_sparse_attn",
        "flashinfer": "flashinfer",
        "flex_flash": "flash_attn.cute",
    }[name]
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    attention = Attention(Shape(heads=1, seq_len=128, head_dim=16), torch.Generator())
    mask = draw_block_mask(1, 128, (64, 64), 1.0, torch.Generator())
    ours = block_sparse_route(attention, mask, (64, 64))
    problem = peers.BlockProblem(
        attention=attention, block_mask=mask, block_size=(64, 64), ours=ours
    )
    (missing,) = peers.block_peers(problem, [name])
    assert isinstance(missing, peers.Missing)
    assert "not installed" in missing.reason


def test_a_missing_peer_has_a_line_and_no_time(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "spas_sage_attn", None)
    small = ["--seq", "128", "--heads", "1", "--block", "64", "--keep", "0.5", "--rounds", "1"]
    code = block_sparse.main(
        [*small, "--dtype", "float32", "--against", "sdpa,sparge,row_loop", "--json"]
    )
    assert code == 0
    lines = {line["route"]: line for line in lines_of(capsys)}
    assert set(lines) == {"retrofit", "row_loop", "sparge"}
    assert "not installed" in lines["sparge"]["missing"]
    assert "seconds" not in lines["sparge"]
    assert lines["retrofit"]["versions"]["torch"] == torch.__version__


def test_a_table_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    small = ["--seq", "128", "--heads", "1", "--block", "64", "--keep", "0.5", "--rounds", "1"]
    assert block_sparse.main([*small, "--dtype", "float32", "--against", "flashinfer"]) == 0
    out = capsys.readouterr().out
    assert "missing: flashinfer: not installed" in out
    assert out.count("retrofit") == 1


def test_dense_on_a_part_of_the_queries_is_scaled():
    attention = Attention(
        Shape(heads=2, seq_len=120, head_dim=16), torch.Generator().manual_seed(0), dense_rows=30
    )
    pattern = Neighborhood(layout=TokenGrid(height=10, width=12), window_size=(1, 3, 3))
    (line,) = time_routes("case", attention, [pattern_route(attention, pattern)], rounds=2)
    assert line.refused == ""
    assert line.base_part == 0.25
    assert attention.dense().run().shape[2] == 30
    assert line.speed.values == pytest.approx(
        [a / b for a, b in zip(line.base_seconds.values, line.seconds.values, strict=True)]
    )


@pytest.mark.filterwarnings(FLEX_WARNING)
def test_methods_are_right_when_shrunk(capsys, monkeypatch):
    tiny = {
        name: replace(preset, heads=2, head_dim=16, grid=(2 + (name == "vggt-100"), 8, 12))
        for name, preset in methods.PRESETS.items()
    }
    tiny["msw-2k"] = replace(tiny["msw-2k"], grid=(1, 8, 12), window=(1, 4, 6))
    tiny["vggt-100"] = replace(tiny["vggt-100"], grid=(9, 8, 12))
    for name in ("freeswim-1080p", "freeswim-4k"):
        tiny[name] = replace(tiny[name], window=(2, 5, 7))
    monkeypatch.setattr(methods, "PRESETS", tiny)
    assert methods.main(["--json", "--rounds", "1", "--dtype", "float32"]) == 0
    lines = lines_of(capsys)
    assert {line["route"] for line in lines} >= {"retrofit", "flex", "rearrange"}
    for line in lines:
        assert "missing" in line or line["refused"] == ""


def test_the_choice_of_blocks_has_a_share(capsys):
    small = ["--seq", "1024", "--heads", "1", "--dtype", "float32", "--rounds", "2", "--json"]
    assert mask_cost.main(small) == 0
    (line,) = lines_of(capsys)
    assert 0 < line["share"]["select_blocks"]["median"] < 1
    assert set(line["seconds"]) == {"select_blocks", "topk", "attend"}


def test_exact_is_timed_beside_dense(capsys):
    small = ["--seq", "65", "--heads", "2", "--rounds", "2", "--mask", "none,causal,padded"]
    assert exact.main([*small, "--json"]) == 0
    lines = lines_of(capsys)
    assert [line["mask"] for line in lines] == 2 * ["none", "causal", "padded"]
    for line in lines:
        assert set(line["seconds"]) == {"dense", "exact"}
        assert line["errors"]["exact"] < 2e-2
        assert line["speed"]["min"] > 0


def tiny_preset():
    return models.ModelPreset(
        build=lambda: tiny_models.make_sd15_unet(),
        inputs=lambda dtype: tiny_models.make_unet_inputs(),
        variants={"half": models._recipe("window", keep=0.5)},
    )


def test_whole_networks_are_timed_dense_and_patched(capsys, monkeypatch):
    monkeypatch.setattr(models, "PRESETS", {"tiny": tiny_preset()})
    monkeypatch.setitem(sys.modules, "tomesd", None)  # as if it were not installed
    assert models.main(["--preset", "tiny", "--rounds", "1", "--json", "--threads", "1"]) == 0
    lines = {line["route"]: line for line in lines_of(capsys)}
    assert set(lines) == {"dense", "half", models.TOMESD}
    assert lines["dense"]["speed"]["median"] == 1.0
    assert lines["half"]["speed"]["median"] > 0
    assert "not installed" in lines[models.TOMESD]["missing"]


def test_predictions_are_compared_with_measurements(capsys, monkeypatch):
    small = replace(windows.PRESETS["t3-small"], grid=(4, 8, 8), heads=1)
    monkeypatch.setattr(windows, "PRESETS", {"t3-small": small})
    tiny = planned.Planned(
        build=functools.partial(tiny_models.make_bert, 0),
        asked=AskedSize(tokens=48),
        variants={"half": ("window", {"keep": 0.5})},
    )
    monkeypatch.setattr(planned, "PRESETS", {"tiny": tiny})
    monkeypatch.setattr(quick, "SEQ_LEN", 1024)
    monkeypatch.setattr(quick, "KEEPS", (0.25,))
    presets = "t3-small,block-sparse,tiny"
    code = prediction.main(["--preset", presets, "--rounds", "1", "--json"])
    lines = lines_of(capsys)
    boxes, blocks = ["4x1x1", "1x4x4", "2x2x2"], ["blk64 keep=0.25", "blk128 keep=0.25"]
    expected = ["dense", *boxes, "dense", *blocks, "dense", "half"]
    assert [line["case"] for line in lines] == expected
    for line in lines:
        off = line["predicted_seconds"] / line["measured_seconds"] - 1
        assert line["off"] == pytest.approx(off)
        assert line["is_close"] == (abs(off) <= 0.25)
    checked = [*lines, *(line["memory"] for line in lines[-2:])]
    assert code == (0 if all(line["is_close"] for line in checked) else 1)
    assert all(line["predicted_peak_bytes"] > 0 for line in lines[-2:])


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (block_sparse.main, ["--dtype", "int8"], "can't read"),
        (block_sparse.main, ["--seq", "1024,2048", "--heads", "1,2,3"], "expected one number"),
        (block_sparse.main, ["--against", "everything"], "no everything"),
        (windows.main, ["--preset", "huge"], "huge"),
        (methods.main, ["--shrink", "0"], "expected 1 or more"),
        (mask_cost.main, ["--seq", "1000"], "multiples of 128"),
        (models.main, ["--preset", "sd9"], "sd9"),
        (prediction.main, ["--preset", "sd9"], "sd9"),
    ],
    ids=["dtype", "heads", "peer", "window", "shrink", "blocks", "model", "prediction"],
)
def test_wrong_options_are_one_line(main, arguments, message):
    with pytest.raises(common.WrongOptionError, match=message):
        main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said():
    with pytest.raises(common.WrongOptionError, match="PyTorch sees no GPU"):
        block_sparse.main(["--device", "cuda"])


def test_cpu_time_is_of_one_thread():
    assert common.read_clock("cpu", 1) is time.process_time
    assert common.read_clock("wall", 4) is time.perf_counter
    with pytest.raises(common.WrongOptionError, match="seconds of all 4 threads. Take --threads 1"):
        common.read_clock("cpu", 4)
