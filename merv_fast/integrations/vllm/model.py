"""MERV as a model of vLLM: its scheduler, its language model, our video model. Imported by vLLM alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from merv_fast.models import MervConfig, MervProcessor, MervVideoModel

__all__ = ["MervForConditionalGeneration"]

DUMMY_SIDE = 224
"""Pixels of the frames by which vLLM measures memory; every size becomes the encoders' own."""


class MervProcessingInfo(BaseProcessingInfo):
    """What vLLM asks of the processor before there is a video."""

    def get_hf_config(self) -> MervConfig:
        """Ours."""
        return self.ctx.get_hf_config(MervConfig)

    def get_hf_processor(self, **kwargs: object) -> MervProcessor:
        """Ours."""
        return self.ctx.get_hf_processor(MervProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """One video a prompt, and no pictures."""
        return {"video": 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Visual tokens: as many for every video."""
        return {"video": self.get_hf_processor().num_video_tokens}


class MervDummyInputs(BaseDummyInputsBuilder[MervProcessingInfo]):
    """Inputs of the largest kind, by which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A marker for each video."""
        return self.info.get_hf_processor().video_token * mm_counts.get("video", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """As many frames as the encoder with most takes."""
        return {
            "video": self._get_dummy_videos(
                width=DUMMY_SIDE,
                height=DUMMY_SIDE,
                num_frames=max(self.info.get_hf_config().num_frames),
                num_videos=mm_counts.get("video", 0),
                overrides=mm_options.get("video"),
            )
        }


class MervMultiModalProcessor(BaseMultiModalProcessor[MervProcessingInfo]):
    """Frames to ``pixel_values_videos``; one marker in the prompt to the places of all visual tokens."""

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values_videos": MultiModalFieldConfig.batched("video")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        processor = self.info.get_hf_processor()
        places = [processor.video_token_id] * processor.num_video_tokens
        return [PromptReplacement(modality="video", target=[processor.video_token_id], replacement=places)]


@MULTIMODAL_REGISTRY.register_processor(MervMultiModalProcessor, info=MervProcessingInfo, dummy_inputs=MervDummyInputs)
class MervForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """The language model is vLLM's, by the architecture of ``text_config``; everything before it is `MervVideoModel`.

    A prompt has one video marker after its BOS: the token ids ``[bos, video, ...]`` of a text that was tokenised
    without the marker are what MERV was trained with.
    """

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """The marker of the i-th video."""
        if not modality.startswith("video"):
            raise ValueError(f"merv_fast: modality must be 'video', got {modality!r}")
        return "<|video_pad|>"

    language_model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config: MervConfig = vllm_config.model_config.hf_config
        text = self.config.get_text_config()
        self.configure_mm_token_handling(text.vocab_size, [self.config.video_token_id])  # type: ignore[operator]
        with self._mark_tower_model(vllm_config, "video"):  # type: ignore[operator]
            self.video_model = MervVideoModel(self.config).eval().requires_grad_(False)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=text, prefix=maybe_prefix(prefix, "language_model")
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @torch.inference_mode()
    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Visual tokens [S, D] of each video in ``pixel_values_videos``: uint8 [B, F, 3, H, W] or B of [F, 3, H, W]."""
        frames = kwargs.get("pixel_values_videos")
        return [] if frames is None else list(self.video_model.get_video_features(frames).pooler_output)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Hidden states of the language model."""
        embeds = None if intermediate_tensors is not None else inputs_embeds
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Of the language model."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """From the names of a directory in our format, which are those of the parts here."""
        return AutoWeightsLoader(self).load_weights(weights)
