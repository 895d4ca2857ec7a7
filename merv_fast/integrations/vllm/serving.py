"""The language model of a MERV by itself, and the command that serves it."""

from __future__ import annotations

import shlex
from pathlib import Path

from merv_fast.models import MervModel

__all__ = ["VLLM_RANGE", "serve_command", "write_language_model"]

VLLM_RANGE = ">=0.20,<0.34"
"""From the oldest that the extra allows to the newest whose source was read; no other's was."""


def write_language_model(model: MervModel, folder: str | Path, max_shard_size: str = "5GB") -> Path:
    """Write the language model and its tokenizer where transformers and vLLM load them, without the video model.

    Raises:
        FileExistsError: the folder holds another model.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"serve-llm: {folder} must be a new or empty folder, got one with files")
    model.model.language_model.save_pretrained(folder, max_shard_size=max_shard_size)
    model.tokenizer.save_pretrained(folder)
    return folder


def serve_command(model: MervModel, folder: str | Path, *, port: int = 8000, answer_tokens: int = 512) -> str:
    """The shell command that serves what `write_language_model` wrote, for the prompts of this model.

    Args:
        model: says how long a prompt may be: its visual tokens, and text up to ``max_text_length``.
        folder: with the language model.
        port: of the server.
        answer_tokens: tokens of an answer that must fit too.
    """
    config = model.config.get_text_config()
    longest = model.model.video_model.num_video_tokens + model.config.max_text_length + answer_tokens
    positions = getattr(config, "max_position_embeddings", None) or longest
    dtype = str(model.dtype).removeprefix("torch.")
    words = ["vllm", "serve", str(folder), "--enable-prompt-embeds", "--dtype", dtype]
    words += [
        "--max-model-len",
        str(min(longest, positions)),
        "--served-model-name",
        model.model_id,
        "--port",
        str(port),
    ]
    return shlex.join(words)
