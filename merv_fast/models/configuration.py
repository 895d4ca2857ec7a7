"""MervConfig: the transformers configuration of a MERV model, one named sub-configuration per encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from merv_fast.encoders import AnyEncoderConfig, config_from_dict, config_to_dict, encoder_config

__all__ = ["MERV_BASE", "MervConfig", "MervEncoderConfig", "encoder_names"]

MERV_BASE = {
    "languagebind-video-noclass": 16,
    "dinov2-video-all-tokens": 16,
    "vivit-google-b-all-no-cls-16frames": 32,
    "siglip-vit-b16-224px-all-no-cls": 16,
}
"""Encoders of merv-base and the frames each is given."""


class MervEncoderConfig(PreTrainedConfig):
    """One encoder: ``architecture`` is the JSON form of an ``EncoderConfig`` or ``HieraConfig``."""

    model_type = "merv_encoder"

    architecture: dict[str, Any] | None = None

    @classmethod
    def from_encoder(cls, config: AnyEncoderConfig) -> MervEncoderConfig:
        """Wrap an encoder's own configuration."""
        # Through JSON, so that it equals what is read back from a file.
        return cls(architecture=json.loads(json.dumps(config_to_dict(config))))

    def to_encoder(self) -> AnyEncoderConfig:
        """The encoder's own configuration."""
        if self.architecture is None:
            raise ValueError("MervEncoderConfig: architecture must be given, got None")
        return config_from_dict(self.architecture)


class MervConfig(PreTrainedConfig):
    """Everything that defines a MERV model but its weights; ``MervConfig()`` is merv-base.

    Args:
        encoders: names of the encoders, in the order in which they are fused. Encoder ``name`` is configured by the
            keyword argument and attribute ``<name>_config`` (a ``MervEncoderConfig`` or its dict).
        text_config: configuration of any causal language model (default: LLaMA-2-7B with 32064 embedding rows).
        arch_specifier: the reference's projector string, such as ``"3davg+linear"``.
        feature_fusion: the reference's fusion string, such as ``"cross_attention_avg_lq"``.
        projector_token_length: visual tokens a temporal slot, a square number.
        fusion_query_width: width of the learned query of ``cross_attention_avg_lq``.
        fusion_positional_embedding: whether that fusion adds an embedding per encoder to its keys.
        prompt_format: name of the prompt builder (``merv_fast.models.prompts.PROMPT_BUILDERS``).
        video_token_id: id that marks the place of a visual token; it is never looked up in the embedding.
        max_text_length: tokens to which a prompt is truncated, visual tokens not counted.
        model_id: name of the model, for people.
        trained: False for a model whose weights are random.
        domain: all that the model knows, for people; empty for one that knows the world.

    Source: ``merv/conf/models.py`` of the reference and its checkpoints' ``config.json``.
    """

    model_type = "merv"

    encoders: list[str] | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    arch_specifier: str = "no-align+3davg+linear"
    feature_fusion: str = "cross_attention_avg_lq"
    projector_token_length: int = 64
    fusion_query_width: int = 3072
    fusion_positional_embedding: bool = False
    prompt_format: str = "pure"
    video_token_id: int = 32001
    max_text_length: int = 2048
    model_id: str = "merv-base"
    trained: bool = True
    domain: str = ""

    LLAMA2_7B: ClassVar[dict[str, Any]] = {
        "model_type": "llama",
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 32000,
    }

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the sub-configurations from dicts, or merv-base's where none are given."""
        if self.encoders is None:
            configs = [encoder_config(encoder_id, frames) for encoder_id, frames in MERV_BASE.items()]
            self.encoders = encoder_names(configs)
            for name, config in zip(self.encoders, configs, strict=True):
                kwargs.setdefault(f"{name}_config", MervEncoderConfig.from_encoder(config))
        for name in self.encoders:
            given = kwargs.pop(f"{name}_config", None)
            if given is None:
                raise ValueError(f"MervConfig: {name}_config must be given for encoder {name!r}, got None")
            setattr(self, f"{name}_config", _encoder_config(given))
        if not isinstance(self.text_config, PreTrainedConfig):
            fields = dict(self.text_config or self.LLAMA2_7B)
            self.text_config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
        frames = kwargs.pop("num_frames", None)
        if frames is not None and list(frames) != self.num_frames:
            raise ValueError(f"MervConfig: num_frames must be those of its encoders, {self.num_frames}, got {frames}")
        super().__post_init__(**kwargs)

    @property
    def sub_configs(self) -> dict[str, type]:
        """Names and classes of the sub-configurations, as transformers walks them."""
        return {"text_config": AutoConfig} | {f"{name}_config": MervEncoderConfig for name in self.encoders or []}

    def encoder_configs(self) -> dict[str, AnyEncoderConfig]:
        """The encoders' own configurations by name, in order."""
        return {name: getattr(self, f"{name}_config").to_encoder() for name in self.encoders or []}

    @property
    def num_frames(self) -> list[int]:
        """Frames each encoder is given."""
        return [config.num_frames for config in self.encoder_configs().values()]


def _encoder_config(given: Mapping[str, Any] | MervEncoderConfig) -> MervEncoderConfig:
    return given if isinstance(given, MervEncoderConfig) else MervEncoderConfig(**given)


def encoder_names(configs: Sequence[AnyEncoderConfig]) -> list[str]:
    """A name for each encoder: its family's, numbered where a family occurs twice."""
    families = [config.family for config in configs]
    earlier = [families[:index].count(family) for index, family in enumerate(families)]
    return [f"{family}_{count + 1}" if count else family for family, count in zip(families, earlier, strict=True)]
