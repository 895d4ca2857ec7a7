"""What MervModel is asked and answers: videos, prompts, visual tokens, answers, one or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

from torch import Tensor

from merv_fast.models.prefix import Prefix

__all__ = ["Answer", "Source", "VideoSource", "VisualTokens", "in_new_tokens", "is_list", "pair", "video_key"]


@dataclass(frozen=True)
class VisualTokens:
    """One video, encoded: give it to ``MervModel.generate`` in place of a path, as often as there are questions.

    Args:
        tokens: [S, D], what the language model sees of the video.
        encoder_weights: share of each encoder in the tokens, or None where the fusion has no weights.
        prefix: keys and values of the language model after them, from ``encode(..., prefill=True)``. They serve as long
            as its weights stay the same.
    """

    tokens: Tensor
    encoder_weights: dict[str, float] | None
    prefix: Prefix | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Answer:
    """An answer and how it came about.

    Args:
        answer: the text.
        encoder_weights: as in ``VisualTokens``.
        timings_ms: wall-clock milliseconds of ``decode``, ``prepare``, ``encode``, ``fuse`` and ``generate``, after
            ``cache`` where the model has one; of the whole batch, where the question was one of several.
        model: the model's id.
        device: where it ran.
    """

    answer: str
    encoder_weights: dict[str, float] | None
    timings_ms: dict[str, float]
    model: str
    device: str


Source = str | PathLike[str] | Tensor | None
"""A video to encode: a path, frames already decoded (uint8 [F, H, W, 3]), or None for no video (the reference then sees
zeros)."""

VideoSource = Source | VisualTokens
"""A video to ask about: one to encode, or one already encoded."""


def is_list(value: Any) -> bool:
    """Whether a caller gave several; a text is one."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def pair(video: Any, prompt: Any) -> tuple[list[VideoSource], list[str]]:
    """Lists of equal length, one video or prompt repeated for a list of the other."""
    videos = list(video) if is_list(video) else [video]
    prompts = list(prompt) if is_list(prompt) else [prompt]
    if not is_list(video):
        videos *= len(prompts)
    elif not is_list(prompt):
        prompts *= len(videos)
    for source in videos:
        if not (source is None or isinstance(source, (str, PathLike, Tensor, VisualTokens))):
            rule = "a path, frames, VisualTokens, None, or a list of them"
            raise TypeError(f"generate: video must be {rule}, got {type(source).__name__}")
    for text in prompts:
        if not isinstance(text, str):
            raise TypeError(f"generate: prompt_text must be a str or a list of them, got {type(text).__name__}")
    if len(videos) != len(prompts):
        raise ValueError(f"generate: videos and prompts must be equally many, got {len(videos)} and {len(prompts)}")
    return videos, prompts


def video_key(source: VideoSource) -> Any:
    """What makes two entries of a list the same video."""
    return id(source) if isinstance(source, (Tensor, VisualTokens)) else source and fspath(source)


def in_new_tokens(kwargs: dict[str, Any], text_lengths: list[int]) -> dict[str, Any]:
    """``min_length`` and ``max_length``, of prompt text and answer together, as numbers of new tokens."""
    kwargs = dict(kwargs)
    for name, new_name in (("min_length", "min_new_tokens"), ("max_length", "max_new_tokens")):
        total = kwargs.pop(name, None)
        if total is None or new_name in kwargs:
            continue
        counts = {max(total - length, 0) for length in text_lengths}
        if len(counts) > 1:
            raise ValueError(
                f"generate: {name} must be given as {new_name} for prompts of different lengths, got {total}"
            )
        kwargs[new_name] = counts.pop()
    return kwargs
