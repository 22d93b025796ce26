"""Checkpoints of quantised weights whose packages are not installed, and GGUF files."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from retrofit.artifact.origin import _holds_the_same
from tests.checkpoint_fixtures import patch_words

FORMATS = {
    "bitsandbytes": ({"load_in_8bit": True}, "bitsandbytes"),
    "gptq": ({"bits": 4, "group_size": 8}, "optimum gptqmodel"),
    "awq": ({"bits": 4, "group_size": 8}, "gptqmodel"),
    "quanto": ({"weights": "int8"}, "optimum-quanto"),
    "torchao": ({"quant_type": "int8_weight_only"}, "torchao"),
    "compressed-tensors": ({"format": "dense"}, "compressed-tensors"),
}


@pytest.mark.parametrize("verb", ["patch", "compare", "inspect"])
@pytest.mark.parametrize("method", FORMATS)
def test_a_package_that_is_missing_is_named_with_its_command(
    method, verb, encoder, copy_of, refused, run_command, tmp_path, monkeypatch
):
    find = importlib.util.find_spec
    settings, packages = FORMATS[method]
    modules = {name.replace("-", ".", 1) for name in packages.split()} | {"compressed_tensors"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in modules else find(name)
    )
    folder = copy_of(encoder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    words = {
        "patch": patch_words(folder, tmp_path / "out"),
        "compare": ("compare", folder, "-m", "block-sparse"),
        "inspect": ("inspect", folder),
    }[verb]
    if verb == "inspect":
        answer = run_command(*words)
        assert answer.code == 0, answer.err  # which needs the config alone
        return
    line = refused(*words)
    assert f"quantised ({method})" in line
    assert line.endswith(f"pip install {packages}")


def test_a_network_of_a_pipeline_whose_package_is_missing(pipeline, copy_of, refused, tmp_path):
    folder = copy_of(pipeline)
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("it is installed here")
    words = ("patch", folder, "-m", "hidiffusion", "-o", tmp_path / "out")
    for line in (
        refused(*words),
        refused("generate", folder, "-p", "a cat", "-o", tmp_path / "a.png"),
    ):
        assert "/unet: its weights are quantised (bitsandbytes)" in line
        assert line.endswith("pip install bitsandbytes")


def test_a_folder_of_a_gguf_file_is_told_how_to_unpack_it(encoder, copy_of, refused, tmp_path):
    folder = copy_of(encoder)
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".gguf"))
    line = refused(*patch_words(folder, tmp_path / "out"))
    assert "got only model.gguf" in line
    assert "gguf_file=" in line


def test_quantised_weights_are_compared_part_by_part():
    torchao = pytest.importorskip("torchao.quantization")
    config = torchao.Int8WeightOnlyConfig()
    layers = [torch.nn.Linear(32, 32) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        torchao.quantize_(layer, config)
    first, second = (layer.weight.detach() for layer in layers)
    assert _holds_the_same(first, second)
    other = torch.nn.Linear(32, 32)
    torchao.quantize_(other, config)
    assert not _holds_the_same(first, other.weight.detach())
    assert not _holds_the_same(first, torch.zeros(32, 32))
