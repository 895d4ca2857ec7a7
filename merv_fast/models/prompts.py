"""Prompt builders: the text each family of language models was trained to continue.

Formats are those of MERV's ``PromptBuilder`` classes; ``tests/golden/prompts.json`` holds their output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

__all__ = [
    "PROMPT_BUILDERS",
    "LLaMa2ChatPromptBuilder",
    "LLaMa31PromptBuilder",
    "PromptBuilder",
    "PurePromptBuilder",
    "Qwen2PromptBuilder",
    "VicunaV15ChatPromptBuilder",
]

ASSISTANT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


class PromptBuilder(ABC):
    """Turns alternating ``human`` and ``gpt`` turns into one prompt, without the BOS that the tokenizer adds.

    Args:
        model_family: accepted for compatibility with MERV's builders; every family shares one default prompt.
        system_prompt: replaces the family's own, where the format has one.

    Example:
        >>> builder = PurePromptBuilder()
        >>> _ = builder.add_turn(role="human", message="What happens in this video?")
        >>> builder.get_prompt()
        'In: What happens in this video?\\nOut:'
    """

    default_system_prompt: ClassVar[str] = ""
    strips_messages: ClassVar[bool] = True
    """Whether a message loses ``<image>`` markers and outer white space, and a prompt its trailing space."""

    def __init__(self, model_family: str = "merv", system_prompt: str | None = None) -> None:
        self.model_family = model_family
        self.system_prompt = self.default_system_prompt if system_prompt is None else system_prompt
        self.prompt = self.opening()
        self.turn_count = 0

    def opening(self) -> str:
        """The text before the first turn."""
        return ""

    @abstractmethod
    def human(self, message: str, first: bool) -> str:
        """The text of a question, ending where the answer begins."""

    @abstractmethod
    def gpt(self, message: str) -> str:
        """The text of an answer, with the format's end mark."""

    def add_turn(self, role: str, message: str) -> str:
        """Append a turn and return the text it added; turns alternate, ``human`` first."""
        expected = "gpt" if self.turn_count % 2 else "human"
        if role != expected:
            raise ValueError(f"add_turn: role must be {expected!r} for turn {self.turn_count}, got {role!r}")
        added = self._wrap(role, message)
        self.prompt += added
        self.turn_count += 1
        return added

    def get_potential_prompt(self, message: str) -> str:
        """The prompt as it would be with ``message``, verbatim, as the next question; the builder stays as it is."""
        return self._finish(self.prompt + self.human(message, first=self.turn_count == 0))

    def get_prompt(self) -> str:
        """The prompt so far."""
        return self._finish(self.prompt)

    def _wrap(self, role: str, message: str) -> str:
        if self.strips_messages:
            message = message.replace("<image>", "").strip()
        return self.human(message, first=self.turn_count == 0) if role == "human" else self.gpt(message)

    def _finish(self, prompt: str) -> str:
        return prompt.removeprefix("<s>").rstrip() if self.strips_messages else prompt


class PurePromptBuilder(PromptBuilder):
    """``In: ...\\nOut:``, for language models without chat tuning (LLaMA-2, LLaMA-3)."""

    def human(self, message: str, first: bool) -> str:
        """``In:`` the question, ``Out:`` the answer to come."""
        return f"In: {message}\nOut: "

    def gpt(self, message: str) -> str:
        """The answer and ``</s>``."""
        return f"{message or ' '}</s>"


class LLaMa2ChatPromptBuilder(PurePromptBuilder):
    """LLaMA-2 chat's ``[INST]`` format; ``<<SYS>`` with one closing bracket is what MERV trained with."""

    default_system_prompt = ASSISTANT

    def human(self, message: str, first: bool) -> str:
        """The question between ``[INST]`` marks, the first after the system prompt."""
        system = f"<<SYS>\n{self.system_prompt.strip()}\n<</SYS>>\n\n" if first else ""
        return f"<s>[INST] {system}{message} [/INST] "


class VicunaV15ChatPromptBuilder(PurePromptBuilder):
    """Vicuna v1.5's ``USER: ... ASSISTANT:`` format."""

    default_system_prompt = VICUNA

    def human(self, message: str, first: bool) -> str:
        """The question after ``USER:``, the first after the system prompt."""
        system = f"{self.system_prompt.strip()} " if first else ""
        return f"{system}USER: {message} ASSISTANT: "


class LLaMa31PromptBuilder(PromptBuilder):
    """LLaMA-3.1's header format."""

    default_system_prompt = ASSISTANT
    strips_messages = False

    def opening(self) -> str:
        """The system turn."""
        return f"<|start_header_id|>system<|end_header_id|>\n\n{self.system_prompt}<|eot_id|>"

    def human(self, message: str, first: bool) -> str:
        """A user turn and the header of the answer."""
        return (
            f"<|start_header_id|>user<|end_header_id|>\n\n{message}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )

    def gpt(self, message: str) -> str:
        """The answer and its end mark."""
        return f"{message}<|eot_id|>"


class Qwen2PromptBuilder(PromptBuilder):
    """Qwen-2.5's ``<|im_start|>`` format."""

    default_system_prompt = ASSISTANT
    strips_messages = False

    def opening(self) -> str:
        """The system turn."""
        return f"<|im_start|>system\n{self.system_prompt}<|im_end|>\n"

    def human(self, message: str, first: bool) -> str:
        """A user turn and the header of the answer."""
        return f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"

    def gpt(self, message: str) -> str:
        """The answer and its end mark, without the newline Qwen's own template adds: MERV has none."""
        return f"{message}<|im_end|>"


PROMPT_BUILDERS: dict[str, type[PromptBuilder]] = {
    "pure": PurePromptBuilder,
    "llama2-chat": LLaMa2ChatPromptBuilder,
    "vicuna-v15": VicunaV15ChatPromptBuilder,
    "llama3.1-chat": LLaMa31PromptBuilder,
    "qwen2.5": Qwen2PromptBuilder,
}
"""Builders by the name a configuration stores as ``prompt_format``."""
