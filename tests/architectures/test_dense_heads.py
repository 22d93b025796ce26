"""The DPT head, its activations, and running it a few frames at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from retrofit.architectures.chunks import map_frames
from retrofit.architectures.dpt_head import (
    DPTHead,
    FusionBlock,
    ResidualConvUnit,
    build_uv_embedding,
)
from retrofit.architectures.head_outputs import (
    CONFIDENCE_ACTIVATIONS,
    VALUE_ACTIVATIONS,
    activate_confidence,
    activate_values,
)
from retrofit.architectures.vggt_config import DPTHeadConfig

SIZE = (42, 70)


def small_head(**settings: object) -> DPTHead:
    values = {
        "dim_in": 24,
        "features": 16,
        "out_channels": (16, 24, 32, 32),
        "intermediate_layer_idx": (0, 1, 2, 3),
    }
    return DPTHead(DPTHeadConfig(**(values | settings)))  # type: ignore[arg-type]


def taps(batch: int = 2, frames: int = 5) -> dict[int, Tensor]:
    return {layer: torch.randn(batch, frames, 5 + 15, 24) for layer in range(4)}


def test_the_residual_unit_is_the_original_with_its_in_place_relu() -> None:
    unit = ResidualConvUnit(6)
    maps = torch.randn(2, 6, 7, 5)
    relu = nn.ReLU(inplace=True)

    def original(x: Tensor) -> Tensor:  # the shortcut sees what the ReLU left in x
        return unit.conv2(relu(unit.conv1(relu(x)))) + x

    kept = maps.clone()
    assert torch.allclose(unit(maps), original(maps.clone()), atol=1e-6)
    assert torch.equal(maps, kept)
    textbook = unit.conv2(unit.conv1(maps.relu()).relu()) + maps
    assert not torch.allclose(unit(maps), textbook, atol=1e-2)


def test_fusion_adds_the_finer_map_and_keeps_the_corners_when_resizing() -> None:
    block = FusionBlock(2, has_skip=True)
    for weight in block.parameters():
        nn.init.zeros_(weight)
    block.out_conv.weight.data = torch.eye(2)[:, :, None, None]
    maps, skip = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    fused = block(maps, skip, (7, 9))  # both residual units pass relu(x) on
    total = maps + skip
    rows, columns = torch.linspace(0, 2, 7), torch.linspace(0, 3, 9)
    below, right = rows.floor().long().clamp(max=1), columns.floor().long().clamp(max=2)
    y, x = (rows - below)[:, None], columns - right
    upper = total[:, :, below][..., right] * (1 - x) + total[:, :, below][..., right + 1] * x
    lower = (
        total[:, :, below + 1][..., right] * (1 - x) + total[:, :, below + 1][..., right + 1] * x
    )
    assert torch.allclose(fused, upper * (1 - y) + lower * y, atol=1e-6)


def test_the_position_embedding_matches_a_loop() -> None:
    height, width, channels, aspect = 3, 5, 8, 1.7
    got = build_uv_embedding(torch.empty(1, channels, height, width), aspect)
    expected = torch.empty(channels, height, width, dtype=torch.float64)
    long, short = aspect / (aspect**2 + 1) ** 0.5, 1 / (aspect**2 + 1) ** 0.5
    for row in range(height):
        for column in range(width):
            x = long * (2 * column - (width - 1)) / width
            y = short * (2 * row - (height - 1)) / height
            speeds = torch.tensor([1.0, 100**-0.5], dtype=torch.float64)
            parts = [(x * speeds).sin(), (x * speeds).cos(), (y * speeds).sin(), (y * speeds).cos()]
            expected[:, row, column] = 0.1 * torch.cat(parts)
    assert torch.allclose(got.double(), expected, atol=1e-7)


@pytest.mark.parametrize("frames_per_chunk", [1, 3, 4, 10, None])
def test_chunked_heads_give_the_same_result(frames_per_chunk: int | None) -> None:
    head, layers = small_head().double(), {k: v.double() for k, v in taps().items()}
    with torch.no_grad():
        whole = head(layers, SIZE, num_special_tokens=5, frames_per_chunk=None)
        parts = head(layers, SIZE, num_special_tokens=5, frames_per_chunk=frames_per_chunk)
    assert whole[0].shape == (2, 5, *SIZE, 3)
    assert whole[1].shape == (2, 5, *SIZE)
    for first, second in zip(whole, parts, strict=True):
        assert torch.allclose(first, second, rtol=1e-12, atol=1e-12)


def test_chunked_heads_give_the_same_gradients() -> None:
    head, layers = small_head().double(), {k: v.double() for k, v in taps().items()}
    gradients = []
    for chunk in (None, 3):
        head.zero_grad()
        values, confidence = head(layers, SIZE, num_special_tokens=5, frames_per_chunk=chunk)
        (values.square().mean() + confidence.mean()).backward()
        gradients.append([weight.grad.clone() for weight in head.parameters()])  # type: ignore[union-attr]
    for first, second in zip(*gradients, strict=True):
        assert torch.allclose(first, second, rtol=1e-9, atol=1e-12)


def test_heads_read_taps_of_another_dtype() -> None:
    head, layers = small_head(), taps()
    half = {layer: tokens.half() for layer, tokens in layers.items()}
    raised = {layer: tokens.float() for layer, tokens in half.items()}
    with torch.no_grad():
        first = head(half, SIZE, num_special_tokens=5)
        second = head(raised, SIZE, num_special_tokens=5)
    assert first[0].dtype == torch.float32
    assert torch.equal(first[0], second[0])


def test_frames_do_not_see_each_other() -> None:
    head, layers = small_head(), taps()
    with torch.no_grad():
        whole, _ = head(layers, SIZE, num_special_tokens=5)
        alone, _ = head({k: v[:, 2:3] for k, v in layers.items()}, SIZE, num_special_tokens=5)
    assert torch.allclose(whole[:, 2:3], alone, rtol=1e-4, atol=1e-5)


def test_a_head_without_positions_ignores_where_a_pixel_is() -> None:
    plain, placed = small_head(pos_embed=False), small_head()
    placed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        layers = taps(1, 1)
        first, _ = plain(layers, SIZE, num_special_tokens=5)
        second, _ = placed(layers, SIZE, num_special_tokens=5)
    assert not torch.allclose(first, second)


def test_value_activations_are_what_they_say() -> None:
    raw = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    length = raw.norm(dim=-1, keepdim=True)
    inverse_log = raw.sign() * (raw.abs().exp() - 1)
    expected = {
        "exp": raw.exp(),
        "inv_log": inverse_log,
        "linear": raw,
        "norm": raw / length,
        "norm_exp": raw / length * (length.exp() - 1),
        "relu": raw.clamp(min=0),
        "sigmoid": 1 / (1 + (-raw).exp()),
        "xy_inv_log": torch.cat(
            [raw[..., :2] * inverse_log[..., 2:], inverse_log[..., 2:]], dim=-1
        ),
    }
    assert set(expected) == set(VALUE_ACTIVATIONS)
    for name, values in expected.items():
        assert torch.allclose(activate_values(raw, name), values), name


def test_confidence_activations_are_what_they_say() -> None:
    raw = torch.randn(2, 3, dtype=torch.float64)
    expected = {"expp0": raw.exp(), "expp1": 1 + raw.exp(), "sigmoid": raw.sigmoid()}
    assert set(expected) == set(CONFIDENCE_ACTIVATIONS)
    for name, values in expected.items():
        assert torch.allclose(activate_confidence(raw, name), values), name


def test_map_frames_calls_in_order_with_at_most_a_chunk() -> None:
    seen = []

    def double(part: slice) -> tuple[Tensor, Tensor]:
        seen.append((part.start, part.stop))
        frames = torch.arange(part.start, part.stop)
        return 2.0 * frames, frames[:, None].expand(-1, 3)

    with torch.no_grad():
        doubled, plain = map_frames(double, 7, 3, torch.device("cpu"))
    assert seen == [(0, 3), (3, 6), (6, 7)]
    assert doubled.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert plain.shape == (7, 3)
    assert plain.dtype == torch.int64
