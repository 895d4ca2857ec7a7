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
    replaced by the visual tokens, in order. Videos encoded in windows have more tokens, and as many placeholders.
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

    def get_video_features(
        self, pixel_values_videos: Tensor | Sequence[Tensor], **kwargs: Any
    ) -> MervVideoOutput | tuple[Any, ...]:
        """Visual tokens of a batch of videos; ``pooler_output`` is [B, S, D]."""
        return self.video_model.get_video_features(pixel_values_videos, **kwargs)

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
    ) -> MervCausalLMOutput | tuple[Any, ...]:
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
            mm_encoder_outputs: instead of ``pixel_values_videos``. ``{"video": output of get_video_features}``, whose
                ``pooler_output`` may be a list of [S_i, D]; or ``{"features": [...]}``, what the encoders return, E
                tensors [B, T_e, N_e, C_e], which are projected and fused here, with gradients.
            kwargs: handed to the language model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("MervForConditionalGeneration: give exactly one of input_ids and inputs_embeds")
        given = mm_encoder_outputs or {}
        video, features = given.get("video"), given.get("features")
        if pixel_values_videos is not None and (video is not None or features is not None or input_ids is None):
            rule = "left out with mm_encoder_outputs or inputs_embeds"
            raise ValueError(f"MervForConditionalGeneration: pixel_values_videos must be {rule}, got both")
        if features is not None and (video is not None or input_ids is None):
            rule = "left out with video or inputs_embeds"
            raise ValueError(f"MervForConditionalGeneration: features must be {rule}, got both")
        if pixel_values_videos is not None:
            video = self.get_video_features(pixel_values_videos)
        if features is not None:
            video = self._fuse(features)
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, video)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs | {"return_dict": True},
        )
        output = MervCausalLMOutput(
            loss=outputs.get("loss"),
            logits=outputs.logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            encoder_weights=getattr(video, "encoder_weights", None),
        )
        as_object = kwargs.get("return_dict")
        return output if (self.config.return_dict if as_object is None else as_object) else output.to_tuple()

    def _fuse(self, features: Sequence[Tensor]) -> MervVideoOutput:
        """Visual tokens of what the encoders return, E tensors [B, T_e, N_e, C_e], on any device and of any type."""
        video = self.video_model
        if len(features) != len(video.encoders):
            rule = f"one per encoder ({len(video.encoders)})"
            raise ValueError(f"MervForConditionalGeneration: features must be {rule}, got {len(features)}")
        return video.fuse([each.to(video.device, video.dtype) for each in features])

    def embed(self, input_ids: Tensor, video: Any | None) -> Tensor:
        """Token embeddings [B, S, D] with the visual tokens at their placeholders."""
        is_video = input_ids == self.config.video_token_id
        # A placeholder may lie past the last row of the embedding: look up a row that is always there.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_video, 0))
        # While decoding, a single token at a time, there is nothing to check and no reason to wait for the device.
        checked = input_ids.shape[1] > 1 and not torch.compiler.is_compiling()
        placeholders = int(is_video.sum()) if checked else 0
        if video is None:
            if placeholders:
                rule = "no placeholders without a video"
                raise ValueError(f"MervForConditionalGeneration: input_ids must hold {rule}, got {placeholders}")
            return embeds
        tokens = joined(video.pooler_output)
        if checked and placeholders != len(tokens):
            sizes = " and ".join(map(str, sorted({len(each) for each in video.pooler_output})))
            raise ValueError(
                f"MervForConditionalGeneration: input_ids must hold {len(tokens)} placeholders "
                f"(id {self.config.video_token_id}) for {len(video.pooler_output)} videos of {sizes} tokens, "
                f"got {placeholders}"
            )
        return embeds.masked_scatter(is_video[..., None], tokens.to(embeds.device, embeds.dtype))

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *, mm_encoder_outputs: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat the visual tokens with the prompts, for beams and several returned sequences."""
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        given = mm_encoder_outputs or {}
        video, features = given.get("video"), given.get("features")
        if features is not None:
            repeated = [each.repeat_interleave(expand_size, 0) for each in features]
            kwargs["mm_encoder_outputs"] = {"features": repeated}
        if video is not None:
            tokens = [each for each in video.pooler_output for _ in range(expand_size)]
            kwargs["mm_encoder_outputs"] = {"video": MervVideoOutput(pooler_output=tokens)}
        return input_ids, kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand the video over once, with the prompt that has a place for it; later steps read it from the cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        prompt = inputs.get("input_ids")
        # Older transformers drop only the pixels by themselves, and only after the first step.
        later = not is_first_iteration and kwargs.get("use_cache", True)
        if later or prompt is None or not (prompt == self.config.video_token_id).any():
            for key in ("pixel_values_videos", "mm_encoder_outputs"):
                inputs.pop(key, None)
        return inputs


def joined(tokens: Tensor | Sequence[Tensor]) -> Tensor:
    """Visual tokens of all videos, [B * S, D], also of a list of [S_i, D]."""
    return tokens.flatten(0, 1) if isinstance(tokens, Tensor) else torch.cat(list(tokens))
