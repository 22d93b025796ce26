r"""Train the small text-to-image pipeline on drawn pictures: autoencoder first, then the UNet.

    python examples/shapes/train.py --work runs/shapes --output runs/shapes/model
    python examples/shapes/train.py --work runs/shapes --output runs/shapes/model --resume
    python examples/shapes/train.py --work runs/more --output runs/more/model \
        --start examples/shapes/model          # go on from trained weights

The work folder holds the training state (written every few minutes), the cached latents and the
log; the output is a folder that `StableDiffusionPipeline.from_pretrained` loads.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from draw import Scene, caption, paint, random_closeup, random_scene
from head_start import give_head_start
from torch import Tensor, nn
from trainer import Trainer
from transformers import CLIPTextModel, CLIPTokenizer

LOG = logging.getLogger("shapes")


def to_tensor(scenes: Iterable[Scene], size: int) -> Tensor:
    """Paint scenes, `[B, 3, size, size]` in [-1, 1]."""
    pictures = np.stack([paint(scene, size, size) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def picture_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the error of colours, tints and differences of neighbours, each absolute and squared.

    Tints (a colour less its grey) count apart, since light and dark make up most of the error and
    an autoencoder left alone learns to see grey first and colours thousands of steps later.
    """
    error = output - target
    tint = error - error.mean(dim=1, keepdim=True)
    parts = [error, 2 * tint, error.diff(dim=2), error.diff(dim=3)]
    return torch.stack([part.abs().mean() + 2 * part.square().mean() for part in parts]).sum()


def train_vae(vae: AutoencoderKL, trainer: Trainer, batch: int) -> None:
    """Train the autoencoder, half of the time on objects of any size, at small then full size."""
    vae.train()
    while trainer.step < trainer.steps:
        small = trainer.step < 0.75 * trainer.steps
        size, count = (networks.SIZE // 2, batch) if small else (networks.SIZE, batch // 2)
        rng = trainer.rng
        scenes = [(random_scene, random_closeup)[i % 2](rng) for i in range(count)]
        target = to_tensor(scenes, size)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=trainer.generator)
            output = vae.decode(mean + noise * (0.5 * logvar).exp()).sample.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        trainer.update(picture_loss(output, target) + 1e-3 * divergence)


