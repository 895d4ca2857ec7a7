"""MERV, the multi-encoder video language model: exact to the reference, from parts that stand alone.

Names are imported when they are first used, so that ``import merv_fast`` costs little over ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from merv_fast.errors import CheckpointError, MervFastError, VideoError

if TYPE_CHECKING:
    from merv_fast import ops
    from merv_fast.assets import sample_clip
    from merv_fast.integrations.accelerate import accelerate, explain, restore
    from merv_fast.models import (
        Answer,
        MervConfig,
        MervForConditionalGeneration,
        MervModel,
        MervProcessor,
        MervVideoModel,
        MervVideoProcessor,
        VisualTokens,
        available_models,
        load_vid,
    )
    from merv_fast.video import load_frames, open_video

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "CheckpointError",
    "MervConfig",
    "MervFastError",
    "MervForConditionalGeneration",
    "MervModel",
    "MervProcessor",
    "MervVideoModel",
    "MervVideoProcessor",
    "VideoError",
    "VisualTokens",
    "accelerate",
    "available_models",
    "explain",
    "load_frames",
    "load_vid",
    "open_video",
    "ops",
    "restore",
    "sample_clip",
]

_ELSEWHERE = {"load_frames": "video", "open_video": "video", "sample_clip": "assets"} | dict.fromkeys(
    ("accelerate", "explain", "restore"), "integrations.accelerate"
)


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("merv_fast.ops")
    if name not in __all__:
        raise AttributeError(f"module 'merv_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"merv_fast.{_ELSEWHERE.get(name, 'models')}"), name)


def __dir__() -> list[str]:
    return __all__
