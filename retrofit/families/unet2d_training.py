"""How UNets of Stable Diffusion are trained: on latents of captioned pictures.

The loss is the model's own (noise, or velocity, as the scheduler says) with Min-SNR weights
(https://arxiv.org/abs/2303.09556, section 3.4): what is in a picture is settled at the noisy end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from retrofit.families.training import Step, Training, squared_error
from retrofit.runtime.errors import UnsupportedError

GAMMA = 5.0  # of Min-SNR
EMPTY = 0.1  # of the captions are left out, so that guidance keeps working
GUIDANCE = 3.0  # of the dense model's own samples
SAMPLE_STEPS = 25
PREDICTIONS = ("epsilon", "v_prediction")


def encode_pictures(pipeline: Any, pictures: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Latents and text states of captioned pictures.

    Args:
        pipeline: A text-to-image pipeline with its autoencoder and text encoders.
        pictures: `[B, 3, H, W]` in [-1, 1].
        captions: One each.
    """
    vae = pipeline.vae
    pictures = pictures.to(vae.device, vae.dtype)
    latents = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
    return {"latents": latents, **_encode_texts(pipeline, captions, pictures.shape[-2:])}


def sample_pictures(
    pipeline: Any, captions: Sequence[str], size: tuple[int, int], seed: int
) -> dict[str, Tensor]:
    """The same of pictures that the dense model makes of captions.

    Args:
        pipeline: The dense pipeline.
        captions: One each.
        size: Height and width in pixels.
        seed: Of the first picture's noise; the next one's is one more.
    """
    latents = _draw(pipeline, captions, seed, height=size[0], width=size[1], output_type="latent")
    return {"latents": latents, **_encode_texts(pipeline, captions, size)}


def draw_pictures(pipeline: Any, captions: Sequence[str], seed: int) -> list[Any]:
    """PIL pictures of captions at the training size, with the network as it is."""
    return list(_draw(pipeline, captions, seed, output_type="pil"))


def _draw(pipeline: Any, captions: Sequence[str], seed: int, **options: Any) -> Any:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(captions))]
    return pipeline(
        list(captions),
        num_inference_steps=SAMPLE_STEPS,
        guidance_scale=GUIDANCE,
        generator=generators,
        **options,
    ).images


def draw_step(pipeline: Any, rows: Mapping[str, Tensor], generator: torch.Generator) -> Step:
    """Noise at random times on latents; one caption in ten is left out.

    Args:
        pipeline: Whose scheduler says what is predicted.
        rows: As `encode_pictures` gives them.
        generator: Of noise, times and captions.
    """
    latents = rows["latents"]
    schedule = _noise_schedule(pipeline)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    count = schedule.config.num_train_timesteps
    times = torch.randint(0, count, (len(latents),), generator=generator).to(latents.device)
    dropped = (torch.rand(len(latents), generator=generator) < EMPTY).to(latents.device)
    kept = schedule.alphas_cumprod.to(latents.device)[times]
    snr = kept / (1 - kept)
    is_velocity = schedule.config.prediction_type == "v_prediction"
    states = torch.where(dropped[:, None, None], rows["empty_states"], rows["states"])
    arguments = {
        "sample": schedule.add_noise(latents, noise, times),
        "timestep": times,
        "encoder_hidden_states": states,
    }
    if "pooled" in rows:
        pooled = torch.where(dropped[:, None], rows["empty_pooled"], rows["pooled"])
        arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": rows["time_ids"]}
    target = schedule.get_velocity(latents, noise, times) if is_velocity else noise
    weight = snr.clamp(max=GAMMA) / (snr + 1 if is_velocity else snr)
    return Step(arguments=arguments, target=target, weight=weight)


def _noise_schedule(pipeline: Any) -> Any:
    """The schedule that the model was trained with, from its scheduler's settings."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    if schedule.config.prediction_type not in PREDICTIONS:
        raise UnsupportedError(
            f"{type(pipeline).__name__}: its scheduler says prediction_type "
            f"{schedule.config.prediction_type!r}, expected one of {', '.join(PREDICTIONS)}. "
            "Give a checkpoint of those."
        )
    return schedule


def _encode_texts(
    pipeline: Any, captions: Sequence[str], size: tuple[int, int] | torch.Size
) -> dict[str, Tensor]:
    """Text states of captions and of the empty one, `[B, S, C]`; SDXL's pooled ones with them."""
    encoded = {}
    for name, texts in (("", list(captions)), ("empty_", [""] * len(captions))):
        found = pipeline.encode_prompt(
            prompt=texts,
            device=pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        encoded[f"{name}states"] = found[0]
        if len(found) == 4:  # Stable Diffusion XL's
            encoded[f"{name}pooled"] = found[2]
    if "pooled" in encoded:
        sizes = torch.tensor([*size, 0, 0, *size], dtype=encoded["pooled"].dtype)
        encoded["time_ids"] = sizes.repeat(len(captions), 1)
    return encoded


TRAINING = Training(
    data="captioned pictures",
    encode=encode_pictures,
    sample=sample_pictures,
    show=draw_pictures,
    draw=draw_step,
    read=lambda output: output[0] if isinstance(output, tuple) else output.sample,
    error=squared_error,
    has_own_loss=True,
)
