"""VGGT and Pi3 checkpoints wherever a command takes a MODEL: folder, file and hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import retrofit
from retrofit.architectures.pi3 import Pi3
from retrofit.architectures.recognition import recognise_config, recognise_tensors
from retrofit.architectures.vggt import VGGT
from retrofit.checkpoints import find_checkpoint, hub
from retrofit.checkpoints.read_past import summarise, tensors_read_past
from retrofit.runtime.errors import CheckpointError, InputError
from tests.architectures.small_networks import PI3_CONFIG, VGGT_CONFIG, small_pi3, small_vggt
from tests.checkpoint_fixtures import contents

BLOCKS = {"block_size": (16, 16), "keep": 0.25}
PATCH = ("--method", "block-sparse", "--set", "block_size=[16,16]", "--set", "keep=0.25")
NETWORKS = ("vggt", "pi3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each network."""
    root = tmp_path_factory.mktemp("networks")
    made = {"vggt": small_vggt(), "pi3": small_pi3()}
    for name, model in made.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in made}


def _images(frames: int = 3) -> torch.Tensor:
    return torch.rand(1, frames, 3, 112, 126, generator=torch.Generator().manual_seed(5))


def _run(model: VGGT | Pi3) -> torch.Tensor:
    """The last layer's tokens through the heads: the points, or the depth."""
    with torch.inference_mode():
        out = model(_images())
    return torch.cat([out[name].flatten() for name in sorted(out) if torch.is_tensor(out[name])])


def _load(name: str, folder: Path) -> VGGT | Pi3:
    return {"vggt": VGGT, "pi3": Pi3}[name].from_pretrained(folder)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folder_is_found_under_its_own_class(folders, name: str) -> None:
    checkpoint = find_checkpoint(folders[name])
    assert checkpoint.layout == "retrofit"
    assert checkpoint.classes[""][1].lower() == name


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"img_size": 518, "patch_size": 14, "embed_dim": 1024}, "VGGT"),
        ({"enable_track": False}, "VGGT"),
        ({"model_type": "vggt", "aggregator": {}}, "VGGT"),
        ({"pos_type": "rope100", "decoder_size": "large"}, "Pi3"),
        ({"model_type": "pi3", **PI3_CONFIG}, "Pi3"),
        ({"model_type": "bert", "decoder_size": 3}, None),
        ({"_class_name": "UNet", "img_size": 1, "patch_size": 2, "embed_dim": 3}, None),
        ({"architectures": ["Dino"], "img_size": 1, "patch_size": 2, "embed_dim": 3}, None),
        ({}, None),
    ],
)
def test_a_config_is_recognised(config, expected) -> None:
    assert recognise_config(config) == expected


def test_tensors_are_recognised_by_their_names() -> None:
    assert recognise_tensors(small_vggt().state_dict()) == "VGGT"
    assert recognise_tensors(small_pi3().state_dict()) == "Pi3"
    assert recognise_tensors(torch.nn.Linear(2, 2).state_dict()) is None


