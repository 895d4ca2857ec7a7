"""Quantisation by transformers' own configurations: of the language model, which is where the weights are."""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["language_model_only"]

SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
"""Under which of these names a configuration keeps what is not quantised."""

KEPT = ("video_model", "lm_head")
"""Encoders, projectors and fusion, whose weights our ops read as they are; and the head, as transformers does."""


def language_model_only(config: Any) -> Any:
    """A copy of a quantisation configuration that leaves out the video model.

    Args:
        config: one of transformers', such as ``BitsAndBytesConfig``, or a dict of it.

    Raises:
        ValueError: the configuration has no list of modules that are left out.
    """
    if isinstance(config, dict):
        name = next((name for name in SKIPPED if name in config), "modules_to_not_convert")
        return config | {name: extended(config.get(name))}
    names = [name for name in SKIPPED if hasattr(config, name)]
    if not names:
        rule = f"one that can leave out modules, by one of {', '.join(SKIPPED)}"
        raise ValueError(f"from_pretrained: quantization_config must be {rule}, got {type(config).__name__}")
    config = copy.copy(config)
    setattr(config, names[0], extended(getattr(config, names[0])))
    return config


def extended(names: list[str] | None) -> list[str]:
    return list(dict.fromkeys([*(names or []), *KEPT]))
