"""Start an autoencoder near what it must learn: the mean colour of every 8x8 square.

From random weights the autoencoder needs thousands of steps before it tells colours apart. Here
each residual branch starts at zero, and twelve channels carry red, green and blue through: each as
a value and its negative, since silu(x) - silu(-x) = x, beside a constant and its negative, which
keep the group norms from dividing a colour by its own strength. The other channels start random.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

CONSTANT = 2.0
CARRIED = 12  # channels: red, -red, 2, -2, green, -green, 2, -2, blue, -blue, 2, -2
TO_LATENT = torch.tensor(  # grey, red against green, blue against yellow
    [[0.5, 0.5, 0.5], [1.5, -1.5, 0.0], [-0.75, -0.75, 1.5]]
)
BEND = torch.tensor([0.25, 0.5, 0.25])  # turns repeated pixels into a linear ramp


@torch.no_grad()
def give_head_start(vae: AutoencoderKL) -> None:
    """Overwrite weights so that the autoencoder averages, and interpolates, from the first step.

    Args:
        vae: Untrained; every norm group of its last decoder layer must have four channels.
    """
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            _clear(module, slice(None))
        elif name.endswith("conv_shortcut"):
            _carry(module, torch.ones(1, 1))
        elif name.endswith("downsamplers.0.conv"):
            tap = torch.zeros(3, 3)
            tap[:2, :2] = 0.25
            _carry(module, tap)
        elif name.endswith("upsamplers.0.conv"):
            _carry(module, torch.outer(BEND, BEND))
    _enter(vae.encoder.conv_in, torch.eye(3))
    _leave(vae.encoder.conv_out, TO_LATENT, vae.encoder.conv_norm_out)
    _enter(vae.decoder.conv_in, torch.linalg.inv(TO_LATENT))
    _leave(vae.decoder.conv_out, torch.eye(3), vae.decoder.conv_norm_out)
    latents = vae.config.latent_channels
    vae.encoder.conv_out.weight[3] *= 4  # the last one starts random, as strong as the others
    _bias(vae.encoder.conv_out)[latents:] = -6.0  # little noise at first
    for module in (vae.quant_conv, vae.post_quant_conv):
        module.weight.copy_(torch.eye(len(module.weight))[:, :, None, None])
        module.bias.zero_()


def _bias(conv: nn.Conv2d) -> Tensor:
    """Return the bias, which every convolution of this autoencoder has."""
    if conv.bias is None:
        raise TypeError("head start: expected a convolution with a bias, got one without")
    return conv.bias


def _clear(conv: nn.Conv2d, rows: slice) -> None:
    conv.weight[rows] = 0.0
    _bias(conv)[rows] = 0.0


def _carry(conv: nn.Conv2d, tap: Tensor) -> None:
    """Pass the carried channels through one filter."""
    _clear(conv, slice(0, CARRIED))
    for channel in range(CARRIED):
        conv.weight[channel, channel] = tap


def _enter(conv: nn.Conv2d, colors: Tensor) -> None:
    """Fill the carried channels from the first three inputs, `colors` `[3, 3]` (to, from)."""
    _clear(conv, slice(0, CARRIED))
    for color in range(3):
        first = 4 * color
        conv.weight[first, :3, 1, 1] = colors[color]
        conv.weight[first + 1, :3, 1, 1] = -colors[color]
        _bias(conv)[first + 2 : first + 4] = torch.tensor([CONSTANT, -CONSTANT])


def _leave(conv: nn.Conv2d, values: Tensor, norm: nn.GroupNorm) -> None:
    """Read the first three outputs from the carried channels, `values` `[3, 3]` (to, from)."""
    _clear(conv, slice(0, 3))
    group = norm.num_channels // norm.num_groups
    constants = 2 * (CARRIED // 4 if group >= CARRIED else 1)
    norm_scale = CONSTANT * (constants / group) ** 0.5
    for color in range(3):
        conv.weight[:3, 4 * color, 1, 1] = values[:, color] * norm_scale
        conv.weight[:3, 4 * color + 1, 1, 1] = -values[:, color] * norm_scale
