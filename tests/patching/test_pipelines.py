"""Whole pipelines: the state follows their schedulers, and nothing of a run outlives it."""

from __future__ import annotations

import diffusers
import pytest
import torch

import retrofit
from retrofit.patching.schedulers import WATCHED
from tests.tiny_pipelines import (
    call_sd_pipeline,
    call_wan_pipeline,
    make_sd_pipeline,
    make_sdxl_pipeline,
    make_wan_pipeline,
)

HIDIFFUSION = {"min_scale": 0.0}
SCHEDULERS = [
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "LCMScheduler",
]


def use_scheduler(pipeline, name: str) -> None:
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)


def attributes(pipeline) -> dict[str, set[str]]:
    """Instance attributes of every module and of the scheduler."""
    found = {"scheduler": set(pipeline.scheduler.__dict__)}
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            for path, module in component.named_modules():
                found[f"{name}.{path}"] = {
                    *module.__dict__,
                    *(f"hook {key}" for key in module._forward_hooks),
                    *(f"pre-hook {key}" for key in module._forward_pre_hooks),
                }
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_patched_differs_repeats_and_comes_off_without_a_trace(name):
    pipeline = make_sd_pipeline()
    use_scheduler(pipeline, name)
    dense, before = call_sd_pipeline(pipeline), attributes(pipeline)
    patch = retrofit.patch(pipeline, "hidiffusion", **HIDIFFUSION)
    first = call_sd_pipeline(pipeline)
    torch.manual_seed(99)  # the global generator must not matter
    again = call_sd_pipeline(pipeline)
    assert torch.equal(first, again)
    assert not torch.allclose(first, dense, atol=1e-3)
    patch.remove()
    assert attributes(pipeline) == before
    assert torch.equal(call_sd_pipeline(pipeline), dense)


def test_a_patch_draws_nothing_from_the_global_generator():
    pipeline = make_sd_pipeline()
    with retrofit.patch(pipeline, "hidiffusion", **HIDIFFUSION):
        torch.manual_seed(5)
        call_sd_pipeline(pipeline)
        after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)


def test_another_seed_gives_other_shifts():
    pipeline, outputs = make_sd_pipeline(), []
    for seed in (0, 1):
        with retrofit.patch(pipeline, "hidiffusion", raunet=False, seed=seed):
            outputs.append(call_sd_pipeline(pipeline))
    assert not torch.allclose(*outputs, atol=1e-4)


def test_a_scheduler_replaced_after_patching_is_followed():
    pipeline = make_sd_pipeline()
    old = pipeline.scheduler
    with retrofit.patch(pipeline, "hidiffusion", **HIDIFFUSION):
        call_sd_pipeline(pipeline)
        use_scheduler(pipeline, "EulerDiscreteScheduler")
        late = call_sd_pipeline(pipeline)
        assert not set(WATCHED) & set(old.__dict__)
    fresh = make_sd_pipeline()
    use_scheduler(fresh, "EulerDiscreteScheduler")
    with retrofit.patch(fresh, "hidiffusion", **HIDIFFUSION):
        assert torch.equal(call_sd_pipeline(fresh), late)


