"""MervForConditionalGeneration: a video and a prompt in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.modeling_outputs import ModelOutput

from merv_fast.models.configuration import MervConfig
from merv_fast.models.video_model import MervPreTrainedModel, MervVideoModel, MervVideoOutput

__all__ = ["MervCausalLMOutput", "MervForConditionalGeneration"]


@dataclass
class MervCausalLMOutput(ModelOutput):
    """Output of ``MervForConditionalGeneration.forward``; ``encoder_weights`` [B, E] as in ``MervVideoOutput``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    encoder_weights: Tensor | None = None


class MervForConditionalGeneration(MervPreTrainedModel, GenerationMixin):
    """A video and a prompt in, logits out: MERV with any causal language model.

    A prompt holds ``config.num_video_tokens`` placeholders (``config.video_token_id``) per video; their embeddings are
    replaced by the visual tokens, in order.
    """

    main_input_name = "input_ids"

    def __init__(self, config: MervConfig) -> None:
        super().__init__(config)
        self.video_model = MervVideoModel(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.generation_config = self.language_model.generation_config
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The language model without its head."""
        return self.language_model.get_decoder()

    def get_video_features(self, pixel_values_videos: Tensor | Sequence[Tensor], **kwargs: Any) -> MervVideoOutput:
        """Visual tokens of a batch of videos; ``pooler_output`` is [B, S, D]."""
        return self.video_model.get_video_features(pixel_values_videos)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_videos: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> MervCausalLMOutput:
        """Logits [B, S, vocabulary] of the language model and, with ``labels`` [B, S], the loss.

        Args:
            input_ids: [B, S] with placeholders for each video's tokens.
            pixel_values_videos: frames, as ``MervVideoModel.prepare`` takes them.
            attention_mask: [B, S].
            position_ids: [B, S].
            past_key_values: cache of the language model.
            inputs_embeds: [B, S, D] instead of ``input_ids``, the visual tokens already in place.
            labels: [B, S], -100 where no loss is taken (visual positions).
            use_cache: whether to return a cache.
            logits_to_keep: as in every causal language model of transformers; 0 keeps all.
            mm_encoder_outputs: ``{"video": output of get_video_features}`` instead of ``pixel_values_videos``.
            kwargs: handed to the language model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("MervForConditionalGeneration: give exactly one of input_ids and inputs_embeds")
        if pixel_values_videos is not None and mm_encoder_outputs:
            raise ValueError(
                "MervForConditionalGeneration: give only one of pixel_values_videos and mm_encoder_outputs"
            )
        video = (mm_encoder_outputs or {}).get("video")
        if pixel_values_videos is not None:
            video = self.get_video_features(pixel_values_videos)
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, video)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return MervCausalLMOutput(
            loss=outputs.get("loss"),
            logits=outputs.logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            encoder_weights=getattr(video, "encoder_weights", None),
        )

    def _embed(self, input_ids: Tensor, video: Any | None) -> Tensor:
        """Token embeddings [B, S, D] with the visual tokens at their placeholders."""
        is_video = input_ids == self.config.video_token_id
        # A placeholder may lie past the last row of the embedding: look up a row that is always there.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_video, 0))
        if video is None:
            return embeds
        tokens = video.pooler_output
        tokens = tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens))
        if not torch.compiler.is_compiling() and int(is_video.sum()) != tokens.shape[0] * tokens.shape[1]:
            raise ValueError(
                f"MervForConditionalGeneration: input_ids must hold {tokens.shape[0] * tokens.shape[1]} placeholders "
                f"(id {self.config.video_token_id}) for {tokens.shape[0]} videos of {tokens.shape[1]} tokens, "
                f"got {int(is_video.sum())}"
            )
        return embeds.masked_scatter(is_video[..., None], tokens.to(embeds.device, embeds.dtype))

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *, mm_encoder_outputs: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat the visual tokens with the prompts, for beams and several returned sequences."""
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        if mm_encoder_outputs is not None:
            tokens = mm_encoder_outputs["video"].pooler_output.repeat_interleave(expand_size, dim=0)
            kwargs["mm_encoder_outputs"] = {"video": MervVideoOutput(pooler_output=tokens)}
        return input_ids, kwargs

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand the video over once, with the prompt; later steps read it from the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        # Older transformers drop only the pixels by themselves.
        if not is_first_iteration and kwargs.get("use_cache", True):
            for key in ("pixel_values_videos", "mm_encoder_outputs"):
                inputs.pop(key, None)
        return inputs
