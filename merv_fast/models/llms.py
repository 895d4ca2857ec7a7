"""The language models MERV's configurations name: where they are and how their prompts look."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LLMS", "LanguageModel", "language_model"]


@dataclass(frozen=True)
class LanguageModel:
    """One row of the table.

    ``pad_token`` is the token MERV pads with, added to the tokenizer if it is not there; ``video_token`` marks the
    place of a visual token: one the tokenizer knows already, or one that is added. It is not ``<video>``, which people
    write in their questions, and which the reference reads as plain text.
    """

    hub_id: str
    prompt_format: str
    tokenizer_id: str | None = None
    """Repository of the tokenizer, where it is another."""
    pad_token: str | None = "<PAD>"
    video_token: str = "<|video_pad|>"


LLMS: dict[str, LanguageModel] = {
    "llama2-7b-pure": LanguageModel("meta-llama/Llama-2-7b-hf", "pure"),
    "llama2-13b-pure": LanguageModel("meta-llama/Llama-2-13b-hf", "pure"),
    "llama2-7b-chat": LanguageModel("meta-llama/Llama-2-7b-chat-hf", "llama2-chat"),
    "llama2-13b-chat": LanguageModel("meta-llama/Llama-2-13b-chat-hf", "llama2-chat"),
    "vicuna-v15-7b": LanguageModel("lmsys/vicuna-7b-v1.5", "vicuna-v15"),
    "vicuna-v15-13b": LanguageModel("lmsys/vicuna-13b-v1.5", "vicuna-v15"),
    "llama3-8b-pure": LanguageModel("meta-llama/Meta-Llama-3-8B", "pure"),
    "llama3-8b-chat": LanguageModel(
        "meta-llama/Meta-Llama-3-8B-Instruct", "llama2-chat", tokenizer_id="meta-llama/Meta-Llama-3-8B"
    ),
    "llama3.1-8b-chat": LanguageModel(
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "llama3.1-chat",
        pad_token="<|finetune_right_pad_id|>",
        video_token="<|reserved_special_token_0|>",
    ),
    "qwen2.5-7b-instruct": LanguageModel("Qwen/Qwen2.5-7B-Instruct", "qwen2.5", pad_token=None),
    "qwen2.5-3b-instruct": LanguageModel("Qwen/Qwen2.5-3B-Instruct", "qwen2.5", pad_token=None),
}
"""Language models by the reference's ``llm_backbone_id``."""


def language_model(llm_backbone_id: str) -> LanguageModel:
    """The row of ``llm_backbone_id``; an unknown id is a ``ValueError`` that lists those known."""
    if llm_backbone_id not in LLMS:
        raise ValueError(f"llm_backbone_id must be one of {', '.join(LLMS)}, got {llm_backbone_id!r}")
    return LLMS[llm_backbone_id]
