"""A text in a padded batch gets what it gets alone, whatever the method."""

from __future__ import annotations

import pytest
import torch

import retrofit
from retrofit.patching.padding import PaddingReader, Span, read_spans
from tests.methods_table import TABLE
from tests.tiny_models import make_bert, make_minilm

TEXTS = {name: row for name, row in TABLE.items() if "bert-padded" in row.models}
LENGTHS = (41, 17, 33)


def padded_batch(side: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        part = slice(length) if side == "right" else slice(max(LENGTHS) - length, None)
        ids[row, part] = torch.randint(5, 100, (length,), generator=generator)
        mask[row, part] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_a_row_of_a_batch_equals_the_row_alone(name):
    model, batch = make_minilm(), padded_batch("right")
    with retrofit.patch(model, TEXTS[name].config):
        together = model(**batch).last_hidden_state
        for row, length in enumerate(LENGTHS):
            alone = model(input_ids=batch["input_ids"][row : row + 1, :length]).last_hidden_state
            torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_that_are_padded_on_the_left_are_cut_at_their_own_start():
    model, batch = make_bert(), padded_batch("left")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with retrofit.patch(model, "window", window_size=9):
        together = model(**batch, position_ids=positions).last_hidden_state
        for row, length in enumerate(LENGTHS):
            alone = model(input_ids=batch["input_ids"][row : row + 1, -length:]).last_hidden_state
            torch.testing.assert_close(together[row, -length:], alone[0], rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_row():
    model, batch = make_bert(), padded_batch("right")
    with retrofit.patch(model, "window", window_size=9):
        out = model(**batch).last_hidden_state
    (out * batch["attention_mask"][..., None]).square().sum().backward()
    rows = model.embeddings.word_embeddings.weight.grad[batch["input_ids"]]
    assert bool((rows.abs().sum(-1) > 0)[batch["attention_mask"] == 1].all())


SHOWN = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
SPANS = (Span(0, 3), Span(1, 2), Span(0, 4), Span(4, 0))


def as_float(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    ("mask", "spans"),
    [
        (SHOWN[:, None, None], SPANS),
        (SHOWN[:, None, None].expand(-1, -1, 4, -1), SPANS),
        (SHOWN[:, None, None].expand(-1, -1, 4, -1).contiguous(), SPANS),
        (as_float(SHOWN[:, None, None]), SPANS),
        (torch.ones(2, 1, 1, 4).bool(), None),
        (torch.ones(1, 1, 4, 4).tril().bool(), None),
        (torch.tensor([[1, 0, 1, 1]]).bool()[:, None, None], None),
        (as_float(SHOWN[:, None, None]) + 0.5, None),
        (SHOWN[:, None, None].expand(-1, 2, -1, -1), None),
        (SHOWN, None),
    ],
)
def test_a_mask_that_only_hides_padding_is_told_from_others(mask, spans):
    assert read_spans(mask) == spans


def test_a_mask_is_read_again_once_it_has_changed():
    reader, mask = PaddingReader(), SHOWN[:1, None, None].clone()
    assert reader.spans(mask) == (Span(0, 3),)
    mask[..., 2] = False
    assert reader.spans(mask) == (Span(0, 2),)
    assert reader.spans(SHOWN[1:2, None, None]) == (Span(1, 2),)
