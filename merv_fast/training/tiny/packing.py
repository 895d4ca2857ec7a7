"""All questions about a clip in one row, sharing its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.splice import IGNORE_INDEX
from merv_fast.training.data import Entry, Turn
from merv_fast.training.tiny.questions import Question
from merv_fast.training.tokens import conversation_tokens

__all__ = ["Rows", "pack", "run_rows"]


class Rows(NamedTuple):
    """Questions and answers of a batch of clips.

    Args:
        ids: [B, S], BOS and places for the visual tokens, then every question with its answer.
        labels: [B, S], -100 but for answers.
        positions: [B, S]: each question follows the visual tokens as if it were alone.
        owners: [B, S], which question a token belongs to, from 1; 0 for what all share, -1 for padding.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    owners: Tensor

    def mask(self) -> Tensor:
        """[B, 1, S, S]: a token sees those before it that all share, or that are of its own question."""
        owners = self.owners
        shared = (owners == 0)[:, None] | (owners[:, :, None] == owners[:, None])
        return (shared & torch.ones(shared.shape[1:], dtype=torch.bool).tril())[:, None]


def pack(asked: Sequence[Sequence[Question]], model: MervForConditionalGeneration, tokenizer: Any) -> Rows:
    """The rows of the questions about each clip of a batch."""
    config, visual = model.config, model.video_model.num_video_tokens
    rows = []
    for questions in asked:
        row = [[tokenizer.bos_token_id] + [config.video_token_id] * visual]
        row += [[IGNORE_INDEX] * (visual + 1), list(range(visual + 1)), [0] * (visual + 1)]
        for owner, question in enumerate(questions, 1):
            turns = (Turn("human", question.text), Turn("gpt", question.answer))
            ids, labels = conversation_tokens(Entry("", None, turns), tokenizer, config.prompt_format, 256)
            own = (ids[1:], labels[1:], range(visual + 1, visual + len(ids)), [owner] * (len(ids) - 1))
            for column, more in zip(row, own, strict=True):
                column.extend(more)
        rows.append(row)
    fill = (tokenizer.pad_token_id, IGNORE_INDEX, 0, -1)
    columns = ([torch.tensor(row[place]) for row in rows] for place in range(4))
    padded = (nn.utils.rnn.pad_sequence(column, True, value) for column, value in zip(columns, fill, strict=True))
    return Rows(*padded)


def run_rows(model: MervForConditionalGeneration, rows: Rows, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits at the answers' tokens, and those tokens."""
    video = model.video_model.fuse(features)
    hidden = model.get_decoder()(
        inputs_embeds=model.embed(rows.ids, video), attention_mask=rows.mask(), position_ids=rows.positions
    ).last_hidden_state
    learned = rows.labels[:, 1:] != IGNORE_INDEX
    return model.get_output_embeddings()(hidden[:, :-1][learned]), rows.labels[:, 1:][learned]
