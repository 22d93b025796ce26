"""The small trained text-to-image pipeline in examples/shapes, and the script that made it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "shapes"
MODEL = FOLDER / "model"
MEGABYTE = 1_000_000
ATTENTIONS = {
    *(f"down_blocks.{block}.attentions.{layer}" for block in (0, 1, 2) for layer in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{block}.attentions.{layer}" for block in (1, 2, 3) for layer in (0, 1, 2)),
}


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _train(work: Path, *options: str) -> str:
    sizes = ["--vae-steps", "2", "--steps", "2", "--batch", "2", "--pictures", "4"]
    command = [sys.executable, str(FOLDER / "train.py"), "--work", str(work)]
    command += ["--output", str(work / "model"), *sizes, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (work / "train.log").read_text()


def test_weights_are_half_precision_and_small() -> None:
    files = list(MODEL.rglob("*.safetensors"))
    assert len(files) == 3
    assert all(file.stat().st_size <= 15 * MEGABYTE for file in files)
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) < 20 * MEGABYTE
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                tensor = weights.get_tensor(name)
                assert tensor.dtype == torch.float16, name
                assert tensor.isfinite().all(), name


def test_folder_names_no_missing_part() -> None:
    index = json.loads((MODEL / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]


def test_tokenizer_knows_the_words_whole() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    text = "An orange star at the top left, on a dark striped background"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    words = text.lower().replace(",", " ,").split()
    assert tokens == ["<|startoftext|>", *(f"{word}</w>" for word in words), "<|endoftext|>"]


def test_tokenizer_spells_other_words() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    numbers = tokenizer("an elephant é").input_ids
    assert tokenizer.decode(numbers, skip_special_tokens=True) == "an elephant é"


def test_unet_has_the_attention_names_of_stable_diffusion(
    pipeline: StableDiffusionPipeline,
) -> None:
    blocks = [
        name.removesuffix(".transformer_blocks.0")
        for name, _ in pipeline.unet.named_modules()
        if name.endswith(".transformer_blocks.0")
    ]
    assert set(blocks) == ATTENTIONS
    assert len(blocks) == len(ATTENTIONS)


def test_pipeline_makes_a_picture_in_two_steps(pipeline: StableDiffusionPipeline) -> None:
    noise = torch.Generator().manual_seed(0)
    image = pipeline("a red circle", num_inference_steps=2, generator=noise).images[0]
    assert image.size == (128, 128)
    assert np.asarray(image).std() > 4


def test_pipeline_draws_what_the_prompts_say(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    wanted = [
        ("circle", "red"),
        ("square", "blue"),
        ("triangle", "green"),
        ("ring", "yellow"),
        ("cross", "purple"),
        ("star", "cyan"),
    ]
    generators = [torch.Generator().manual_seed(100 + index) for index in range(len(wanted))]
    images = pipeline(
        [f"a {color} {shape}" for shape, color in wanted],
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=generators,
    ).images
    paths = [str(tmp_path / f"{index}.png") for index in range(len(wanted))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    command = [sys.executable, str(FOLDER / "check.py"), *paths, "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    right = [
        (item["objects"], item["shape"], item["color"]) == (1, *names)
        for item, names in zip(found, wanted, strict=True)
    ]
    assert sum(right) >= len(wanted) - 1


def test_autoencoder_gives_pictures_back_at_twice_the_size(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    command = [sys.executable, str(FOLDER / "draw.py"), "--count", "2", "--size", "256"]
    subprocess.run([*command, "--output", str(tmp_path / "a.png")], check=True, capture_output=True)
    drawn = np.array(Image.open(tmp_path / "a.png"))[:256, :256]
    picture = torch.from_numpy(drawn).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(picture).latent_dist.mean
        again = pipeline.vae.decode(latents).sample
    assert latents.shape == (1, 4, 32, 32)
    assert (again - picture).abs().mean() < 0.1
    assert 0.5 < (latents * pipeline.vae.config.scaling_factor).std() < 2


def test_training_writes_a_pipeline_and_goes_on(tmp_path: Path) -> None:
    log = _train(tmp_path)
    assert "vae 2/2 loss" in log
    assert "unet 2/2 loss" in log
    first = CLIPTextModel.from_pretrained(tmp_path / "model" / "text_encoder")
    assert first.dtype == torch.float16
    log = _train(tmp_path, "--steps", "3", "--resume")
    assert "unet goes on from step 2" in log
    assert "unet 3/3 loss" in log
    log = _train(tmp_path / "more", "--start", str(tmp_path / "model"))
    assert "vae 2/2" not in log
    kept = [AutoencoderKL.from_pretrained(place / "model" / "vae") for place in _both(tmp_path)]
    for one, other in zip(kept[0].parameters(), kept[1].parameters(), strict=True):
        assert torch.equal(one, other)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "more" / "model")
    assert loaded.vae.config.scaling_factor == kept[0].config.scaling_factor


def _both(folder: Path) -> tuple[Path, Path]:
    return folder, folder / "more"
