"""Where visual tokens stand in a prompt: placeholders that give what the reference's splice of embeddings gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["IGNORE_INDEX", "insert_placeholders", "pad", "resize_placeholders"]

IGNORE_INDEX = -100
"""Label of a position that no loss is taken of."""


def insert_placeholders(
    input_ids: Tensor,
    count: int,
    video_token_id: int,
    bos_token_length: int,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make room for ``count`` visual tokens after the BOS, or first where the tokenizer has none.

    Args:
        input_ids: [B, S] int64, padded on the right if at all.
        count: visual tokens of each video.
        video_token_id: id of a placeholder.
        bos_token_length: 1 where each row begins with BOS, else 0.
        attention_mask: [B, S], default all ones.
        labels: [B, S].

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` of [B, S + count]; visual positions have mask 1 and label -100.

    Source: ``MERV.forward`` of the reference, which concatenates embeddings at the same place.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    return (
        _insert(input_ids, count, video_token_id, bos_token_length),
        _insert(attention_mask, count, 1, bos_token_length),
        None if labels is None else _insert(labels, count, IGNORE_INDEX, bos_token_length),
    )


def resize_placeholders(
    ids: Tensor, mask: Tensor, counts: Sequence[int], video_token_id: int, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, S'] of prompts [B, S] that have one run of placeholders each, now ``counts`` long.

    >>> ids = torch.tensor([[1, 3, 3, 7], [0, 3, 3, 8]])
    >>> resize_placeholders(ids, ids != 0, [3, 1], video_token_id=3, pad_token_id=0)[0]
    tensor([[1, 3, 3, 3, 7],
            [0, 0, 0, 3, 8]])
    """
    rows = []
    for row, kept, count in zip(ids, mask, counts, strict=True):
        row = row[kept.bool()]
        places = (row == video_token_id).nonzero()
        parts = row[: places[0]], row.new_full((count,), video_token_id), row[places[-1] + 1 :]
        rows.append(torch.cat(parts).tolist())
    return pad(rows, pad_token_id)


def pad(rows: list[list[int]], pad_token_id: int, side: str = "left") -> tuple[Tensor, Tensor]:
    """Stack ragged prompts [S_i] into ids and mask [B, S]; padded on the left, all end together."""
    if side not in ("left", "right"):
        raise ValueError(f"pad: side must be 'left' or 'right', got {side!r}")
    ids = torch.full((len(rows), max(map(len, rows))), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
        at = slice(len(row_ids) - len(row), None) if side == "left" else slice(len(row))
        row_ids[at] = torch.tensor(row)
        row_mask[at] = 1
    return ids, mask


def _insert(rows: Tensor, count: int, value: int, at: int) -> Tensor:
    return torch.cat([rows[:, :at], rows.new_full((len(rows), count), value), rows[:, at:]], dim=1)
