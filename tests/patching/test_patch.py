"""One handle over everything: what composes with a patch, in either order, and what it shows."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import time

import pytest
import torch

import retrofit
from retrofit.runtime.errors import (
    ConfigError,
    RetrofitError,
    UnsupportedError,
)
from tests.tiny_models import (
    FAMILY_MODELS,
    make_bert,
    make_controlnet,
    make_controlnet_inputs,
    make_padded_text_inputs,
    make_sd15_unet,
    make_sdxl_unet,
    make_unet_inputs,
    make_wan,
)

HIDIFFUSION = {"min_scale": 0.0, "windows": True}


def run(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def patched_unet(**settings):
    model = make_sd15_unet()
    patch = retrofit.patch(model, "hidiffusion", **{**HIDIFFUSION, **settings})
    patch.at_step(0, 10)
    return model, patch


def make_shallow_unet():
    """Two levels and one layer each: enough for every part of a patch, quick to compile."""
    return make_sd15_unet(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


@pytest.fixture
def inputs():
    return make_unet_inputs(batch=2)


def add_lora(model) -> None:
    from peft import LoraConfig

    torch.manual_seed(3)
    targets = ["to_q", "to_v", "conv", "proj_in"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


# -- composition, in either order ---------------------------------------------------------------


def cast_layerwise(model) -> None:
    model.enable_layerwise_casting(
        storage_dtype=torch.float16, compute_dtype=torch.float32, skip_modules_pattern=("norm",)
    )


def offload_sequentially(model) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


def offload_in_groups(model) -> None:
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


@pytest.mark.parametrize(
    "change",
    [add_lora, cast_layerwise, offload_sequentially, offload_in_groups],
    ids=lambda f: f.__name__,
)
def test_the_order_of_patching_and_of_another_change_does_not_matter(inputs, change):
    dense = run(make_sd15_unet(), inputs)
    outputs = []
    for patch_first in (True, False):
        model = make_sd15_unet()
        if not patch_first:
            change(model)
        patch = retrofit.patch(model, "hidiffusion", **HIDIFFUSION)
        if patch_first:
            change(model)
        patch.at_step(0, 10)
        outputs.append(run(model, inputs))
        patch.remove()
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], dense, atol=1e-3)


def test_a_lora_on_the_strided_convolution_equals_its_merged_weights(inputs):
    """In float64: in float32 the two round differently, and the network makes that larger."""
    inputs = {
        name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    model = make_sd15_unet().double()
    add_lora(model)
    merged = make_sd15_unet().double()
    add_lora(merged)
    for module in merged.modules():
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()
    outputs = []
    for network in (model, merged):
        with retrofit.patch(network, "hidiffusion", **HIDIFFUSION) as patch:
            patch.at_step(0, 10)
            outputs.append(run(network, inputs))
    torch.testing.assert_close(*outputs, atol=1e-10, rtol=1e-10)


def test_deleting_a_lora_under_a_patch_gives_the_patched_base(inputs):
    model, _ = patched_unet()
    expected = run(model, inputs)
    add_lora(model)
    assert not torch.allclose(run(model, inputs), expected, atol=1e-4)
    model.delete_adapters("default")
    torch.testing.assert_close(run(model, inputs), expected)


def test_autocast_casts_queries_keys_and_values_alike(inputs):
    errors = []
    for model in (make_sd15_unet(), patched_unet()[0]):
        expected = run(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(model, inputs)
        errors.append(float((out.float() - expected).norm() / expected.norm()))
    assert 0 < errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(inputs, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model, _ = patched_unet()
        if checkpointing:
            from functools import partial

            from torch.utils.checkpoint import checkpoint

            model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=use_reentrant))
        model.train()
        sample = inputs["sample"].clone().requires_grad_()
        model(**{**inputs, "sample": sample}, return_dict=False)[0].square().sum().backward()
        weights = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
        gradients.append((sample.grad, weights.grad))
    for plain, checkpointed in zip(*gradients, strict=True):
        # the reentrant kind sums gradients in another order
        bound = 1e-4 * float(plain.abs().max()) if use_reentrant else 0.0
        torch.testing.assert_close(plain, checkpointed, atol=bound, rtol=0.0)


def test_fused_projections_after_patching_give_the_same_output(inputs):
    model, _ = patched_unet()
    expected = run(model, inputs)
    for module in model.modules():
        if hasattr(module, "fuse_projections") and hasattr(module, "to_q"):
            module.fuse_projections()
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compile_first", [True, False])
def test_compile_follows_the_phases_of_a_run(inputs, compile_first):
    import torch._dynamo.utils as dynamo

    torch.compiler.reset()
    model = make_shallow_unet()
    if compile_first:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        run(compiled, inputs)
    patch = retrofit.patch(model, "hidiffusion", **HIDIFFUSION)
    if not compile_first:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = dynamo.counters["stats"]["unique_graphs"]
    for step in range(10):
        patch.at_step(step, 10)
        torch.testing.assert_close(run(compiled, inputs), run(model, inputs), atol=1e-4, rtol=1e-3)
    # two phases, and one graph more when the shifts are first seen to change
    assert dynamo.counters["stats"]["unique_graphs"] - before <= 4


def test_a_compiled_target_is_patched_underneath(inputs):
    torch.compiler.reset()
    model = make_shallow_unet()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    patch = retrofit.patch(compiled, "hidiffusion", **HIDIFFUSION)
    patch.at_step(0, 10)
    assert all("_orig_mod" not in path for path in patch.report.patched)
    torch.testing.assert_close(run(compiled, inputs), run(model, inputs), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("strict", [True, False])
def test_export_carries_the_patch(inputs, strict):
    model = make_shallow_unet()
    retrofit.patch(model, "hidiffusion", **HIDIFFUSION).at_step(0, 10)
    names = tuple(inputs)
    program = torch.export.export(model, (), {**inputs, "return_dict": False}, strict=strict)
    out = program.module()(**{name: inputs[name] for name in names}, return_dict=False)[0]
    torch.testing.assert_close(out, run(model, inputs), atol=1e-4, rtol=1e-3)


# -- copies, threads, interrupts ----------------------------------------------------------------


def test_a_copy_is_patched_and_independent(inputs):
    model, patch = patched_unet()
    expected = run(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, inputs), expected)
    patch.remove()
    assert torch.equal(run(twin, inputs), expected)
    assert not torch.allclose(run(model, inputs), expected, atol=1e-3)


def test_pickle_keeps_a_model_patched(inputs):
    model, _ = patched_unet()
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    assert torch.equal(run(pickle.loads(buffer.getvalue()), inputs), run(model, inputs))


def test_two_threads_in_one_model_are_an_error_and_two_models_are_fine(inputs):
    model, patch = patched_unet()
    entered, errors = threading.Event(), []
    model.conv_out.register_forward_hook(lambda *_: entered.set() or time.sleep(0.5))
    thread = threading.Thread(target=run, args=(model, inputs))
    thread.start()
    entered.wait(10)
    with pytest.raises(RetrofitError, match="serves one call at a time"):
        run(model, inputs)
    thread.join()
    models = [patched_unet()[0] for _ in range(2)]
    expected = run(models[0], inputs)

    def check(network) -> None:
        for _ in range(5):
            if not torch.equal(run(network, inputs), expected):
                errors.append(network)

    threads = [threading.Thread(target=check, args=(network,)) for network in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    patch.remove()


def test_ctrl_c_inside_a_forward_leaves_the_model_usable(inputs):
    model, patch = patched_unet()
    expected = run(model, inputs)

    def interrupt(*_):
        raise KeyboardInterrupt

    attention = model.up_blocks[3].attentions[1].transformer_blocks[0].attn1
    hook = attention.to_v.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, inputs)
    hook.remove()
    assert torch.equal(run(model, inputs), expected)
    patch.remove()
    assert torch.equal(run(model, inputs), run(make_sd15_unet(), inputs))


def test_two_sizes_in_one_model_one_after_the_other_are_both_right():
    model, _ = patched_unet()
    small, odd = make_unet_inputs(), make_unet_inputs(odd=True)
    alone = []
    for one in (small, odd):
        fresh, _ = patched_unet()
        alone.append(run(fresh, one))
    assert torch.equal(run(model, small), alone[0])
    assert torch.equal(run(model, odd), alone[1])
    assert torch.equal(run(model, small), alone[0])


# -- ControlNet ---------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_controlnet", [True, False])
@pytest.mark.parametrize("odd", [True, False])
def test_a_controlnets_residuals_fit_whether_it_is_patched_or_not(patch_controlnet, odd):
    unet, controlnet = make_sd15_unet(), make_controlnet()
    unet_patch = retrofit.patch(unet, "hidiffusion", **HIDIFFUSION, second_steps=(0.3, 0.3))
    unet_patch.at_step(0, 10)
    if patch_controlnet:
        # a ControlNet's config has no training size of its own
        from retrofit.families.unet2d import describe

        assert describe(controlnet).sample_size is None
        with pytest.raises(UnsupportedError, match="training size"):
            retrofit.patch(controlnet, "hidiffusion")
        patch = retrofit.patch(controlnet, "hidiffusion", raunet=False)
        patch.at_step(0, 10)
    control = make_controlnet_inputs(odd=odd)
    with torch.no_grad():
        down, middle = controlnet(**control, return_dict=False)
    inputs = make_unet_inputs(odd=odd)
    out = run(
        unet,
        {
            **inputs,
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": middle,
        },
    )
    assert out.shape == inputs["sample"].shape
    assert not torch.allclose(out, run(unet, inputs), atol=1e-4)


# -- pipelines ----------------------------------------------------------------------------------


def test_guidance_branches_reach_the_state_through_the_cache_context():
    model = make_wan()
    patch = retrofit.patch(model, "freeswim", window_size=(3, 3))
    patch.at_step(0, 4)
    with model.cache_context("uncond"):
        assert patch.state.branch == "uncond"
    with model.cache_context("cond"):
        assert patch.state.branch == "cond"
    patch.remove()
    assert "cache_context" not in model.__dict__


def test_without_a_known_step_a_method_that_needs_it_refuses(inputs):
    model = make_sd15_unet()
    retrofit.patch(model, "hidiffusion", **HIDIFFUSION)
    with pytest.raises(RetrofitError, match=r"hidiffusion must know the denoising step.*at_step"):
        run(model, inputs)


# -- what it shows -------------------------------------------------------------------------------


def test_importing_retrofit_changes_nothing_and_loads_no_framework():
    import subprocess
    import sys

    code = "import sys, retrofit; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_handle_shows_its_method_sites_and_model():
    model = make_bert()
    patch = retrofit.patch(model, "window", sites="encoder.layer.0.*")
    shown = f"window: patched 1 of {len(model.encoder.layer)} attention sites of BertModel"
    assert repr(patch) == f"<Patch {shown}>"
    assert repr(retrofit.patch_of(model)) == repr(patch)
    patch.remove()
    assert repr(patch) == f"<Patch {shown}, removed>"


def test_the_report_counts_every_site_once():
    model = make_sdxl_unet()
    patch = retrofit.patch(model, "hidiffusion")
    total = len(patch.report.patched) + len(patch.report.skipped)
    assert total == sum(1 for name, _ in model.named_modules() if name.endswith(("attn1", "attn2")))
    assert {skip.reason for skip in patch.report.skipped} == {
        "cross attention",
        "below the top resolution",
    }
    assert all("attn1" in path for path in patch.report.patched)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_family_is_found_by_its_structure(name):
    from retrofit.families import find_family

    row = FAMILY_MODELS[name]
    assert find_family(row.make_model()).name == row.family


def test_padding_reaches_the_operator():
    model = make_bert()
    inputs = make_padded_text_inputs()
    with retrofit.patch(model, "window", window_size=512):
        out = model(**inputs).last_hidden_state
    rows = inputs["attention_mask"].bool()
    expected = model(**inputs).last_hidden_state
    torch.testing.assert_close(out[rows], expected[rows], atol=1e-5, rtol=1e-4)


# -- what it takes ---------------------------------------------------------------------------


def test_one_site_glob_may_be_a_string():
    model = make_bert()
    patch = retrofit.patch(model, "window", sites="encoder.layer.0.*")
    assert [path.split(".")[2] for path in patch.report.patched] == ["0"]


@pytest.mark.parametrize("what", [None, 3])
def test_something_that_is_no_method_is_refused(what):
    with pytest.raises(ConfigError, match="a method's name, its config or a recipe.*window"):
        retrofit.patch(make_bert(), what)


def test_new_settings_do_not_keep_a_description_of_the_old_ones():
    model = make_bert()
    assert retrofit.patch(model, "block-sparse").recipe.description
    assert not retrofit.patch(make_bert(), "block-sparse", keep=0.9).recipe.description
