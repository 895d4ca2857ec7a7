"""A MERV with random weights, whose answers are noise that goes on: for tests of all that is not what it says.

Same four encoders, projector and fusion as merv-base, the same 16/16/32/16 frames; only widths, depths and pictures are
small.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from merv_fast.encoders import EncoderConfig, encoder_config
from merv_fast.models.configuration import MERV_BASE, MervConfig, MervEncoderConfig
from merv_fast.models.merv_model import MervModel
from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.processing import MervProcessor
from merv_fast.training.tiny.model import SPECIAL_TOKENS, learned_tokenizer
from merv_fast.training.tiny.model import tiny_processor as processor_of

__all__ = ["build_tiny", "tiny_config", "tiny_encoders", "tiny_tokenizer"]

VOCABULARY = 512
SENTENCES = (
    "What happens in this video? What color is the ball? Which way does the ball move? How many shapes are there?",
    "The red ball moves to the right. The blue box rises slowly. A green square turns left and stops.",
    "In: Describe what is happening in this video. Out: A person is walking in the room.",
    "Is there a yellow circle? Yes, there is. No, there is none. Does the shape grow or shrink? It falls down.",
)


def tiny_encoders() -> dict[str, EncoderConfig]:
    """merv-base's encoders by family, 48 channels wide, on 112-pixel frames."""
    sizes: dict[str, Any] = {"width": 48, "heads": 4, "mlp_width": 96, "depth": 3, "image_size": 112}
    configs = {}
    for encoder_id, num_frames in MERV_BASE.items():
        full = cast(EncoderConfig, encoder_config(encoder_id, num_frames))
        blocks = 3 - (full.depth - full.blocks)
        recipe = dataclasses.replace(full.recipe, size=112, short_side=full.recipe.short_side // 2)
        configs[full.family] = dataclasses.replace(full, **sizes, blocks=blocks, recipe=recipe)
    return configs


def tiny_config() -> MervConfig:
    """Its configuration: 16 visual tokens a slot, 256 in all, before a LLaMA of two layers."""
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    encoders = tiny_encoders()
    return MervConfig(
        encoders=list(encoders),
        text_config=text,
        projector_token_length=16,
        fusion_query_width=96,
        video_token_id=SPECIAL_TOKENS.index("<|video_pad|>"),
        model_id="merv-random",
        trained=False,
        **{f"{name}_config": MervEncoderConfig.from_encoder(config) for name, config in encoders.items()},
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows some words."""
    return learned_tokenizer(SENTENCES, ByteLevel(add_prefix_space=False), VOCABULARY)


def build_tiny(seed: int = 0) -> MervModel:
    """The model and its processor."""
    config = tiny_config()
    torch.manual_seed(seed)
    model = MervForConditionalGeneration(config)
    return MervModel(model, tiny_processor(model))


def tiny_processor(model: MervForConditionalGeneration) -> MervProcessor:
    """Its processor."""
    return processor_of(model, tiny_tokenizer())
