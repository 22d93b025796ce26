"""Where a run stands, for schedulers of each kind, replaced and copied ones included."""

from __future__ import annotations

import copy
import inspect

import diffusers
import pytest
import torch

from retrofit.patching.schedulers import WATCHED, ScheduledState, nearest_step
from retrofit.runtime.errors import ConfigError

SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
]


def denoise(
    scheduler, state: ScheduledState, begin: int = 0, num_steps: int = 10
) -> list[int | None]:
    """Run a schedule as pipelines do; returns the step known at each call of the network."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps[begin:]
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    seen = []
    for timestep in timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(latents, timestep)
        seen.append(state.step)
        noise = torch.randn(latents.shape, generator=generator)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return seen


@pytest.mark.parametrize("begin", [0, 3], ids=["text-to-image", "image-to-image"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_step_is_right_at_every_call_of_the_network(name, begin):
    scheduler, state = getattr(diffusers, name)(), ScheduledState()
    state.follow(scheduler)
    for _ in range(2):  # a second run must not remember the first
        seen = denoise(scheduler, state, begin)
        assert seen == list(range(begin, len(scheduler.timesteps)))
        assert state.num_steps == len(scheduler.timesteps)
        assert state.step is None


def test_an_interrupted_run_leaves_nothing_for_the_next():
    scheduler, state = diffusers.DDIMScheduler(), ScheduledState()
    state.follow(scheduler)
    scheduler.set_timesteps(10)
    scheduler.scale_model_input(torch.zeros(1), scheduler.timesteps[4])
    state.store["kept"] = torch.ones(1)
    assert state.step == 4
    assert denoise(scheduler, state) == list(range(10))
    assert not state.store


def test_watching_keeps_signatures_and_letting_go_leaves_no_attribute():
    scheduler, state = diffusers.DDIMScheduler(), ScheduledState()
    before = set(scheduler.__dict__)
    signatures = {n: inspect.signature(getattr(scheduler, n)) for n in ("step", "set_timesteps")}
    state.follow(scheduler)
    assert "eta" in inspect.signature(scheduler.step).parameters
    assert {n: inspect.signature(getattr(scheduler, n)) for n in signatures} == signatures
    state.unfollow()
    assert set(scheduler.__dict__) == before


def test_a_replaced_scheduler_is_followed_and_the_old_one_let_go():
    class Pipeline:
        scheduler = diffusers.DDIMScheduler()

    pipeline, state = Pipeline(), ScheduledState()
    state.attach(pipeline)
    old = pipeline.scheduler
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(old.config)
    state.keep_up()
    assert state.follows(pipeline.scheduler)
    assert not set(WATCHED) & set(old.__dict__)
    assert denoise(pipeline.scheduler, state) == list(range(10))


def test_a_copied_scheduler_steps_itself_and_not_the_original():
    scheduler, state = diffusers.EulerDiscreteScheduler(), ScheduledState()
    state.follow(scheduler)
    twin = copy.deepcopy(scheduler)
    denoise(twin, ScheduledState())
    assert scheduler._step_index is None
    assert state.step is None


def test_schedules_run_at_every_step_and_branch_and_only_then():
    scheduler, state = diffusers.DDIMScheduler(), ScheduledState()
    calls = []
    state.schedules.append(lambda s: calls.append((s.step, s.branch)) or {"phase": s.step // 5})
    state.follow(scheduler)
    state.enter_branch("uncond")  # outside a run: nothing to derive from
    assert calls == []
    scheduler.set_timesteps(10)
    assert state.values == {"known": 1, "phase": 0}
    scheduler.scale_model_input(torch.zeros(1), scheduler.timesteps[7])
    assert state.values == {"known": 1, "phase": 1}
    state.enter_branch("uncond")
    assert calls[-1] == (7, "uncond")


@pytest.mark.parametrize(("step", "num_steps"), [(-1, 4), (4, 4), (0, 0)])
def test_a_step_outside_the_run_is_refused(step, num_steps):
    with pytest.raises(ConfigError, match=f"got step {step} of {num_steps}"):
        ScheduledState().at_step(step, num_steps)


def test_a_timestep_that_stands_twice_is_found_going_forward():
    timesteps = torch.tensor([900.0, 700.0, 700.0, 500.0])
    assert nearest_step(timesteps, 700.0) == 1
    assert nearest_step(timesteps, 700.0, at_least=2) == 2
    assert nearest_step(timesteps, 512.0) == 3
