"""Every tensor of a LoRA or an IP-Adapter is placed, or the file is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands.test_generate import write_ip_adapter, write_lora

LAYER = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KOHYA = {
    f"lora_unet_{LAYER}.lora_down.weight": (2, 8),
    f"lora_unet_{LAYER}.lora_up.weight": (8, 2),
    f"lora_unet_{LAYER}.alpha": (),
}
QUICK = ("-p", "a cat", "--steps", "2")


def write(file, shapes):
    save_file({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, file)


def test_a_kohya_lora_with_its_alphas_is_placed(pipeline, run_command, tmp_path):
    write(tmp_path / "k.safetensors", KOHYA)
    words = ("generate", pipeline, *QUICK, "--lora", tmp_path / "k.safetensors")
    answer = run_command(*words, "-o", tmp_path / "a.png")
    assert answer.code == 0, answer.err
    assert "warning from" not in answer.err


@pytest.mark.parametrize(
    "more",
    [
        {f"lora_unet_{LAYER}.dora_scale": (8, 1)},
        {f"lora_unet_{LAYER}.hada_w1_a": (8, 2), f"lora_unet_{LAYER}.hada_w1_b": (2, 8)},
        {f"lora_unet_{LAYER}.lokr_w1": (2, 2)},
        {f"lora_unet_{LAYER}.diff_b": (8,)},
        {"lora_unet_nowhere.alpha": ()},
    ],
    ids=["dora", "loha", "lokr", "bias", "alpha-alone"],
)
def test_a_lora_with_tensors_that_would_be_left_out(more, pipeline, refused, tmp_path):
    write(tmp_path / "k.safetensors", KOHYA | more)
    words = ("generate", pipeline, *QUICK, "--lora", tmp_path / "k.safetensors")
    line = refused(*words, "-o", tmp_path / "a.png")
    assert "have no place in this checkpoint" in line or "does not fit this checkpoint" in line
    assert next(iter(more)) in line


def test_a_peft_lora_with_a_part_for_another_encoder(pipeline, refused, tmp_path):
    file = tmp_path / "p.safetensors"
    write_lora(pipeline, file)
    other = "text_encoder_2.layers.0.q_proj.lora_{}.weight"
    tensors = load_file(file) | {other.format(side): torch.ones(2, 2) for side in "AB"}
    save_file(tensors, file)
    line = refused("generate", pipeline, *QUICK, "--lora", file, "-o", tmp_path / "a.png")
    assert "2 of its tensors have no place in this checkpoint (text_encoder_2." in line


@pytest.mark.parametrize("name", ["ip_adapter.999.to_k_ip.weight", "extra.weight"])
def test_an_ip_adapter_with_more_than_this_network_takes(name, pipeline, refused, tmp_path):
    file = write_ip_adapter(tmp_path / "adapter")
    save_file(load_file(file) | {name: torch.ones(2, 2)}, file)
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "start.png")
    words = ("generate", pipeline, *QUICK, "--ip-adapter", file)
    line = refused(*words, "--ip-image", tmp_path / "start.png", "-o", tmp_path / "a.png")
    assert f"1 of its tensors have no place in this checkpoint ({name})" in line
