"""Projectors learn to tell what is where in the language model's own words, before it learns to listen to them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.training.tiny.clips import SLOTS, Clips, Truth
from merv_fast.training.tiny.pretraining import EVERY, means
from merv_fast.training.tiny.scenes import COLOURS, SHAPES

__all__ = ["WORDS", "align", "words_in"]

logger = logging.getLogger("merv_fast")

WORDS = (*COLOURS, *SHAPES)
RARE = -3.0
"""Logit of a word of which a token says nothing: most tokens are of the background."""


def words_in(truth: Tensor, cells: int) -> Tensor:
    """Which of ``WORDS`` are true of some patch of each visual token: [B, T * cells ** 2, words].

    Args:
        truth: [B, fields of `Truth`, T, grid, grid].
        cells: visual tokens along a side of a slot.
    """
    found = []
    for field, names in (("colour", COLOURS), ("shape", SHAPES)):
        told = truth[:, Truth._fields.index(field), ..., None] == torch.arange(1, len(names) + 1)
        patches = told.unflatten(3, (cells, -1)).unflatten(2, (cells, -1))
        found.append(patches.any(5).any(3).flatten(1, 3))
    return torch.cat(found, -1)


def align(
    model: MervForConditionalGeneration,
    tokenizer: Any,
    clips: Clips,
    features: Sequence[NDArray[np.float16]],
    steps: int,
    batch: int = 16,
    rate: float = 1e-2,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Train the projectors alone: a visual token is to be near the embeddings of the words that are true of it.

    The fusion is set to weigh all encoders alike, whatever it sees.

    Args:
        model: to be trained.
        tokenizer: its tokenizer, to which each of ``WORDS`` is one token.
        clips: to learn from.
        features: what the encoders returned for them.
        steps: how many batches.
        batch: clips of a step.
        rate: the learning rate at first.
        seed: of the choice of clips.

    Returns:
        Loss, and the share of true words that are told, every `EVERY` steps the mean since the last.
    """
    from rich.progress import track

    video = model.video_model
    ids = tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in WORDS])
    words = model.get_input_embeddings()(torch.tensor(ids)).detach()
    words = words / words.norm(dim=1, keepdim=True)
    fusion: Any = video.tail.fusion
    torch.nn.init.zeros_(fusion.k_proj.weight)
    learning = list(video.tail.projectors.parameters())
    optimiser = torch.optim.AdamW(learning, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    rng = np.random.default_rng([seed, 3])
    log: list[dict[str, float]] = []
    since: list[dict[str, float]] = []
    for _ in track(range(steps), "words"):
        chosen = np.sort(rng.choice(len(clips.truth), batch, replace=False))
        tokens = video.fuse([torch.from_numpy(each[chosen]).float() for each in features]).pooler_output
        cells = round((tokens.shape[1] // SLOTS) ** 0.5)
        true = words_in(torch.from_numpy(clips.truth[chosen]), cells)
        told = 2 * tokens @ words.T + RARE
        loss = binary_cross_entropy_with_logits(told, true.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        since.append({"loss": loss.item(), "told": (told > 0)[true].float().mean().item()})
        if len(since) == EVERY:
            log.append(means(since))
            since = []
            logger.info("words, step %d: %s", len(log) * EVERY, log[-1])
    return log