def set_scale(vae: AutoencoderKL, seed: int, count: int) -> None:
    """Set the factor that gives the latents of drawn pictures a standard deviation of 1."""
    rng = np.random.default_rng(seed)
    latents = encode(vae, [random_scene(rng) for _ in range(count)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    means = [round(value, 3) for value in latents.mean((0, 2, 3)).tolist()]
    LOG.info("scaling factor %s, means %s before it", vae.config.scaling_factor, means)


@torch.no_grad()
def encode(vae: AutoencoderKL, scenes: list[Scene]) -> Tensor:
    """Return the latents of scenes, `[N, 4, LATENT, LATENT]`, not yet scaled."""
    vae.eval()
    parts = []
    for first in range(0, len(scenes), 32):
        with torch.autocast("cpu", torch.bfloat16):
            target = to_tensor(scenes[first : first + 32], networks.SIZE)
            parts.append(vae.encode(target).latent_dist.mean.float())
    return torch.cat(parts)


def cached_latents(vae: AutoencoderKL, scenes: list[Scene], path: Path) -> Tensor:
    """Return the scaled latents of scenes, from the file where it is there."""
    if path.exists():
        latents: Tensor = torch.load(path, weights_only=True)
        if len(latents) == len(scenes):
            return latents
    started = time.monotonic()
    latents = encode(vae, scenes) * vae.config.scaling_factor
    torch.save(latents, path)
    LOG.info("%d pictures encoded in %.0f s", len(scenes), time.monotonic() - started)
    return latents


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    trainer: Trainer,
    *,
    scenes: list[Scene],
    latents: Tensor,
    batch: int,
) -> None:
    """Train UNet and text encoder to predict the noise; one caption in ten is left empty.

    Pictures with little noise count less (Min-SNR weights, https://arxiv.org/abs/2303.09556,
    section 3.4, gamma 5): what is in the picture is settled at the noisy end.
    """
    unet.train()
    unet.set_attn_processor(AttnProcessor())  # half the time of PyTorch's own on a CPU, backward
    text_encoder.train()
    noise_schedule = DDPMScheduler.from_config(networks.build_scheduler().config)
    kept = noise_schedule.alphas_cumprod
    weights = (5 * (1 - kept) / kept).clamp(max=1.0)  # min(SNR, 5) / SNR
    while trainer.step < trainer.steps:
        chosen = trainer.rng.integers(len(scenes), size=batch)
        dropped = trainer.rng.random(batch) < 0.1
        texts = [
            "" if drop else caption(scenes[index], trainer.rng)
            for index, drop in zip(chosen, dropped, strict=True)
        ]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        clean = latents[torch.from_numpy(chosen)]
        noise = torch.randn(clean.shape, generator=trainer.generator)
        times = torch.randint(0, 1000, (batch,), generator=trainer.generator)
        noisy = noise_schedule.add_noise(clean, noise, times)
        with torch.autocast("cpu", torch.bfloat16):
            states = text_encoder(tokens.input_ids).last_hidden_state
            output = unet(noisy, times, states).sample
        errors = (output.float() - noise).square().mean(dim=(1, 2, 3))
        trainer.update((weights[times] * errors).mean())


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the pipeline's parts, untrained or from `--start`."""
    if arguments.start:
        return {
            "vae": AutoencoderKL.from_pretrained(
                arguments.start / "vae", torch_dtype=torch.float32
            ),
            "unet": UNet2DConditionModel.from_pretrained(
                arguments.start / "unet", torch_dtype=torch.float32
            ),
            "text_encoder": CLIPTextModel.from_pretrained(
                arguments.start / "text_encoder", dtype=torch.float32
            ),
            "tokenizer": CLIPTokenizer.from_pretrained(arguments.start / "tokenizer"),
        }
    vae = networks.build_vae()
    give_head_start(vae)
    networks.write_tokenizer(arguments.work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(arguments.work / "tokenizer")
    return {
        "vae": vae,
        "unet": networks.build_unet(),
        "text_encoder": networks.build_text_encoder(tokenizer),
        "tokenizer": tokenizer,
    }


def run(arguments: argparse.Namespace) -> None:
    """Train both networks and write the pipeline."""
    torch.manual_seed(arguments.seed)
    parts = prepare(arguments)
    vae, unet, text_encoder = parts["vae"], parts["unet"], parts["text_encoder"]
    seed, work = arguments.seed, arguments.work
    vae_steps = 0 if arguments.start else arguments.vae_steps
    autoencoder = Trainer(vae, work / "vae.pt", steps=vae_steps, rate=4e-4, seed=seed)
    denoising = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    path = work / "unet.pt"
    denoiser = Trainer(denoising, path, steps=arguments.steps, rate=arguments.rate, seed=seed + 1)
    if arguments.resume:
        autoencoder.resume()
        denoiser.resume()
    if vae_steps:
        train_vae(vae, autoencoder, arguments.batch // 2)
        vae.load_state_dict(autoencoder.average.state_dict())
        set_scale(vae, seed + 2, min(128, arguments.pictures))
    rng = np.random.default_rng(seed + 3)
    scenes = [random_scene(rng) for _ in range(arguments.pictures)]
    latents = cached_latents(vae, scenes, work / "latents.pt")
    tokenizer = parts["tokenizer"]
    training = {"scenes": scenes, "latents": latents, "batch": arguments.batch}
    train_unet(unet, text_encoder, tokenizer, denoiser, **training)
    denoising.load_state_dict(denoiser.average.state_dict())
    for name, network in {"vae": vae, **denoising}.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        LOG.info("%s: %d parameters", name, count)
    pipeline = networks.assemble(vae, text_encoder, tokenizer, unet)
    pipeline.to(torch.float16).save_pretrained(arguments.output)
    networks.write_tokenizer(arguments.output / "tokenizer")
    LOG.info("the pipeline is in %s", arguments.output.name)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the small text-to-image pipeline.")
    parser.add_argument("--work", type=Path, required=True, help="folder of state, cache and log")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--start", type=Path, help="pipeline to go on from; its VAE is kept")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --work")
    parser.add_argument("--vae-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=5000, help="of UNet and text encoder")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=8000, help="drawn once and cached")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        logging.StreamHandler(),
        logging.FileHandler(arguments.work / "train.log"),
    ]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=handlers)
    LOG.setLevel(logging.INFO)
    given = {
        key: str(value) for key, value in vars(arguments).items() if key not in ("work", "output")
    }
    LOG.info("settings %s, torch %s", given, torch.__version__)
    run(arguments)


if __name__ == "__main__":
    main()
