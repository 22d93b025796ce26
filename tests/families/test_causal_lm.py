"""Language models: every architecture's calls are reached, and nothing of the output changes."""

from __future__ import annotations

import pytest
import torch
import transformers

import retrofit
from retrofit.families import find_family
from retrofit.methods.exact import ExactConfig
from retrofit.runtime.errors import UnsupportedError
from tests.tiny_models import fill_randomly

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
MORE = {
    "Mistral": {"sliding_window": 20},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "Gemma3": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Qwen3Moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    "Cohere": {"eos_token_id": 1, "bos_token_id": 2},
}
ARCHITECTURES = (
    *("Llama", "Qwen2", "Qwen3", "Mistral", "Phi3", "Gemma", "Gemma3", "Mixtral", "Qwen3Moe"),
    *("Olmo2", "SmolLM3", "StableLm", "Starcoder2", "Granite", "Cohere"),
)


def make_model(name, **changes):
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**SMALL, **MORE.get(name, {}), **changes})
    torch.manual_seed(0)
    return fill_randomly(getattr(transformers, f"{name}ForCausalLM")(config))


def draw_ids(rows=1, length=61):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def patched(model):
    return retrofit.patch(model, ExactConfig(min_tokens=1))


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_patched_model_is_the_dense_one(name):
    model = make_model(name)
    ids = draw_ids(2)
    left = torch.ones_like(ids)
    left[1, :17] = 0
    calls = {
        "plain": {"input_ids": ids},
        "left padding": {"input_ids": ids, "attention_mask": left},
        "right padding": {"input_ids": ids, "attention_mask": left.flip(1)},
        "without a cache": {"input_ids": ids, "use_cache": False},
    }
    dense = {told: model(**call).logits for told, call in calls.items()}
    with patched(model) as patch:
        assert len(patch.report.patched) == 2
        for told, call in calls.items():
            real = call.get("attention_mask", torch.ones_like(ids)).bool()
            found = model(**call).logits
            assert torch.allclose(found[real], dense[told][real], atol=5e-5), told
        assert not patch.changes_nothing()
    assert torch.equal(model(input_ids=ids).logits, dense["plain"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3"])
def test_generation_is_the_dense_model_s(name):
    model = make_model(name)
    ids = draw_ids(2, 33)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    ways = ({}, {"cache_implementation": "static"}, {"num_beams": 2}, {"prefill_chunk_size": 16})
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    dense = [model.generate(ids, **given, **way) for way in ways]
    with patched(model):
        for way, wanted in zip(ways, dense, strict=True):
            assert torch.equal(model.generate(ids, **given, **way), wanted), way


def test_methods_without_a_causal_form_are_refused_by_name():
    model = make_model("Llama")
    with pytest.raises(UnsupportedError, match="it has no causal form.* Methods that do: exact"):
        retrofit.patch(model, "block-sparse")


def test_attention_that_is_not_pytorch_s_is_refused_with_its_reason():
    model = make_model("Gemma2", attn_implementation="eager")
    with pytest.raises(UnsupportedError, match="softcapping"):
        retrofit.patch(model, "exact")
    eager = make_model("Llama", attn_implementation="eager")
    with pytest.raises(UnsupportedError, match="set_attn_implementation"):
        retrofit.patch(eager, "exact")


@pytest.mark.parametrize("name", ["Phi", "GPTNeoX", "Falcon"])
def test_other_architectures_are_not_taken_for_it(name):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.device("meta"):
        assert find_family(getattr(transformers, f"{name}ForCausalLM")(config)) is None


def test_a_checkpoint_is_patched_verified_and_undone(run_command, tmp_path):
    source = tmp_path / "llama"
    make_model("Llama").save_pretrained(source)
    out, back = tmp_path / "out", tmp_path / "back"
    assert run_command("patch", source, "-m", "exact", "-o", out).code == 0
    assert run_command("verify", out).code == 0
    assert retrofit.patch_of(retrofit.load(out)).report.families == ("causal-lm",)
    assert run_command("unpatch", out, "-o", back).code == 0
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    found = run_command("inspect", source, "--tokens", 400, "--json").json["networks"][0]
    work = sum(site["flops"] for site in found["sites"])
    assert work == 2 * 4 * (400 * 401 // 2) * 2 * (8 + 8)