@pytest.mark.parametrize("name", NETWORKS)
def test_patch_verify_reload_and_unpatch(folders, name, run_command, tmp_path) -> None:
    source, out, back = folders[name], tmp_path / "sparse", tmp_path / "back"
    dense = _run(_load(name, source))
    answer = run_command("patch", source, *PATCH, "-o", out)
    assert answer.code == 0, answer.err
    verified = run_command("verify", out)
    assert verified.code == 0, verified.err
    patched = _run(retrofit.load(out))
    assert not torch.allclose(patched, dense, atol=1e-3)
    assert torch.equal(_run(_load(name, out)), dense)  # without retrofit's record it is dense
    assert run_command("unpatch", out, "-o", back).code == 0
    assert contents(back) == contents(source)


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_and_reloaded_in_a_fresh_process_then_removed(folders, name, tmp_path) -> None:
    model = _load(name, folders[name])
    dense = _run(model)
    retrofit.patch(model, "block-sparse", **BLOCKS)
    retrofit.save(model, tmp_path / "saved")
    save_file({"patched": _run(model), "dense": dense}, tmp_path / "expected.safetensors")
    code = f"""
import torch, retrofit
from safetensors.torch import load_file
from tests.architectures.test_as_model import _run
expected = load_file({str(tmp_path / "expected.safetensors")!r})
model = retrofit.load({str(tmp_path / "saved")!r})
assert torch.equal(_run(model), expected["patched"])
retrofit.patch_of(model).remove()
assert torch.equal(_run(model), expected["dense"])
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=_root())
    assert done.stdout.strip() == "same", done.stderr


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def test_weights_that_changed_are_not_saved(folders, tmp_path) -> None:
    model = _load("vggt", folders["vggt"])
    retrofit.patch(model, "block-sparse", **BLOCKS)
    with torch.no_grad():
        model.aggregator.camera_token.add_(1)
    with pytest.raises(InputError, match="changed since it was loaded"):
        retrofit.save(model, tmp_path / "saved")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_lone_file_of_the_public_sizes_is_known_by_its_tensors(
    folders, name, tmp_path, monkeypatch, run_command
) -> None:
    config = json.loads((folders[name] / "config.json").read_text())
    lone = tmp_path / "anything.safetensors"
    lone.write_bytes((folders[name] / "model.safetensors").read_bytes())
    assert find_checkpoint(lone).layout == "single-file"
    given = find_checkpoint(lone, config=str(folders[name]))
    assert given.config("") == config
    out = tmp_path / "sparse"
    answer = run_command("patch", lone, "--config", folders[name], *PATCH, "-o", out)
    assert answer.code == 0, answer.err
    assert run_command("verify", out).code == 0
    patched = _run(retrofit.load(out))
    assert not torch.allclose(patched, _run(_load(name, folders[name])), atol=1e-3)


def test_a_lone_file_whose_sizes_are_not_public_is_refused_in_one_line(
    folders, tmp_path, run_command
) -> None:
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes((folders["vggt"] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="expected the .* tensors of its config"):
        VGGT.from_pretrained(lone)


def test_a_folder_without_a_config_is_known_by_its_tensors(folders, tmp_path) -> None:
    weights = (folders["pi3"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert find_checkpoint(tmp_path).classes == {"": ("retrofit", "Pi3")}
    assert find_checkpoint(tmp_path).config("") == {}


def test_a_hub_id_is_fetched_with_the_usual_calls(folders, monkeypatch) -> None:
    asked: list[tuple[str, ...]] = []

    def fetch(repo, patterns, **more):
        assert repo == "facebook/VGGT-1B"
        asked.append(tuple(patterns))
        return folders["vggt"]

    monkeypatch.setattr(hub, "fetch", fetch)
    assert find_checkpoint("facebook/VGGT-1B").classes == {"": ("retrofit", "VGGT")}
    assert asked[0] == hub.CONFIGS
    assert "*.safetensors" in asked[1]


def test_inspect_names_the_tensors_that_are_read_past(folders, tmp_path, run_command) -> None:
    tracked = {"track_head.tracker.corr_mlp.fc1.weight": torch.zeros(2, 2)}
    tracked["track_head.feature_extractor.norm.weight"] = torch.zeros(2)
    weights = load_file(folders["vggt"] / "model.safetensors") | tracked
    (tmp_path / "config.json").write_text(json.dumps(VGGT_CONFIG))
    save_file(weights, tmp_path / "model.safetensors")
    answer = run_command("inspect", tmp_path, "--size", "70x56", "--frames", "3")
    assert answer.code == 0, answer.err
    assert "track_head.* (2 tensors)" in answer.out
    listed = run_command("inspect", tmp_path, "--size", "70x56", "--json").json
    assert listed["tensors_read_past"] == sorted(tracked)
    assert VGGT.from_pretrained(tmp_path).ignored_keys == tuple(sorted(tracked))


def test_what_is_read_past_is_said_before_weights_are_fetched(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"img_size": 518, "patch_size": 14, "embed_dim": 1024}')
    names = tensors_read_past(find_checkpoint(tmp_path))
    assert names == ["track_head.*"]
    assert summarise(names) == "track_head.*"


def test_a_head_that_the_config_turns_off_is_read_past(folders, tmp_path) -> None:
    config = {name: part for name, part in VGGT_CONFIG.items() if name != "point_head"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(folders["vggt"] / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    expected = sorted(name for name in weights if name.startswith("point_head."))
    assert tensors_read_past(find_checkpoint(tmp_path)) == expected
    assert VGGT.from_pretrained(tmp_path).ignored_keys == tuple(expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_compare_runs_on_views(folders, name, run_command) -> None:
    answer = run_command(
        "compare", folders[name], *PATCH, "--size", "112x112", "--frames", "3",
        "--rounds", "1", "--num-inputs", "1", "--no-memory", "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    (variant,) = answer.json["variants"]
    assert 0.25 <= variant["keep_measured"] < 0.6
