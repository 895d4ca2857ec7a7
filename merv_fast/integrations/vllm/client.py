"""A client that sends embeddings to vLLM's OpenAI-compatible server; needs nothing but Python's own library."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from merv_fast.integrations.vllm.prompts import payload

__all__ = ["complete"]


def complete(
    embeds: Sequence[Tensor],
    *,
    model: str,
    url: str = "http://localhost:8000/v1",
    api_key: str | None = None,
    timeout: float = 600.0,
    **sampling: Any,
) -> list[str]:
    """Answers of a server to prompts made by `prompt_embeds`, in order, in one request.

    Args:
        embeds: [S_i, D] of each prompt.
        model: name under which the server has the language model.
        url: of its API, up to ``/v1``.
        api_key: sent as a bearer token, if the server asks for one.
        timeout: seconds until the server has answered.
        sampling: fields of the completions API, such as ``max_tokens``, ``temperature``, ``stop``; vLLM's own too.

    Raises:
        ValueError: no prompt, or more than one answer asked of each.
        ConnectionError: nobody answers at ``url``.
        RuntimeError: the server refuses; its own words are in the message.
    """
    if not embeds:
        raise ValueError("complete: embeds must be at least one prompt, got none")
    if sampling.get("n", 1) != 1 or sampling.get("stream"):
        raise ValueError("complete: n must be 1 and stream left out: one text is returned for each prompt")
    body = {"model": model, "prompt_embeds": [payload(each) for each in embeds], **sampling}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    address = f"{url.rstrip('/')}/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            choices = json.load(response)["choices"]
    except urllib.error.HTTPError as error:
        words = error.read(4096).decode(errors="replace")
        raise RuntimeError(f"complete: {address} refused the request ({error.code}): {words}") from error
    except (urllib.error.URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(f"complete: no answer from {address} within {timeout:g} s ({reason})") from error
    ordered = sorted(choices, key=lambda choice: choice["index"])
    if len(ordered) != len(embeds):
        raise RuntimeError(f"complete: {address} must return {len(embeds)} answers, got {len(ordered)}")
    return [choice["text"].strip() for choice in ordered]
