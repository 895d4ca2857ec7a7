"""What vLLM calls when it starts, by the entry point group ``vllm.general_plugins``."""

from __future__ import annotations

import importlib
import logging

from packaging.specifiers import SpecifierSet
from packaging.version import Version

__all__ = ["MODEL_RANGE", "register"]

logger = logging.getLogger("merv_fast")

MODEL_RANGE = SpecifierSet(">=0.33,<0.34", prereleases=True)
"""Versions whose interface for models `MervForConditionalGeneration` is written against; it changes with each."""


def register() -> None:
    """Make ``MervForConditionalGeneration`` known to vLLM; with another version of vLLM say so and do nothing."""
    import vllm
    from vllm import ModelRegistry

    if Version(vllm.__version__) not in MODEL_RANGE:
        instead = "merv_fast.integrations.vllm.prompt_embeds works with any version"
        logger.warning("merv_fast: its model is for vLLM %s, got %s; %s", MODEL_RANGE, vllm.__version__, instead)
        return
    # transformers must know the configuration, by which vLLM finds the name of the model.
    importlib.import_module("merv_fast.models")
    # By name, so that CUDA is not touched before vLLM has made its worker processes.
    ModelRegistry.register_model(
        "MervForConditionalGeneration", "merv_fast.integrations.vllm.model:MervForConditionalGeneration"
    )
