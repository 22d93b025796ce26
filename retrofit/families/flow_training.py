"""How FLUX and Stable Diffusion 3 are trained: by flow matching on latents of captioned pictures.

The network predicts noise minus picture on the straight line between them
(https://arxiv.org/abs/2210.02747); times are drawn with more of them in the middle
(logit-normal, https://arxiv.org/abs/2403.03206, section 3.1), shifted as the scheduler says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from retrofit.families.training import Step, Training, squared_error
from retrofit.runtime.errors import UnsupportedError

TEXT_SCALE = 3.5  # guidance that a distilled FLUX is told
EMPTY = 0.1  # of SD 3's captions are left out, so that guidance keeps working


def encode_pictures(pipeline: Any, pictures: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Latents and text states of captioned pictures.

    Args:
        pipeline: A text-to-image pipeline with its autoencoder and text encoders.
        pictures: `[B, 3, H, W]` in [-1, 1].
        captions: One each.

    Raises:
        UnsupportedError: If the network sees more than the latents (Fill, Kontext's pictures).
    """
    vae, config = pipeline.vae, pipeline.transformer.config
    channels = vae.config.latent_channels
    if config.in_channels not in (channels, 4 * channels):
        raise UnsupportedError(
            f"{type(pipeline).__name__}: its network takes {config.in_channels} channels, more "
            "than the picture's latents. Give a text-to-image checkpoint."
        )
    found = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mean
    latents = (found - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return {"latents": latents, **encode_texts(pipeline, captions)}


def sample_pictures(
    pipeline: Any, captions: Sequence[str], size: tuple[int, int], seed: int
) -> dict[str, Tensor]:
    """The same of pictures that the dense model makes of captions, at a size in pixels."""
    height, width = size
    latents = _draw(pipeline, captions, seed, height=height, width=width, output_type="latent")
    if latents.ndim == 3:  # FLUX packs four into one token
        latents = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    return {"latents": latents, **encode_texts(pipeline, captions)}


def draw_pictures(pipeline: Any, captions: Sequence[str], seed: int) -> list[Any]:
    """PIL pictures of captions at the training size, with the network as it is."""
    return list(_draw(pipeline, captions, seed, output_type="pil"))


def encode_texts(pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    """Text states `[B, S, C]` and pooled ones `[B, C]`; of SD 3 those of the empty caption too."""
    if hasattr(pipeline, "text_encoder_3"):
        found = pipeline.encode_prompt(list(captions), None, None, pipeline.device)
        return dict(zip(("states", "empty_states", "pooled", "empty_pooled"), found, strict=True))
    states, pooled, _ = pipeline.encode_prompt(list(captions), None, pipeline.device)
    return {"states": states, "pooled": pooled}


def draw_flux_step(pipeline: Any, rows: Mapping[str, Tensor], generator: torch.Generator) -> Step:
    """Latents on their way to noise, packed as FLUX takes them."""
    noised, velocity, times = _on_the_way(pipeline, rows["latents"], generator)
    batch, channels, height, width = noised.shape
    states = rows["states"]
    guidance = pipeline.transformer.config.guidance_embeds
    device, dtype = states.device, states.dtype
    return Step(
        arguments={
            "hidden_states": pipeline._pack_latents(noised, batch, channels, height, width),
            "timestep": times,
            "guidance": torch.full_like(times, TEXT_SCALE) if guidance else None,
            "encoder_hidden_states": states,
            "pooled_projections": rows["pooled"],
        },
        shared={
            "txt_ids": torch.zeros(states.shape[1], 3, device=device, dtype=dtype),
            "img_ids": pipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, device, dtype
            ),
        },
        target=pipeline._pack_latents(velocity, batch, channels, height, width),
        weight=torch.ones_like(times),
    )


def draw_sd3_step(pipeline: Any, rows: Mapping[str, Tensor], generator: torch.Generator) -> Step:
    """Latents on their way to noise; one caption in ten is left out."""
    noised, velocity, times = _on_the_way(pipeline, rows["latents"], generator)
    dropped = (torch.rand(len(times), generator=generator) < EMPTY).to(times.device)
    return Step(
        arguments={
            "hidden_states": noised,
            "timestep": times * pipeline.scheduler.config.num_train_timesteps,
            "encoder_hidden_states": torch.where(
                dropped[:, None, None], rows["empty_states"], rows["states"]
            ),
            "pooled_projections": torch.where(
                dropped[:, None], rows["empty_pooled"], rows["pooled"]
            ),
        },
        target=velocity,
        weight=torch.ones_like(times),
    )


def _on_the_way(
    pipeline: Any, latents: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents, what leads from picture to noise, and times in (0, 1), `[B]`."""
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    times = torch.randn(len(latents), generator=generator).sigmoid().to(latents)
    shift = getattr(pipeline.scheduler.config, "shift", None) or 1.0
    times = shift * times / (1 + (shift - 1) * times)
    at = times[:, None, None, None]
    return (1 - at) * latents + at * noise, noise - latents, times


def _draw(pipeline: Any, captions: Sequence[str], seed: int, **options: Any) -> Any:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(captions))]
    return pipeline(list(captions), generator=generators, **options).images


def _training(draw: Any) -> Training:
    return Training(
        data="captioned pictures",
        encode=encode_pictures,
        sample=sample_pictures,
        show=draw_pictures,
        draw=draw,
        read=lambda output: output[0] if isinstance(output, tuple) else output.sample,
        error=squared_error,
        has_own_loss=True,
    )


FLUX = _training(draw_flux_step)
SD3 = _training(draw_sd3_step)
