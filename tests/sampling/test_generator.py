"""The parts of generation that the command's tests don't reach."""

from __future__ import annotations

import errno

import pytest
import torch
from PIL import Image

from retrofit.checkpoints import find_checkpoint
from retrofit.commands.generate_inputs import read_lora
from retrofit.runtime.errors import InputError, UnsupportedError
from retrofit.runtime.outputs import PARTIAL
from retrofit.sampling import Generator, InputFile, Request
from retrofit.sampling.pipelines import set_scheduler
from retrofit.sampling.png import name_outputs, read_record, write_png
from retrofit.sampling.running import effective_steps
from retrofit.sampling.sizes import native_size, preview_size
from retrofit.sampling.watching import TimeSaved, Watch
from tests import tiny_pipelines


@pytest.mark.parametrize("existed", [True, False])
def test_a_picture_that_cant_be_written_leaves_what_was_there(tmp_path, monkeypatch, existed):
    file = tmp_path / "a.png"
    if existed:
        file.write_bytes(b"earlier")

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr("PIL.Image.Image.save", fail)
    with pytest.raises(OSError, match="No space left"):
        write_png(Image.new("RGB", (8, 8)), file, {})
    assert file.exists() == existed
    assert [path for path in tmp_path.iterdir() if PARTIAL in path.name] == []


def test_a_record_survives_with_any_text(tmp_path):
    record = {"request": {"prompts": ["ein Stern, 星, ★ \n two lines"]}, "place": 0}
    write_png(Image.new("RGB", (8, 8), "red"), tmp_path / "a.png", record)
    assert read_record(tmp_path / "a.png") == {"schema": 1, **record}


def test_a_request_survives_as_plain_data(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "start.png")
    start = InputFile.read(tmp_path / "start.png", "--image")
    request = Request(
        model="x", prompts=("a", "b"), seeds=(1, 2), image=start, loras=(("style", 0.5),)
    )
    assert Request.from_dict(request.to_dict(), "test") == request
    assert request.only([1]).prompts == ("b",)
    assert request.only([1]).batch == 1


def test_numbers_sort_as_the_pictures_do(tmp_path):
    names = [file.name for file in name_outputs(tmp_path / "a.png", 12)]
    assert names == sorted(names)
    assert names[0] == "a-01.png"


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.5", "style.safetensors", 0.5),
        ("C:\\loras\\style.safetensors", "C:\\loras\\style.safetensors", 1.0),
        ("C:\\loras\\style.safetensors:-1", "C:\\loras\\style.safetensors", -1.0),
    ],
)
def test_a_loras_weight_stands_behind_the_last_colon(text, path, weight):
    assert read_lora(text) == (path, weight)


def test_a_preview_has_the_proportions_and_the_area_trained_at(pipeline):
    checkpoint = find_checkpoint(pipeline)
    assert native_size(checkpoint) == (32, 32)
    request = Request(model=str(pipeline), width=128, height=64)
    assert preview_size(request, checkpoint) == (48, 24)


@pytest.mark.parametrize("name", ["euler", "Euler", "EulerDiscreteScheduler", "euler-discrete"])
def test_a_scheduler_is_known_by_its_short_name(name):
    pipeline = tiny_pipelines.make_sd_pipeline()
    shift = pipeline.scheduler.config.steps_offset
    set_scheduler(pipeline, name)
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipeline.scheduler.config.steps_offset == shift


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(UnsupportedError, match="none that fits this checkpoint"):
        set_scheduler(tiny_pipelines.make_sd_pipeline(), "FlowMatchEulerDiscreteScheduler")


def test_image_to_image_runs_only_the_last_steps():
    start = InputFile(path="x", sha256="")
    assert effective_steps(Request(model="x", steps=20)) == 20
    assert effective_steps(Request(model="x", steps=20, image=start, strength=0.6)) == 12


def test_time_saved_may_be_a_loss():
    saved = TimeSaved(calls=4, patched_seconds=10.0, dense_call_seconds=2.0)
    assert (saved.dense_seconds, saved.seconds, saved.fraction) == (8.0, -2.0, -0.25)


def test_on_a_busy_machine_time_saved_has_no_verdict():
    steady = {"calls": 9, "patched_seconds": 10.0, "dense_call_seconds": 2.0}
    assert TimeSaved(**steady).verdict == "saved"
    assert TimeSaved(**steady, is_crowded=True).verdict == "busy"
    assert TimeSaved(**steady, dense_spread=0.5).verdict == "busy"


def test_a_watch_leaves_no_hook_and_keeps_only_the_last_steps_inputs():
    unet = tiny_pipelines.make_sd_pipeline().unet
    watch = Watch(network=unet, name="unet", keep_last=True)
    inputs = (torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 7, unet.config.cross_attention_dim))
    watch.begin(2)
    with watch, torch.no_grad():
        unet(*inputs)
        assert watch.last is None
        watch.step = 1
        unet(*inputs)
    assert watch.last is not None
    assert len(watch.seconds) == 2
    assert min(watch.time_last_again()) > 0
    assert len(watch.seconds) == 2
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks


def test_nan_that_goes_into_the_network_is_told_from_nan_that_arises_in_it():
    unet = tiny_pipelines.make_sd_pipeline().unet
    text = torch.zeros(1, 7, unet.config.cross_attention_dim)
    watch = Watch(network=unet, name="unet", num_steps=4, step=2)
    latents = torch.full((1, 4, 16, 16), float("nan"))
    with watch, torch.no_grad(), pytest.raises(Exception, match="as input at step 2 of 4"):
        unet(latents, 1, text)


def test_python_gives_the_pictures_of_the_command(pipeline, run_command, tmp_path):
    size = ("--size", "64x64", "--method", "hidiffusion", "--set", "first_steps=[0.7,0.7]")
    command = ("generate", pipeline, "-p", "a cat", "--steps", "3", "--seed", "4", *size)
    assert run_command(*command, "-o", tmp_path / "a.png").code == 0
    request = Request(
        model=str(pipeline), prompts=("a cat",), seeds=(4,), steps=3, width=64, height=64
    )
    with Generator(request, "hidiffusion", first_steps=(0.7, 0.7)) as generator:
        (picture,) = generator.pictures()
    with Image.open(tmp_path / "a.png") as written:
        assert written.tobytes() == picture.image.tobytes()
    assert read_record(tmp_path / "a.png")["request"] == picture.record["request"]


def test_a_request_is_refused_before_weights_are_read(copy_of, pipeline):
    folder = copy_of(pipeline)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    request = Request(model=str(folder), prompts=("a",), seeds=(0,), width=33, height=32)
    with pytest.raises(InputError, match="nearest are 32x32 and 40x32"):
        Generator(request)
    fitting = Request(model=str(folder), prompts=("a",), seeds=(0,))
    with pytest.raises(InputError, match="t3"):
        Generator(fitting, "t4")
