"""merv-tiny: all of MERV at a size that answers in a second on a CPU, before it has learned anything.

The same four encoders, projector and fusion as merv-base; only widths, depths, pictures and the number of frames are
small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from merv_fast.encoders import EncoderConfig, encoder_config
from merv_fast.models.chat_templates import chat_template
from merv_fast.models.configuration import MERV_BASE, MervConfig, MervEncoderConfig
from merv_fast.models.merv_model import MervModel
from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.processing import MervProcessor, MervVideoProcessor
from merv_fast.training.tiny.mimetic import prime
from merv_fast.training.tiny.questions import CORNERS, NUMBERS, UNKNOWN
from merv_fast.training.tiny.scenes import CAMERAS, COLOURS, DIRECTIONS, SHAPES
from merv_fast.video.prepare import Recipe

__all__ = ["build_tiny", "learned_tokenizer", "tiny_config", "tiny_encoders", "tiny_tokenizer"]

SPECIAL_TOKENS = ["<PAD>", "<s>", "</s>", "<|video_pad|>"]
VOCABULARY = 576
ANSWERS = (
    *CORNERS,
    *CAMERAS,
    *COLOURS,
    *(f"{shape}(?:e?s)?" for shape in SHAPES),
    *DIRECTIONS,
    *NUMBERS,
    *("before", "after", "moving", "appears", "vanishes"),
    UNKNOWN,
    *"ABC",
)
"""Answers and their parts, as regular expressions."""


def tiny_encoders() -> dict[str, EncoderConfig]:
    """merv-base's encoders by family, 96 channels wide, on half as many frames of 64 pixels, all resized alike."""
    sizes: dict[str, Any] = {"width": 96, "heads": 4, "mlp_width": 384, "image_size": 64, "patch": 8}
    configs = {}
    for encoder_id, num_frames in MERV_BASE.items():
        full = cast(EncoderConfig, encoder_config(encoder_id, num_frames))
        # What attends over time costs more.
        blocks = 3 if full.temporal_window or full.attention == "joint" else 4
        recipe = Recipe(64, 64, "resize-naive", "bicubic", True, full.recipe.mean, full.recipe.std)
        configs[full.family] = dataclasses.replace(
            full, **sizes, num_frames=num_frames // 2, depth=blocks, blocks=blocks, final_norm=True, recipe=recipe
        )
    return configs


def tiny_config(**changes: Any) -> MervConfig:
    """The configuration of merv-tiny: 16 visual tokens a slot, 128 in all, before a LLaMA of four layers.

    ``changes`` are arguments of `MervConfig`, for models like it.
    """
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    configs = tiny_encoders()
    arguments: dict[str, Any] = {
        "encoders": list(configs),
        "text_config": text,
        "projector_token_length": 16,
        "fusion_query_width": 160,
        "video_token_id": SPECIAL_TOKENS.index("<|video_pad|>"),
        "model_id": "merv-tiny",
        "domain": "clips of coloured shapes",
    } | changes
    encoders = {f"{name}_config": MervEncoderConfig.from_encoder(configs[name]) for name in arguments["encoders"]}
    return MervConfig(**arguments, **encoders)


def tiny_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from ``texts``, that begins each text with ``<s>`` as LLaMA's.

    Answers are tokens of their own; what stands between them is merged across words, so that a question is about nine
    tokens long instead of twenty-three.
    """
    answers = Regex(f" (?:{'|'.join(ANSWERS)})(?![\\w.])")
    apart = pre_tokenizers.Split(answers, "isolated")
    inside = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return learned_tokenizer(texts, pre_tokenizers.Sequence([apart, inside]), VOCABULARY)


def learned_tokenizer(
    texts: Iterable[str], split: pre_tokenizers.PreTokenizer, vocabulary: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocabulary`` tokens, none of which goes beyond where ``split`` splits a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<PAD>",
        extra_special_tokens=["<|video_pad|>"],
    )


def build_tiny(texts: Iterable[str], seed: int = 0, **changes: Any) -> MervModel:
    """merv-tiny with random weights, and a tokenizer that knows the words of ``texts``.

    Random but for what `prime` gives the language model. ``changes`` are those of `tiny_config`.
    """
    torch.manual_seed(seed)
    model = MervForConditionalGeneration(tiny_config(**changes))
    prime(cast(LlamaForCausalLM, model.language_model))
    return MervModel(model, tiny_processor(model, tiny_tokenizer(texts)))


def tiny_processor(model: MervForConditionalGeneration, tokenizer: Any) -> MervProcessor:
    """The processor of merv-tiny."""
    return MervProcessor(
        MervVideoProcessor(num_frames=max(model.config.num_frames)),
        tokenizer,
        chat_template=chat_template(model.config.prompt_format, "<|video_pad|>"),
        num_video_tokens=model.video_model.num_video_tokens,
    )
