"""What MervModel is asked and answers: videos, prompts, visual tokens, answers, one or many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

from torch import Tensor

from merv_fast.models.prefix import Prefix

__all__ = [
    "Answer",
    "Source",
    "VideoSource",
    "VisualTokens",
    "Window",
    "ended_on_error",
    "in_new_tokens",
    "is_list",
    "most_new_tokens",
    "pair",
    "video_key",
]


@dataclass(frozen=True)
class Window:
    """One of the windows that a video was cut into.

    Args:
        start: seconds, as ``clip_start_sec``; None of frames that were already decoded.
        end: seconds, as ``clip_end_sec``.
        encoder_weights: share of each encoder in this window's tokens, or None where the fusion has no weights.
    """

    start: float | None
    end: float | None
    encoder_weights: dict[str, float] | None


@dataclass(frozen=True)
class VisualTokens:
    """One video, encoded: give it to ``MervModel.generate`` in place of a path, as often as there are questions.

    Args:
        tokens: [S, D], what the language model sees of the video; of W windows [W * S, D].
        encoder_weights: share of each encoder in the tokens, or None where the fusion has no weights; of windows, the
            mean of theirs.
        prefix: keys and values of the language model after them, from ``encode(..., prefill=True)``. They serve as long
            as its weights stay the same.
        windows: in order, where there are several.
    """

    tokens: Tensor
    encoder_weights: dict[str, float] | None
    prefix: Prefix | None = field(default=None, repr=False)
    windows: tuple[Window, ...] = ()


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
        windows: as in ``VisualTokens``.
    """

    answer: str
    encoder_weights: dict[str, float] | None
    timings_ms: dict[str, float]
    model: str
    device: str
    windows: tuple[Window, ...] = ()


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


def most_new_tokens(kwargs: Mapping[str, Any], defaults: Any, text_length: int) -> int:
    """How long the answer to a prompt of ``text_length`` tokens may become; 1 where only ``generate`` knows.

    Args:
        kwargs: arguments of ``generate``.
        defaults: the model's ``generation_config``.
        text_length: of the prompt without its video.
    """
    configs = (kwargs.get("generation_config"), defaults)
    if (new := kwargs.get("max_new_tokens")) is not None:
        return new
    if (total := kwargs.get("max_length")) is not None:
        return max(total - text_length, 0)
    return next((config.max_new_tokens for config in configs if config and config.max_new_tokens is not None), 1)


@contextmanager
def ended_on_error(streamer: Any | None) -> Iterator[None]:
    """Tell a streamer that nothing more will come if the block raises: a reader in another thread would wait on."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise
