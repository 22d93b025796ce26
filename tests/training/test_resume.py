"""Runs that are stopped, gone on with, spread over processes, or that go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from retrofit.checkpoints import find_checkpoint
from retrofit.runtime.errors import InputError, StoppedError, TrainingError
from retrofit.training import Running, finetune, plan_finetune, read_request

SMALL = {"steps": 5, "batch": 4, "held_out": 8, "validate_every": 2, "lr": 1e-3, "size": [32, 32]}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def train(pipeline, pictures, tmp_path):
    """Fine-tune the tiny pipeline in this process; gives what was written."""

    def run(name, report=None, resume=False, **more):
        request = read_request({**SMALL, "data": str(pictures), **more})
        plan = plan_finetune(find_checkpoint(str(pipeline)), "window", request, keep=0.3)
        running = Running(resume=resume, **({} if report is None else {"report": report}))
        finetune(plan, request, tmp_path / name, running)
        return load_file(tmp_path / name / WEIGHTS)

    return run


def stop_after(step):
    def report(what, done, total):
        if what == "training" and done == step:
            raise KeyboardInterrupt

    return report


def losses(log):
    entries = map(json.loads, log.read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize("more", [{}, {"ema": 0.5, "grad_accum": 2}])
def test_a_run_that_was_stopped_twice_ends_like_one_that_was_not(train, more):
    whole = train("whole", **more)
    for step in (1, 4):
        with pytest.raises(StoppedError, match=f"after step {step} of 5"):
            train("parts", stop_after(step), resume=step > 1, **more)
    parts = train("parts", resume=True, **more)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_state_and_says_how_to_go_on(
    number, code, run_command, pipeline, pictures, tmp_path, monkeypatch
):
    from retrofit.training import loop

    def rate(request, step):
        if step == 2:
            signal.raise_signal(number)
        return 1e-3

    monkeypatch.setattr(loop, "learning_rate", rate)
    words = [f"{name}={value}" for name, value in {**SMALL, "size": "32x32"}.items()]
    options = ["-m", "window", "--data", pictures, "-o", tmp_path / "out"]
    answer = run_command("finetune", pipeline, *words, *options)
    assert answer.code == code, answer
    assert "stopped by a signal after step 2 of 5" in answer.err.splitlines()[-1]
    assert (tmp_path / "out-training" / "step-0000002").is_dir()
    monkeypatch.setattr(loop, "learning_rate", lambda request, step: 1e-3)
    assert run_command("finetune", pipeline, *words, *options, "--resume").code == 0


def test_a_run_is_not_gone_on_with_by_accident_nor_with_other_settings(train, tmp_path):
    with pytest.raises(StoppedError):
        train("out", stop_after(3))
    with pytest.raises(InputError, match="holds an earlier run. Go on with --resume"):
        train("out")
    with pytest.raises(InputError, match=r"other settings: lr \(0.001, now 0.002\)"):
        train("out", resume=True, lr=2e-3)
    assert not (tmp_path / "out").exists()


def test_a_run_that_makes_it_worse_stops_and_keeps_its_last_good_state(train, tmp_path):
    with pytest.raises(TrainingError, match=r"last good state is .*step-0000001. Lower --lr"):
        train("out", steps=40, validate_every=2, save_every=1, lr=5.0, keep_states=9, warmup=0)
    assert not (tmp_path / "out").exists()


def test_few_states_are_kept(train, tmp_path):
    train("out", steps=6, save_every=1)
    assert len(list((tmp_path / "out-training").glob("step-*"))) == 2


def test_two_processes_learn_what_one_does(train, pipeline, pictures, tmp_path):
    small = {**SMALL, "lr": 1e-5}  # a larger one magnifies rounding
    one = train("one", lr=1e-5)
    words = [f"{name}={value}" for name, value in {**small, "size": "32x32"}.items()]
    command = ["finetune", str(pipeline), *words, "-m", "window", "--set", "keep=0.3"]
    command += ["--data", str(pictures), "-o", str(tmp_path / "two"), "--num-processes", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "retrofit", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    before, two = load_file(pipeline / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    moved = [torch.cat([(x[n] - before[n]).flatten() for n in before]) for x in (one, two)]
    assert torch.cosine_similarity(*moved, dim=0) > 0.99  # half of a batch alone gives other steps
    losses_of = [losses(tmp_path / f"{name}-training" / "log.jsonl") for name in ("one", "two")]
    assert len(losses_of[0]) == 5
    assert losses_of[1] == pytest.approx(losses_of[0], rel=1e-5)
