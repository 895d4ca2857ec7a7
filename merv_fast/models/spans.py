"""The ranges inside an answer that profilers show."""

from __future__ import annotations

import math
from typing import Any

from merv_fast.models.merv_model import MervModel
from merv_fast.runtime.trace import CallSpans

__all__ = ["model_spans"]

GROUPS = 4
"""At most so many groups of blocks an encoder."""


def model_spans(vidlm: MervModel) -> CallSpans:
    """Spans inside ``answer``: each encoder and its groups of blocks, the splice, each call of the language model.

    They last for the ``with`` block, by hooks, so that CUDA graphs give way to plain calls in it.

    Example:
        >>> import merv_fast, torch
        >>> vidlm = merv_fast.load_vid("merv-tiny")
        >>> with model_spans(vidlm), torch.profiler.profile() as profile:
        ...     _ = vidlm.encode(merv_fast.sample_clip())
        >>> "merv/encode/dinov2" in {event.key for event in profile.key_averages()}
        True
    """
    calls, model = CallSpans(), vidlm.model
    for name, encoder in model.video_model.encoders.items():
        calls.around(encoder, f"encode/{name}")
        blocks = encoder.blocks
        size = math.ceil(len(blocks) / GROUPS)
        for first in range(0, len(blocks), size):
            last = min(first + size, len(blocks)) - 1
            group = f"{first}-{last}" if first < last else first
            calls.between(blocks[first], blocks[last], f"encode/{name}/blocks {group}")
    calls.gap(model.get_input_embeddings(), model.language_model, splice)
    calls.around(model.language_model, phase)
    return calls


def splice(args: tuple[Any, ...], kwargs: Any) -> str | None:
    """What follows the embedding of a prompt; that of one token has no visual tokens to place."""
    return "splice" if args[0].shape[1] > 1 else None


def phase(args: tuple[Any, ...], kwargs: Any) -> str:
    """What a call of the language model does: a prompt has many tokens, decoding feeds one at a time."""
    return "prefill" if kwargs["inputs_embeds"].shape[1] > 1 else "decode_text"
