"""From a conversation to token ids and labels, exactly as the reference makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from merv_fast.models.prompts import PROMPT_BUILDERS
from merv_fast.models.splice import IGNORE_INDEX
from merv_fast.training.data import Entry, Turn

__all__ = ["EntryError", "Tokens", "caption_tokens", "conversation_tokens"]


class EntryError(ValueError):
    """An entry that is well formed but cannot be trained on."""


class Tokens(NamedTuple):
    """``ids`` [S] of a text, without the visual tokens, and ``labels`` [S], -100 where no loss is taken."""

    ids: list[int]
    labels: list[int]


def caption_tokens(entry: Entry, tokenizer: Any, max_length: int) -> Tokens:
    """For the stage ``align``: no question, only the answer and the tokenizer's end mark, all of it learned.

    The label of the first token is -100, which is the BOS where the tokenizer has one.

    Raises:
        EntryError: it has more than one question and one answer, or the answer holds a marker of an image or a video.

    Source: ``AlignVideoDataset.__getitem__`` of the reference.
    """
    caption = entry.turns[-1].text
    if len(entry.turns) != 2:
        raise EntryError(f"{entry.name}: align takes one question and one answer, got {len(entry.turns)} turns")
    if marker := next((marker for marker in ("<image>", "<video>") if marker in caption), None):
        raise EntryError(f"{entry.name}: the answer must not hold a marker, got {marker}")
    ids = tokenizer(caption.strip() + tokenizer.eos_token, truncation=True, max_length=max_length).input_ids
    return _learnable(entry, Tokens(ids, [IGNORE_INDEX, *ids[1:]]), max_length)


def conversation_tokens(entry: Entry, tokenizer: Any, prompt_format: str, max_length: int) -> Tokens:
    """For the other stages: every turn in the language model's prompt format; only the answers are learned.

    Each turn is tokenised by itself, white space at its end cut off, the first one with special tokens; what exceeds
    ``max_length`` is cut off at the end. The system turn that opens a prompt of ``llama3.1-chat`` and ``qwen2.5`` is no
    part of any turn: the reference trains without it, and so do we.

    Raises:
        EntryError: no token of an answer is left.

    Source: ``FinetuneVideoDataset.__getitem__`` of the reference.
    """
    builder = PROMPT_BUILDERS[prompt_format]("merv")
    ids: list[int] = []
    labels: list[int] = []
    for place, turn in enumerate(entry.turns):
        own = _turn_ids(builder.add_turn(turn.role, turn.text), tokenizer, first=place == 0)
        ids += own
        labels += own if learned(turn) else [IGNORE_INDEX] * len(own)
    return _learnable(entry, Tokens(ids[:max_length], labels[:max_length]), max_length)


def learned(turn: Turn) -> bool:
    """Whether a loss is taken of a turn."""
    return turn.role == "gpt"


def _turn_ids(text: str, tokenizer: Any, first: bool) -> Sequence[int]:
    return tokenizer(text.rstrip(), add_special_tokens=first).input_ids


def _learnable(entry: Entry, tokens: Tokens, max_length: int) -> Tokens:
    # Such a row has no loss of its own, and a batch of such rows has the mean of nothing, NaN.
    if all(label == IGNORE_INDEX for label in tokens.labels):
        raise EntryError(f"{entry.name}: nothing of an answer is left in the first {max_length} tokens")
    return tokens
