"""What a message tells users to do is done here, and helps."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
import typer.main
from diffusers.models import attention_processor as processors

import retrofit
from retrofit.commands import app
from retrofit.runtime.errors import AlreadyPatchedError, InputError, UnsupportedError
from tests import tiny_models, tiny_pipelines
from tests.checkpoint_fixtures import edit_manifest, patch_words
from tests.families.recording import DenseConfig

SOURCES = sorted((Path(__file__).resolve().parent.parent / "retrofit").rglob("*.py"))
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OTHERS = {"--upgrade", "--force-reinstall", "--index-url", "--gpus"}  # of pip and docker


def texts():
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{file.name}:{node.lineno}", node.value


def test_every_verb_and_option_that_a_text_names_exists():
    options = {name for verb in COMMANDS.values() for p in verb.params for name in p.opts}
    options |= OTHERS | {"--help", "--debug", "--version"}
    found = 0
    for where, text in texts():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+(?![\w{-])", text))
        assert named <= options, where
        verbs = set(re.findall(r"`retrofit ([a-z]\w+)", text))
        assert verbs <= set(COMMANDS), where
        found += len(named) + len(verbs)
    assert found > 100


def test_every_public_name_that_a_text_names_exists():
    named = [(where, n) for where, text in texts() for n in re.findall(r"`retrofit\.(\w+)`", text)]
    assert len(named) > 3
    assert all(hasattr(retrofit, name) or name == "json" for _, name in named)


def set_everywhere(network, processor):
    for module in network.modules():
        if isinstance(module, processors.Attention):
            module.set_processor(processor)


CALLS = {
    "default-processors": (
        tiny_models.make_sd15_unet,
        lambda network: network.set_default_attn_processor(),
        "set_attn_processor(AttnProcessor2_0())",
        lambda network: network.set_attn_processor(processors.AttnProcessor2_0()),
    ),
    "sliced": (
        tiny_models.make_sd15_unet,
        lambda network: network.set_attention_slice("max"),
        "set_attention_slice(None)",
        lambda network: network.set_attention_slice(None),
    ),
    "xformers": (
        tiny_models.make_sd15_unet,
        lambda network: set_everywhere(network, processors.XFormersAttnProcessor()),
        "disable_xformers_memory_efficient_attention()",
        lambda network: network.disable_xformers_memory_efficient_attention(),
    ),
    "xformers-joint": (
        tiny_models.make_sd35_medium,
        lambda network: set_everywhere(network, processors.XFormersJointAttnProcessor()),
        "set_attn_processor(JointAttnProcessor2_0())",
        lambda network: network.set_attn_processor(processors.JointAttnProcessor2_0()),
    ),
    "backend": (
        tiny_models.make_flux_dev,
        lambda network: [
            setattr(module.processor, "_attention_backend", "flash")
            for module in network.modules()
            if hasattr(module, "processor")
        ],
        'set_attention_backend("native")',
        lambda network: network.set_attention_backend("native"),
    ),
}
INPUTS = {
    tiny_models.make_sd15_unet: tiny_models.make_unet_inputs,
    tiny_models.make_sd35_medium: tiny_models.make_sd3_inputs,
    tiny_models.make_flux_dev: None,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_call_named_for_attention_out_of_reach_lets_it_be_patched(name):
    make, spoil, said, mend = CALLS[name]
    network, inputs = make(), INPUTS[make]
    dense = None if inputs is None else tiny_models.call_diffusers(network, inputs())
    spoil(network)
    with pytest.raises(UnsupportedError, match=re.escape(said)):
        retrofit.patch(network, DenseConfig())
    mend(network)
    with retrofit.patch(network, DenseConfig()):
        if inputs is not None:
            again = tiny_models.call_diffusers(network, inputs())
            torch.testing.assert_close(again, dense, rtol=1e-5, atol=1e-5)


def test_the_call_named_for_a_sliced_pipeline_lets_it_be_patched():
    pipeline = tiny_pipelines.make_sd_pipeline()
    pipeline.enable_attention_slicing()
    with pytest.raises(UnsupportedError, match=r"`disable_attention_slicing\(\)` on the pipeline"):
        retrofit.patch(pipeline, DenseConfig())
    pipeline.disable_attention_slicing()
    retrofit.patch(pipeline, DenseConfig())


@pytest.mark.parametrize("kind", ["IPAdapterAttnProcessor", "CustomDiffusionAttnProcessor"])
def test_the_processor_named_takes_the_weights_of_the_one_in_the_way(kind):
    network = tiny_models.make_sd15_unet()
    (path, attention) = next(
        (path, module) for path, module in network.named_modules() if path.endswith("attn2")
    )
    sizes = {"hidden_size": attention.inner_dim, "cross_attention_dim": tiny_models.TEXT_WIDTH}
    old = getattr(processors, kind)(**sizes)
    attention.set_processor(old)
    with pytest.raises(UnsupportedError, match=rf"{path}: .*put a {kind}2_0 with its weights"):
        retrofit.patch(network, DenseConfig())
    new = getattr(processors, f"{kind}2_0")(**sizes)
    new.load_state_dict(old.state_dict())
    attention.set_processor(new)
    retrofit.patch(network, DenseConfig())


def test_sites_leave_out_what_cant_be_reached_and_remove_frees_a_model():
    network = tiny_models.make_sd15_unet()
    path = next(path for path, _ in network.named_modules() if path.endswith("attn1"))
    network.get_submodule(path).set_processor(processors.AttnProcessor())
    with pytest.raises(UnsupportedError, match="leave the site out with `sites`"):
        retrofit.patch(network, DenseConfig())
    first = retrofit.patch(network, DenseConfig(), sites=[f"!{path}"])
    with pytest.raises(AlreadyPatchedError, match=r"Call `remove\(\)` on that patch first"):
        retrofit.patch(network, DenseConfig(), sites=[f"!{path}"])
    first.remove()
    retrofit.patch(network, DenseConfig(), sites=[f"!{path}"])


def test_a_bare_network_is_told_its_step():
    unet = tiny_models.make_sd15_unet()
    patch = retrofit.patch(unet, "hidiffusion")
    inputs = tiny_models.make_unet_inputs()
    with pytest.raises(Exception, match=r"call `patch.at_step\(i, n\)` before each call"):
        tiny_models.call_diffusers(unet, inputs)
    patch.at_step(0, 4)
    tiny_models.call_diffusers(unet, inputs)


def test_training_with_attention_dropout_is_switched_off_by_eval():
    model = tiny_models.make_minilm(attention_probs_dropout_prob=0.1).train()
    retrofit.patch(model, "block-sparse", keep=0.5, block_size=(16, 16))
    inputs = tiny_models.make_text_inputs(length=40)
    with pytest.raises(Exception, match=r"Call `model.eval\(\)`"):
        model(**inputs)
    model.eval()
    model(**inputs)


def test_a_model_without_files_is_saved_and_loaded_first(tmp_path):
    model = tiny_models.make_minilm()
    settings = {"keep": 0.5, "block_size": (16, 16)}
    retrofit.patch(model, "block-sparse", **settings)
    with pytest.raises(InputError, match="load it with `from_pretrained` and patch that"):
        retrofit.save(model, tmp_path / "out")
    retrofit.patch_of(model).remove()
    model.save_pretrained(tmp_path / "own")
    loaded = type(model).from_pretrained(tmp_path / "own").eval()
    retrofit.patch(loaded, "block-sparse", **settings)
    retrofit.save(loaded, tmp_path / "out")


def test_a_record_that_was_edited_is_replaced_in_another_folder(encoder, run_command, tmp_path):
    out = tmp_path / "out"
    assert run_command(*patch_words(encoder, out)).code == 0
    edit_manifest(out, lambda data: data.update(recipe={}), sign=False)
    line = run_command("verify", out).err
    assert "Run `retrofit patch` on the source again, into another folder." in line
    assert run_command(*patch_words(encoder, tmp_path / "other")).code == 0
    assert run_command("verify", tmp_path / "other").code == 0


def test_an_index_takes_the_metadata_that_it_lacks(run_command, tmp_path):
    model = tiny_models.make_minilm()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["metadata"]
    index.write_text(json.dumps(data))
    words = ("patch", tmp_path / "m", "-m", "block-sparse", "--set", "block_size=[16,16]")
    answer = run_command(*words, "-o", tmp_path / "out")
    assert (answer.code, 'Add "metadata": {} to it' in answer.err) == (2, True)
    index.write_text(json.dumps(data | {"metadata": {}}))
    assert run_command(*words, "-o", tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("words", "said", "fixed"),
    [
        (("--component", "unet"), "Leave `--component` out", ()),
        (("--device", "cpu:7"), "Use --device cpu", ("--device", "cpu")),
        (("--set", "sparsity=0.9"), "Say keep: keep=0.1", ("--set", "keep=0.1")),
        (("--set", "keep"), "as in --set keep=0.25", ("--set", "keep=0.25")),
    ],
)
def test_options_named_for_patch_are_taken(words, said, fixed, encoder, run_command, tmp_path):
    common = patch_words(encoder, tmp_path / "out")
    answer = run_command(*common, *words)
    assert (answer.code, said in answer.err) == (2, True), answer.err
    assert run_command(*common, *fixed).code == 0


def test_commands_named_at_the_end_of_lists_run(encoder, run_command):
    assert run_command("families").code == 0
    assert run_command("doctor").code in (0, 1)
    assert run_command("inspect", encoder).code == 0


def test_a_pipeline_takes_its_replaced_scheduler_again_after_a_load(pipeline, tmp_path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    retrofit.patch(pipe, "block-sparse", keep=0.5, block_size=(16, 16))
    with pytest.warns(UserWarning, match=r"Set it again after `retrofit.load`"):
        retrofit.save(pipe, tmp_path / "out")
    loaded = retrofit.load(tmp_path / "out")
    loaded.scheduler = diffusers.EulerDiscreteScheduler.from_config(loaded.scheduler.config)
    tiny_pipelines.call_sd_pipeline(loaded)


def test_a_wrapper_names_the_network_to_save(encoder, tmp_path):
    inner = transformers.BertModel.from_pretrained(encoder).eval()
    wrapper = torch.nn.Sequential(torch.nn.ModuleDict({"auto_model": inner}))
    wrapper.name_or_path = str(encoder)
    settings = {"keep": 0.5, "block_size": (16, 16)}
    handle = retrofit.patch(wrapper, "block-sparse", **settings)
    with pytest.raises(UnsupportedError, match=r"model.get_submodule\('0.auto_model'\)"):
        retrofit.save(wrapper, tmp_path / "out")
    handle.remove()
    network = wrapper.get_submodule("0.auto_model")
    retrofit.patch(network, "block-sparse", **settings)
    retrofit.save(network, tmp_path / "out")
