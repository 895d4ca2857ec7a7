"""Questions about videos as embeddings, which vLLM takes for any language model."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from merv_fast.models import MervModel, VisualTokens
from merv_fast.models.merv_model import TOKENIZING
from merv_fast.models.requests import VideoSource, pair, video_key
from merv_fast.models.splice import resize_placeholders
from merv_fast.models.video_model import MervVideoOutput

__all__ = ["payload", "prompt_embeds"]


@torch.inference_mode()
def prompt_embeds(
    model: MervModel,
    videos: VideoSource | Sequence[VideoSource],
    prompts: str | Sequence[str],
    **clip: Any,
) -> list[Tensor]:
    """What the language model is given for each question: text and visual tokens as embeddings.

    With vLLM in the same process, whose engine was made with ``enable_prompt_embeds=True`` of the language model alone
    (``merv-fast serve-llm`` writes it)::

        embeds = prompt_embeds(vidlm, ["a.mp4", "b.mp4"], prompt)
        outputs = llm.generate([{"prompt_embeds": each} for each in embeds], sampling_params)

    Args:
        model: encodes; its language model gives only the embeddings of the text. Videos that are already encoded
            (`VisualTokens`, as an encoded corpus gives them) need no encoder.
        videos: as for ``MervModel.generate``; one that occurs several times is encoded once.
        prompts: from ``get_prompt_builder``; one for each video, or one for all, or several of one video.
        clip: clip bounds, ``windows``, ``decoder``, as ``MervModel.encode`` takes them.

    Returns:
        [S_i, D] for each question, contiguous, on the CPU, in the dtype of the model.

    Raises:
        ValueError, TypeError, VideoError: as ``MervModel.generate``.

    Source: ``EmbedsPrompt`` of vLLM.
    """
    sources, texts = pair(videos, prompts)
    encoded: dict[Any, VisualTokens] = {}
    for source in sources:
        if video_key(source) not in encoded:
            encoded[video_key(source)] = source if isinstance(source, VisualTokens) else model.encode(source, **clip)
    with TOKENIZING:
        inputs = model.processor(
            [model.processor.video_token + text for text in texts],
            truncation=True,
            max_length=model.config.max_text_length,
        )
    video_id, pad_id = model.config.video_token_id, model.tokenizer.pad_token_id
    tokens = [encoded[video_key(source)].tokens.to(model.device) for source in sources]
    lengths = [len(each) for each in tokens]
    ids, mask = resize_placeholders(inputs["input_ids"], inputs["attention_mask"], lengths, video_id, pad_id)
    embeds = model.model.embed(ids.to(model.device), MervVideoOutput(pooler_output=tokens)).to("cpu")
    return [row[kept.bool()].contiguous() for row, kept in zip(embeds, mask, strict=True)]


def payload(embeds: Tensor) -> str:
    """One prompt [S, D] as a server of vLLM takes it in ``prompt_embeds``: base64 of what ``torch.save`` writes.

    >>> import torch
    >>> payload(torch.zeros(2, 3))[:4]
    'UEsD'
    """
    if embeds.ndim != 2 or not embeds.is_floating_point():
        raise ValueError(f"payload: embeds must be floating point [S, D], got {embeds.dtype} {list(embeds.shape)}")
    buffer = io.BytesIO()
    # A view would bring along all of the memory that it is a part of.
    torch.save(embeds.detach().cpu().clone(memory_format=torch.contiguous_format), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
