"""Inputs of a comparison: real documents, drawn pictures, latents over a schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from retrofit.evaluate.inputs import STEPS, InputChoice, make_inputs
from retrofit.evaluate.measure import run_input
from retrofit.evaluate.samples import collect_documents, draw_pictures
from retrofit.families.examples import InputSize
from retrofit.runtime.errors import InputError, NotFoundError, UnsupportedError
from tests import tiny_models, tiny_pipelines


def test_documents_are_different_and_long_enough_and_the_same_for_a_seed() -> None:
    documents = collect_documents(lambda text: len(text) > 1800, 60)
    texts = [text for _, text in documents]
    assert len(set(texts)) == 60
    assert min(map(len, texts)) > 1800
    assert collect_documents(lambda text: len(text) > 1800, 60) == documents
    other = collect_documents(lambda text: len(text) > 1800, 60, seed=1)
    assert [name for name, _ in other] != [name for name, _ in documents]
    assert sum(name.startswith("help(") for name, _ in documents) > 5
    assert sum(name.startswith("description of") for name, _ in documents) > 5


def test_too_few_documents_say_how_many_there_are() -> None:
    with pytest.raises(InputError, match="expected 3 long ones .* got 0"):
        collect_documents(lambda text: False, 3)


def test_pictures_have_structure_and_differ() -> None:
    first, second = draw_pictures(2, 96, 64, seed=3)
    assert first.size == (96, 64)
    assert first.tobytes() != second.tobytes()
    assert first.tobytes() == draw_pictures(1, 96, 64, seed=3)[0].tobytes()
    pixels = torch.tensor(list(first.convert("L").tobytes()), dtype=torch.float32).view(64, 96)
    beside = (pixels[:, 1:] - pixels[:, :-1]).abs().median()
    apart = (pixels - pixels.flip(0).flip(1)).abs().median()
    assert beside < 0.5 * apart  # neighbouring pixels are alike, as in a photograph


def test_encoder_gets_documents_cut_at_its_own_length(tmp_path: Path) -> None:
    folder = tiny_pipelines.write_encoder_checkpoint(tmp_path / "encoder")
    model = tiny_models.make_minilm()
    inputs = make_inputs(model, InputChoice(count=3), folder=folder)
    assert len(inputs) == 3
    for item in inputs:
        (call,) = item.calls
        assert item.tokens == call.arguments["input_ids"].shape[1]
        assert 240 <= item.tokens <= 320
        assert run_input(model, item, None).shape == (1, item.tokens, 48)
    assert len({item.name for item in inputs}) == 3


def test_encoder_without_a_tokenizer_gets_random_tokens_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    choice = InputChoice(count=2, sizes={"": InputSize(tokens=40)})
    inputs = make_inputs(tiny_models.make_minilm(), choice)
    assert [item.tokens for item in inputs] == [40, 40]
    assert "random tokens say little about quality" in caplog.text


def test_users_texts_are_taken_from_files_and_folders(tmp_path: Path) -> None:
    folder = tiny_pipelines.write_encoder_checkpoint(tmp_path / "encoder")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "b.md").write_text("the cat on the house")
    (texts / "a.txt").write_text("a dog near the river")
    (texts / "c.bin").write_bytes(b"\x00")
    (tmp_path / "single").write_text("red")
    files = (texts, tmp_path / "single")
    inputs = make_inputs(tiny_models.make_minilm(), InputChoice(files=files), folder=folder)
    assert [item.name for item in inputs] == ["a.txt", "b.md", "single"]
    assert inputs[0].tokens == inputs[0].calls[0].arguments["input_ids"].shape[1]
    one = InputChoice(files=files, count=1)
    assert len(make_inputs(tiny_models.make_minilm(), one, folder=folder)) == 1


def test_texts_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.raises(NotFoundError, match="expected a tokenizer beside the model"):
        make_inputs(tiny_models.make_minilm(), InputChoice(files=(tmp_path,)))


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_files_that_are_not_there_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    folder = tiny_pipelines.write_encoder_checkpoint(tmp_path / "encoder")
    choice = InputChoice(files=(tmp_path / name,))
    with pytest.raises(
        NotFoundError, match=f"{name}: (no such file|holds no file that can be used)"
    ):
        make_inputs(tiny_models.make_minilm(), choice, folder=folder)


def test_vision_model_gets_drawn_pictures_normalised_as_its_processor_says(
    tmp_path: Path,
) -> None:
    folder = tiny_pipelines.write_vit_checkpoint(tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.0, 0.0, 0.0], "image_std": [2.0, 1.0, 1.0]}'
    )
    model = tiny_models.make_dinov2_with_registers()
    inputs = make_inputs(model, InputChoice(count=2, seed=5), folder=folder)
    drawn = draw_pictures(2, 32, 32, seed=5)[1]
    pixels = inputs[1].calls[0].arguments["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    expected = drawn.getpixel((7, 3))
    assert isinstance(expected, tuple)
    found = (pixels[0, :, 3, 7] * torch.tensor([2.0, 1.0, 1.0]) * 255).round()
    assert found.tolist() == list(expected)
    assert run_input(model, inputs[1], None).shape[0] == 1


def test_users_pictures_are_resized(tmp_path: Path) -> None:
    Image.new("RGB", (50, 20), (255, 0, 0)).save(tmp_path / "red.png")
    choice = InputChoice(files=(tmp_path,), sizes={"": InputSize(height=44, width=28)})
    (item,) = make_inputs(tiny_models.make_dinov2_with_registers(), choice)
    assert item.name == "red.png"
    assert item.calls[0].arguments["pixel_values"].shape == (1, 3, 44, 28)


def test_pictures_are_upright_and_what_is_left_out_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGBA", (20, 20), (200, 0, 0, 0)).save(tmp_path / "cut.avif", quality=100)
    turned = Image.new("RGB", (28, 28))
    turned.paste((255, 255, 255), (0, 0, 14, 28))  # the right half, once it is upright
    turned.save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "notes.doc").write_text("no picture")
    choice = InputChoice(files=(tmp_path,), sizes={"": InputSize(height=28, width=28)})
    inputs = make_inputs(tiny_models.make_dinov2_with_registers(), choice)
    assert [item.name for item in inputs] == ["cut.avif", "turned.png"]
    cut, upright = (item.calls[0].arguments["pixel_values"] for item in inputs)
    assert (cut == cut.max()).all()  # white
    assert upright[..., 20].min() > upright[..., 5].max()
    assert "left out 1 (notes.doc): no ending of a picture" in caplog.text


def test_texts_that_are_left_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_pipelines.write_encoder_checkpoint(tmp_path / "encoder")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a dog near the river")
    (tmp_path / "texts" / "b.html").write_text("the cat on the house")
    make_inputs(tiny_models.make_minilm(), InputChoice(files=(tmp_path / "texts",)), folder=folder)
    assert "left out 1 (b.html): ends in none of .md, .rst, .txt" in caplog.text


def test_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(InputError, match=r"a\.png: expected a picture"):
        make_inputs(tiny_models.make_dinov2_with_registers(), InputChoice(files=(tmp_path,)))


def test_denoising_network_runs_through_a_schedule() -> None:
    choice = InputChoice(count=2, sizes={"": InputSize(height=19, width=26)})
    inputs = make_inputs(tiny_models.make_sdxl_unet(), choice)
    assert [item.name for item in inputs] == ["19x26, seed 0", "19x26, seed 1"]
    calls = inputs[0].calls
    assert [call.step for call in calls] == [(i, STEPS) for i in range(STEPS)]
    timesteps = [int(call.arguments["timestep"]) for call in calls]
    assert timesteps == sorted(timesteps, reverse=True)
    assert timesteps[0] == 999
    first, second = (item.calls[0].arguments["sample"] for item in inputs)
    assert not torch.equal(first, second)


def test_timesteps_are_in_the_unit_of_the_network() -> None:
    choice = InputChoice(count=1, sizes={"": InputSize(height=8, width=8)})
    (flux,) = make_inputs(tiny_models.make_flux(), choice)
    assert [call.arguments["timestep"].item() for call in flux.calls] == [1, 0.75, 0.5, 0.25]
    (sd3,) = make_inputs(tiny_models.make_sd3(), choice)
    assert [call.arguments["timestep"].item() for call in sd3.calls] == [999, 749.25, 499.5, 249.75]


def test_denoising_network_takes_no_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.raises(UnsupportedError, match="takes no --inputs"):
        make_inputs(tiny_models.make_wan(), InputChoice(files=(tmp_path,)))


def test_every_denoising_network_of_a_pipeline_gets_inputs() -> None:
    pipeline = tiny_pipelines.make_wan_pipeline(two_stages=True)
    sizes = {name: InputSize(frames=2, height=8, width=8) for name in pipeline.components}
    inputs = make_inputs(pipeline, InputChoice(count=1, sizes=sizes))
    assert [item.network for item in inputs] == ["transformer", "transformer_2"]