def test_image_to_image_counts_from_where_it_begins():
    base = make_sd_pipeline()
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**base.components)
    steps = []
    with retrofit.patch(pipeline, "hidiffusion", **HIDIFFUSION) as patch:
        pipeline.unet.register_forward_pre_hook(lambda *_: steps.append(patch.state.step))
        pipeline(
            "a cat",
            image=torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
            strength=0.5,
            num_inference_steps=8,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    assert steps == [4, 5, 6, 7]


def test_an_interrupted_run_leaves_nothing_for_the_next():
    pipeline = make_sd_pipeline()
    with retrofit.patch(pipeline, "hidiffusion", **HIDIFFUSION):
        expected = call_sd_pipeline(pipeline)

        def interrupt(_pipeline, step, _timestep, values):
            if step == 1:
                raise KeyboardInterrupt
            return values

        with pytest.raises(KeyboardInterrupt):
            call_sd_pipeline(pipeline, callback_on_step_end=interrupt)
        assert torch.equal(call_sd_pipeline(pipeline), expected)


def test_a_batch_of_prompts_gives_each_its_own_picture():
    pipeline = make_sd_pipeline()
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    settings = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
    with retrofit.patch(pipeline, "hidiffusion", **HIDIFFUSION):
        both = pipeline(["a cat", "the dog"], generator=generator, **settings).images
        alone = pipeline("the dog", generator=torch.Generator().manual_seed(2), **settings).images
    torch.testing.assert_close(both[1], alone[0], atol=1e-4, rtol=1e-3)


def test_sdxl_is_patched_at_its_own_levels():
    pipeline = make_sdxl_pipeline()
    dense = call_sd_pipeline(pipeline)
    with retrofit.patch(pipeline, "hidiffusion", **HIDIFFUSION) as patch:
        assert all(".1." in path for path in patch.report.patched)
        assert not torch.allclose(call_sd_pipeline(pipeline), dense, atol=1e-3)
    assert torch.equal(call_sd_pipeline(pipeline), dense)


def test_at_the_training_size_only_the_windows_act():
    pipeline = make_sd_pipeline()  # latents of 16 x 16, its training size
    with retrofit.patch(pipeline, "hidiffusion"):
        both = call_sd_pipeline(pipeline)
    with retrofit.patch(pipeline, "hidiffusion", raunet=False):
        assert torch.equal(call_sd_pipeline(pipeline), both)


@pytest.mark.parametrize(
    "changes", [{}, {"two_stages": True}, {"ti2v": True}], ids=["2.1", "2.2", "ti2v"]
)
@pytest.mark.parametrize("cache_steps", [0, 2])
def test_wan_repeats_and_comes_off_without_a_trace(changes, cache_steps):
    pipeline = make_wan_pipeline(**changes)
    dense, before = call_wan_pipeline(pipeline), attributes(pipeline)
    settings = {"window_size": (3, 3), "cache_steps": cache_steps}
    patch = retrofit.patch(pipeline, "freeswim", **settings)
    first = call_wan_pipeline(pipeline)
    assert not patch.state.store  # nothing is kept after a run
    assert torch.equal(call_wan_pipeline(pipeline), first)
    assert not torch.allclose(first, dense, atol=1e-3)
    patch.remove()
    assert attributes(pipeline) == before
    assert torch.equal(call_wan_pipeline(pipeline), dense)


def test_wan_reuses_the_guided_cross_attention_between_guided_steps():
    pipeline = make_wan_pipeline()
    rows = []
    with retrofit.patch(pipeline, "freeswim", window_size=(3, 3), cache_steps=2) as patch:
        block = pipeline.transformer.blocks[0].attn1
        block.register_forward_pre_hook(
            lambda _, args, kwargs: rows.append(
                (patch.state.step, patch.state.branch, len((*args, *kwargs.values())[0]))
            ),
            with_kwargs=True,
        )
        call_wan_pipeline(pipeline)
    steps = sorted({step for step, _, _ in rows})
    conditional = [count for _, branch, count in rows if branch == "cond"]
    assert conditional == [2 if step % 2 == 0 else 1 for step in steps]
    assert all(count == 1 for _, branch, count in rows if branch == "uncond")
    assert {branch for _, branch, _ in rows} == {"cond", "uncond"}


def test_two_stages_keep_their_cross_attention_apart():
    pipeline = make_wan_pipeline(two_stages=True)
    with retrofit.patch(pipeline, "freeswim", window_size=(3, 3), cache_steps=4) as patch:
        seen = []
        for name in ("transformer", "transformer_2"):
            network = getattr(pipeline, name)
            network.proj_out.register_forward_hook(
                lambda *_, name=name: seen.append(
                    (name, {k.split("/")[0] for k in patch.state.store})
                )
            )
        call_wan_pipeline(pipeline)
    for name, networks in seen:
        assert name in networks
