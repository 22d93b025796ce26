"""What a query sees of the blocks that it does not attend to: their mean, once for each token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels import merge_attention
from retrofit.patterns.call import visible_keys
from retrofit.runtime.errors import UnsupportedError

CHUNK = 1 << 24  # scores held at a time, beside what is there anyway


def add_dropped_means(  # noqa: PLR0913 - both halves of an attention call
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kept: Tensor,
    shown: Tensor,
    block_size: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over kept keys and, for every other block, its mean key and value.

    The result is that of attention to all keys, those of a dropped block replaced by their mean and
    their values by theirs: a block of n tokens weighs `n exp(q mean(k) scale)`. Costs two products
    with one key a block. Beyond https://arxiv.org/abs/2509.07120, which drops them.

    Args:
        out: Over the kept keys, `[B, H, S_q, D]`.
        lse: Its log-sum-exp, `[B, H, S_q]`.
        query: `[B, H, S_q, D]`.
        key: Keys that are cut into blocks, `[B, H_kv, S, D]`.
        value: The same keys' values.
        kept: Blocks attended to, bool `[B, H, n_q, n_k]`.
        shown: Keys that count at all, bool `[B or 1, S]`.
        block_size: Query and key tokens of a block.
        scale: Factor on the scores.

    Returns:
        Output and log-sum-exp.
    """
    block_q, block_k = block_size
    missing = -key.shape[2] % block_k
    weight = pad(shown, (0, missing)).unflatten(1, (-1, block_k)).to(lse.dtype)  # [B, n_k, block]
    count = weight.sum(2)
    mean_key, mean_value = (_pool(x, weight, count, missing, block_k) for x in (key, value))
    groups = query.shape[1] // key.shape[1]
    mean_key = mean_key.repeat_interleave(groups, 1)
    mean_value = mean_value.repeat_interleave(groups, 1)
    bias = count.log()[:, None, None]  # -inf for a block that shows nothing
    rows = max(block_q, CHUNK // max(1, out.shape[0] * out.shape[1] * kept.shape[3]))
    rows -= rows % block_q
    parts = []
    for start in range(0, query.shape[2], rows):
        part = slice(start, start + rows)
        scores = query[:, :, part].to(lse.dtype) @ mean_key.mT * scale + bias
        blocks = kept[:, :, start // block_q : -(-(start + rows) // block_q)]
        hidden = blocks.repeat_interleave(block_q, 2)[:, :, : scores.shape[2]]
        scores = scores.masked_fill(hidden, -torch.inf)
        total = scores.logsumexp(-1)
        seen = (scores - total[..., None]).exp().nan_to_num(0.0) @ mean_value
        parts.append(
            merge_attention([out[:, :, part].to(seen.dtype), seen], [lse[:, :, part], total])
        )
    merged, sums = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return merged.to(out.dtype), sums


def keys_in_means(mask: Tensor | None, columns: Tensor) -> Tensor:
    """Keys that count, bool `[B or 1, S]`, of a mask `[B, H, 1, S]` and the keys' positions `[S]`.

    Raises:
        UnsupportedError: If the mask says more than which keys are hidden.
    """
    if mask is None:
        return torch.ones_like(columns, dtype=torch.bool)[None]
    if mask.shape[2] == 1 and mask.dtype == torch.bool:
        return visible_keys(mask)
    raise UnsupportedError(
        'block-sparse: dropped="mean" expects a bool mask that hides whole keys, got one that '
        'differs between queries or weighs keys. Use dropped="nothing".'
    )


def _pool(x: Tensor, weight: Tensor, count: Tensor, missing: int, block: int) -> Tensor:
    """Means of the tokens that are shown, `[B, H, S, D]` to `[B, H, n, D]`."""
    blocks = pad(x.to(weight.dtype), (0, 0, 0, missing)).unflatten(2, (-1, block))
    summed = torch.einsum("bhntd,bnt->bhnd", blocks, weight.expand(x.shape[0], -1, -1))
    return summed / count.clamp(min=1)[:, None, :, None]
