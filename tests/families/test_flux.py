"""FLUX's grid comes from position ids, which say rows and columns and what is no picture at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
)
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import nn

import retrofit
from retrofit.layout.grid import TokenGrid
from retrofit.runtime.errors import GridError, UnsupportedError
from tests.families.recording import DenseConfig, clear_notes, describe
from tests.tiny_models import (
    call_diffusers,
    make_flux,
    make_flux_dev,
    make_flux_inputs,
    make_kontext_inputs,
    make_position_ids,
)


def read(ids: torch.Tensor, **changes) -> TokenGrid:
    model = make_flux()
    clear_notes()
    with retrofit.patch(model, DenseConfig()):
        call_diffusers(model, inputs_for(ids, **changes))
    return DenseConfig.grids[0][1]


def inputs_for(ids: torch.Tensor, text: int = 9) -> dict:
    inputs = make_flux_inputs()
    return {
        **inputs,
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "hidden_states": torch.randn(1, ids.shape[-2], 4),
        "encoder_hidden_states": torch.randn(1, text, 12),
    }


@pytest.mark.parametrize("size", [(2, 18), (18, 2), (6, 6), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("text", [1, 9])
def test_rows_and_columns_are_told_apart_at_one_number_of_tokens(size, text):
    grid = TokenGrid(height=size[0], width=size[1], num_prefix_tokens=text)
    assert read(make_position_ids(*size), text=text) == grid
    assert read(make_position_ids(*size)[None], text=text) == grid  # as older pipelines give them


def test_ids_in_half_precision_which_repeat_beyond_256_are_read_right():
    ids = make_position_ids(2, 515).bfloat16()
    assert ids[:, 2].unique().numel() < 515
    assert read(ids) == TokenGrid(height=2, width=515, num_prefix_tokens=9)
    tall = make_position_ids(515, 2).bfloat16()
    assert read(tall) == TokenGrid(height=515, width=2, num_prefix_tokens=9)


def test_ids_that_begin_elsewhere_or_lie_closer_are_a_picture_too():
    ids = make_position_ids(4, 6)
    ids[:, 1:] = ids[:, 1:] * 0.5 + 40
    assert read(ids) == TokenGrid(height=4, width=6, num_prefix_tokens=9)


def _placed(height: int, width: int, row: int, column: int) -> torch.Tensor:
    return make_position_ids(height, width, 1) + torch.tensor([0, row, column])


FURTHER = {
    "of two kinds": [make_position_ids(3, 3, 1), make_position_ids(2, 5, 2)],
    "of one kind": [make_position_ids(3, 3, 1), make_position_ids(2, 5, 1)],
    "side by side": [_placed(3, 3, 4, 0), _placed(2, 5, 4, 3)],
    "in half precision": [_placed(3, 3, 300, 300).bfloat16(), _placed(2, 5, 300, 600).bfloat16()],
}


@pytest.mark.parametrize("name", FURTHER)
def test_two_reference_pictures_are_tokens_behind_the_grid(name):
    references = ((1, 3, 3), (1, 2, 5))
    grid = TokenGrid(height=4, width=6, num_prefix_tokens=9, num_suffix_tokens=19)
    ids = torch.cat([make_position_ids(4, 6), *(part.float() for part in FURTHER[name])])
    assert read(ids) == replace(grid, references=references)


@pytest.mark.parametrize(
    ("last", "references"),
    [
        (make_position_ids(3, 3, 2)[torch.tensor([0, 3, 8, 1, 4, 6, 2, 7, 5])], ((1, 2, 5),)),
        (make_position_ids(3, 3, 2)[:-1], ((1, 2, 5),)),
        (torch.tensor([[2.0, 0.0, 0.0]]), ((1, 2, 5), (1, 1, 1))),
    ],
    ids=["shuffled", "a token short", "one token"],
)
def test_further_tokens_that_are_no_picture_are_only_special(last, references):
    ids = torch.cat([make_position_ids(4, 6), make_position_ids(2, 5, 1), last])
    grid = TokenGrid(height=4, width=6, num_prefix_tokens=9, num_suffix_tokens=10 + len(last))
    assert read(ids) == replace(grid, references=references)


def _shuffled() -> torch.Tensor:
    return make_position_ids(4, 6)[torch.randperm(24, generator=torch.Generator().manual_seed(1))]


BROKEN = {
    "columns first": make_position_ids(4, 6)[:, [0, 2, 1]],
    "shuffled": _shuffled(),
    "two pictures of one kind": torch.cat([make_position_ids(4, 6)] * 2),
    "a token too many": torch.cat([make_position_ids(4, 6), torch.tensor([[0.0, 4.0, 0.0]])]),
    "rolled, before a reference": torch.cat(
        [make_position_ids(4, 6).roll(9, 0), make_position_ids(3, 3, 1)]
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_ids_that_are_no_picture_row_by_row_are_refused(name):
    with pytest.raises(GridError, match="expected `img_ids` of one picture, row by row"):
        read(BROKEN[name])


def test_fewer_ids_than_tokens_are_refused():
    model, inputs = make_flux(), inputs_for(make_position_ids(4, 6))
    inputs["hidden_states"] = torch.randn(1, 25, 4)
    with (
        retrofit.patch(model, DenseConfig()),
        pytest.raises(GridError, match=r"img_ids: expected \[25, 3\]"),
    ):
        call_diffusers(model, inputs)


def compiled_window(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def test_a_graph_has_the_grid_of_an_earlier_call_and_refuses_another():
    model = make_flux(num_single_layers=0)
    wide, tall = inputs_for(make_position_ids(3, 12)), inputs_for(make_position_ids(12, 3))
    with retrofit.patch(model, "window", window_size=4):
        eager = call_diffusers(model, wide)
        compiled = compiled_window(model)
        torch.testing.assert_close(call_diffusers(compiled, wide), eager)
        with pytest.raises(RuntimeError, match="rows and columns that the graph was traced for"):
            call_diffusers(compiled, tall)
        eager = call_diffusers(model, tall)
        torch.testing.assert_close(call_diffusers(compiled, tall), eager)


def test_a_graph_without_an_earlier_call_takes_squares_alone():
    model = make_flux(num_single_layers=0)
    square, wide = inputs_for(make_position_ids(6, 6)), inputs_for(make_position_ids(3, 12))
    with retrofit.patch(model, "window", window_size=4):
        compiled = compiled_window(model)
        out = call_diffusers(compiled, square)
        with pytest.raises(RuntimeError, match="Call the network once without the compiler"):
            call_diffusers(compiled, wide)
        torch.testing.assert_close(out, call_diffusers(model, square))


def test_a_graph_keeps_reference_pictures_out_of_the_grid_and_refuses_others():
    model, inputs = make_flux_dev(num_single_layers=0), make_kontext_inputs(odd=True)
    own = make_position_ids(11, 7)
    with retrofit.patch(model, "window", window_size=4):
        eager = call_diffusers(model, inputs)
        compiled = compiled_window(model)
        torch.testing.assert_close(call_diffusers(compiled, inputs), eager)
        inputs["img_ids"] = torch.cat([own, make_position_ids(6, 5, kind=1)])
        with pytest.raises(RuntimeError, match="rows and columns that the graph was traced for"):
            call_diffusers(compiled, inputs)


@pytest.mark.parametrize("backend", [AttentionBackendName.FLEX, AttentionBackendName.SAGE])
def test_attention_backends_other_than_pytorchs_are_refused(backend):
    model = make_flux()
    model.single_transformer_blocks[1].attn.processor._attention_backend = backend
    assert list(describe(model).unreachable) == ["single_transformer_blocks.1.attn"]
    with pytest.raises(UnsupportedError, match=f"backend is '{backend.value}'"):
        retrofit.patch(model, DenseConfig())


def test_fused_projections_change_nothing():
    model, inputs = make_flux(), make_flux_inputs(odd=True)
    with retrofit.patch(model, "window", window_size=4):
        out = call_diffusers(model, inputs)
        model.fuse_qkv_projections()
        torch.testing.assert_close(call_diffusers(model, inputs), out)
    assert describe(model).sites == describe(make_flux()).sites


def test_an_ip_adapter_keeps_its_own_attention_dense():
    model, inputs = make_flux(), make_flux_inputs(odd=True)
    processor = FluxIPAdapterAttnProcessor(32, 16, num_tokens=(4,))
    model.transformer_blocks[0].attn.set_processor(processor)
    model.encoder_hid_proj = nn.Identity()

    def call():
        pictures = [torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(3))]
        more = {"joint_attention_kwargs": {"ip_adapter_image_embeds": pictures}}
        return call_diffusers(model, inputs | more)

    dense = call()
    with retrofit.patch(model, "window", window_size=512) as patch:
        torch.testing.assert_close(call(), dense, rtol=1e-5, atol=1e-5)
        counts = patch.sites["transformer_blocks.0.attn"].counts
        assert (counts.patched, counts.dense) == (1, 1)
    with retrofit.patch(model, "window", window_size=4):
        assert not torch.allclose(call(), dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [FluxPipeline, FluxKontextPipeline])
def test_pipelines_give_the_ids_that_are_read(kind):
    levels = 4
    vae = AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=2,
        shift_factor=0.0,
    )
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=make_flux_dev(in_channels=16),
        **dict.fromkeys(encoders),
    )
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 112, "width": 208, "num_inference_steps": 2, "output_type": "latent"}
    references = ()
    if kind is FluxKontextPipeline:
        settings |= {
            "image": torch.rand(1, 3, 96, 64),
            "_auto_resize": False,
            "max_area": 112 * 208,
        }
        references = ((1, 6, 4),)
    text = {"prompt_embeds": torch.randn(1, 9, 12), "pooled_prompt_embeds": torch.randn(1, 12)}
    clear_notes()
    with retrofit.patch(pipe, DenseConfig()):
        pipe(**text, **settings)
    grid = TokenGrid(
        height=7,
        width=13,
        num_prefix_tokens=9,
        num_suffix_tokens=24 * len(references),
        references=references,
    )
    assert {read for _, read in DenseConfig.grids} == {grid}
    assert len(DenseConfig.grids) == 2 * 3
