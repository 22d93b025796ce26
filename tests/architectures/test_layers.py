"""Rotary positions, attention, blocks and the patch embedding against plain references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from retrofit.architectures.blocks import Attention, Block
from retrofit.architectures.dino_config import DinoConfig
from retrofit.architectures.patch_embed import ConvPatchEmbed, DinoPatchEmbed, check_frames
from retrofit.architectures.rotary import build_rotation, grid_positions, rotate
from retrofit.runtime.errors import InputError
from tests.architectures.watching import Watch


def rotate_by_complex_numbers(tokens: Tensor, positions: Tensor, base: float) -> Tensor:
    """Each half of a head as D/4 complex numbers (channel i + j channel i + D/4), turned."""
    half = tokens.shape[-1] // 2
    out = []
    for axis, part in enumerate(tokens.double().split(half, dim=-1)):
        numbers = torch.complex(part[..., : half // 2], part[..., half // 2 :])
        speed = torch.tensor([base ** (-2 * i / half) for i in range(half // 2)]).double()
        angle = positions[:, axis, None].double() * speed
        turned = numbers * torch.polar(torch.ones_like(angle), angle)
        out += [turned.real, turned.imag]
    return torch.cat(out, dim=-1)


def test_positions_start_at_one_behind_special_tokens_at_zero() -> None:
    positions = grid_positions(2, 3, num_special_tokens=2)
    patches = [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]
    assert positions.tolist() == [[0, 0], [0, 0], *patches]


@pytest.mark.parametrize(("head_dim", "base"), [(12, 100.0), (64, 100.0), (20, 50.0)])
def test_rotation_matches_complex_numbers(head_dim: int, base: float) -> None:
    positions = grid_positions(5, 7, num_special_tokens=3)
    tokens = torch.randn(2, 3, positions.shape[0], head_dim)
    turned = rotate(tokens, build_rotation(positions, head_dim, base=base))
    expected = rotate_by_complex_numbers(tokens, positions, base)
    assert torch.allclose(turned.double(), expected, atol=2e-6)
    assert torch.equal(turned[:, :, :3], tokens[:, :, :3])


def test_half_precision_angles_are_rounded_once() -> None:
    positions = grid_positions(1, 37, num_special_tokens=0)
    rotation = build_rotation(positions, 64, dtype=torch.bfloat16)
    exact = positions[:, 1].double()  # the first frequency is 1
    assert torch.equal(rotation.cos[:, 1, 0], exact.cos().to(torch.bfloat16))


def test_a_repeated_rotation_is_that_of_repeated_positions() -> None:
    positions = grid_positions(2, 3, num_special_tokens=1)
    repeated = build_rotation(positions, 8).repeat(3)
    direct = build_rotation(positions.repeat(3, 1), 8)
    assert torch.equal(repeated.cos, direct.cos)
    assert torch.equal(repeated.sin, direct.sin)


def reference_attention(module: Attention, tokens: Tensor, positions: Tensor | None) -> Tensor:
    batch, count, dim = tokens.shape
    heads, head_dim = module.num_heads, module.head_dim
    q, k, v = module.qkv(tokens).chunk(3, dim=-1)
    split = [x.reshape(batch, count, heads, head_dim).transpose(1, 2) for x in (q, k, v)]
    q, k = module.q_norm(split[0]), module.k_norm(split[1])
    if positions is not None:
        q, k = (rotate_by_complex_numbers(x, positions, 100.0) for x in (q, k))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(head_dim)).softmax(-1)
    return module.proj((weights @ split[2]).transpose(1, 2).reshape(batch, count, dim))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("placed", [True, False])
def test_attention_matches_a_reference(qk_norm: bool, placed: bool) -> None:
    module = Attention(24, 2, qk_norm=qk_norm).double()
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    tokens = torch.randn(2, 13, 24, dtype=torch.float64)
    positions = grid_positions(2, 5, num_special_tokens=3) if placed else None
    rotation = None if positions is None else build_rotation(positions, 12, dtype=torch.float64)
    expected = reference_attention(module, tokens, positions)
    assert torch.allclose(module(tokens, rotation), expected, atol=1e-6)


def test_attention_reaches_the_call_with_rotated_normalised_queries() -> None:
    module = Attention(24, 2, qk_norm=True)
    positions = grid_positions(2, 5, num_special_tokens=3)
    with Watch() as watch:
        module(torch.randn(2, 13, 24), build_rotation(positions, 12))
    (call,) = watch.calls
    assert call["q"].shape == call["k"].shape == call["v"].shape == (2, 2, 13, 12)
    # A fresh LayerNorm leaves rows of length sqrt(D), and turning keeps the length.
    assert torch.allclose(call["q"].norm(dim=-1), torch.tensor(12.0).sqrt(), atol=1e-3)


def test_under_autocast_queries_keys_and_values_have_one_dtype() -> None:
    module = Attention(24, 2, qk_norm=True)
    rotation = build_rotation(grid_positions(2, 5, num_special_tokens=3), 12)
    with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
        module(torch.randn(2, 13, 24), rotation)
    assert {watch.calls[0][name].dtype for name in "qkv"} == {torch.bfloat16}


def test_a_block_adds_scaled_attention_then_scaled_feed_forward() -> None:
    block = Block(16, 2, init_values=0.5)
    tokens = torch.randn(2, 9, 16)
    middle = tokens + 0.5 * block.attn(block.norm1(tokens))
    hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(middle)), approximate="none")
    expected = middle + 0.5 * block.mlp.fc2(hidden)
    assert torch.allclose(block(tokens), expected, atol=1e-6)


def test_convolutional_patches_come_in_raster_order() -> None:
    embed = ConvPatchEmbed(2, 3)
    frame = torch.randn(1, 3, 4, 6)
    tokens = embed(frame)
    single = embed(frame[:, :, 2:4, 4:6])
    assert tokens.shape == (1, 6, 3)
    assert torch.allclose(tokens[:, 5], single[:, 0], atol=1e-6)


def dino_with_table(side: int = 5, **settings: float) -> DinoPatchEmbed:
    config = DinoConfig(img_size=14 * side, embed_dim=8, depth=1, num_heads=2, **settings)  # type: ignore[arg-type]
    embed = DinoPatchEmbed(config)
    torch.nn.init.normal_(embed.pos_embed)
    return embed


def test_the_position_table_is_verbatim_at_the_trained_size() -> None:
    embed = dino_with_table()
    assert embed.position_table(5, 5) is embed.pos_embed


def test_the_position_table_is_resampled_by_size_with_antialiasing() -> None:
    embed = dino_with_table()
    square = embed.pos_embed[:, 1:].reshape(1, 5, 5, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        square, size=(3, 7), mode="bicubic", antialias=True, align_corners=False
    )
    table = embed.position_table(3, 7)
    assert torch.equal(table[:, :1], embed.pos_embed[:, :1])
    assert torch.equal(table[0, 1:].T.reshape(8, 3, 7), expected[0])


def test_a_flat_grid_with_as_many_patches_is_resampled_too() -> None:
    embed = dino_with_table(4)
    assert not torch.equal(embed.position_table(2, 8), embed.pos_embed)
    assert embed.position_table(2, 8).shape == embed.pos_embed.shape


def test_an_interpolation_offset_resamples_by_scale() -> None:
    embed = dino_with_table(interpolate_offset=0.1, interpolate_antialias=False)
    square = embed.pos_embed[:, 1:].reshape(1, 5, 5, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        square, scale_factor=(3.1 / 5, 7.1 / 5), mode="bicubic", antialias=False
    )
    table = embed.position_table(3, 7)
    assert torch.equal(table[0, 1:].T.reshape(8, 3, 7), expected[0])
    assert not torch.allclose(table, dino_with_table().position_table(3, 7))


def test_half_precision_tables_are_resampled_in_float32() -> None:
    embed = dino_with_table().half()
    table = embed.position_table(3, 7)
    assert table.dtype == torch.float16
    assert torch.equal(table, embed.float().position_table(3, 7).half())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 3, 28, 28), r"expected images \[batch, frames, 3, height, width\], got"),
        ((1, 2, 4, 28, 28), r"got \[1, 2, 4, 28, 28\]"),
        ((1, 0, 3, 28, 28), r"got \[1, 0, 3, 28, 28\]"),
        ((1, 2, 3, 28, 30), "multiples of 14 pixels, got 30x28"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_frames(torch.zeros(shape), 14, "VGGT")
