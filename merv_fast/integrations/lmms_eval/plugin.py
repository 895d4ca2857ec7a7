"""What lmms-eval finds by the entry point group ``lmms_eval.models``."""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """The manifest of the model ``merv_fast``: ``lmms-eval --model merv_fast --model_args pretrained=merv-full``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="merv_fast", simple_class_path="merv_fast.integrations.lmms_eval.model.Merv", aliases=("merv",)
    )
