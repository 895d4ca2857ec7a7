"""The transformers classes: MervVideoModel (a video to visual tokens) and MervForConditionalGeneration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from merv_fast.encoders import build_encoder
from merv_fast.errors import CheckpointError
from merv_fast.models.configuration import MervConfig
from merv_fast.modules import Architecture, Tail, build_fusion, build_projector
from merv_fast.video import every, prepare

__all__ = ["MervCausalLMOutput", "MervForConditionalGeneration", "MervVideoModel", "MervVideoOutput"]


@dataclass
class MervVideoOutput(BaseModelOutputWithPooling):
    """Visual tokens of a batch of videos.

    Args:
        pooler_output: [B, S, D], the tokens that enter the language model.
        encoder_weights: [B, E], the share of each encoder in them; None where the fusion has none.
    """

    encoder_weights: Tensor | None = None


@dataclass
class MervCausalLMOutput(ModelOutput):
    """Output of ``MervForConditionalGeneration.forward``; ``encoder_weights`` [B, E] as in ``MervVideoOutput``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    encoder_weights: Tensor | None = None


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers' table of keys out of the log: what it warns of raises here."""
    logger = logging.getLogger("transformers.modeling_utils")

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


class MervPreTrainedModel(PreTrainedModel):
    """What both classes tell transformers about themselves."""

    config_class = MervConfig
    base_model_prefix = "video_model"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video", "text")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("past_key_values",)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but keys that do not fit raise instead of leaving random weights.

        Raises:
            CheckpointError: lists the unknown, missing and misshapen keys.
        """
        kwargs["ignore_mismatched_sizes"] = True
        with _without_load_report():
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        faults = {
            "unknown": sorted(info["unexpected_keys"]),
            "missing": sorted(info["missing_keys"]),
            "misshapen": [f"{key} {list(got)} for {list(need)}" for key, got, need in sorted(info["mismatched_keys"])],
        }
        if any(faults.values()):
            source = args[0] if args and args[0] is not None else "state_dict"
            listed = "; ".join(f"{kind} keys: {', '.join(keys)}" for kind, keys in faults.items() if keys)
            raise CheckpointError(f"{source}: the weights do not fit the model: {listed}")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Leave each module the initial values of its own constructor: loading never needs others."""


class MervVideoModel(MervPreTrainedModel):
    """From frames to visual tokens: every encoder, its projector, and the fusion; no language model.

    Each step is a method, so that callers can time, cache or place them: ``prepare`` -> ``encode`` -> ``fuse``.
    """

    _keys_to_ignore_on_load_unexpected = (r"^language_model\.",)

    def __init__(self, config: MervConfig) -> None:
        super().__init__(config)
        configs = config.encoder_configs()
        width = config.get_text_config().hidden_size
        self.encoders = nn.ModuleDict({name: build_encoder(encoder) for name, encoder in configs.items()})
        resampled = Architecture.parse(config.arch_specifier).resampler != "none"
        projectors = [
            build_projector(
                config.arch_specifier,
                encoder.width,
                width,
                config.projector_token_length if resampled else encoder.tokens_per_slot,
                encoder.slots,
                encoder.grid,
            )
            for encoder in configs.values()
        ]
        fusion = build_fusion(
            config.feature_fusion,
            len(configs),
            width,
            config.fusion_query_width,
            config.fusion_positional_embedding,
        )
        self.tail = Tail(projectors, fusion)
        self.num_video_tokens = self.tail.output_tokens
        self.post_init()

    def prepare(self, pixel_values_videos: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Every encoder's input from the decoded frames, on the model's device.

        Args:
            pixel_values_videos: [B, F, 3, H, W], uint8 (or float in 0..1), or a list of B such [F, 3, H_i, W_i].

        Returns:
            E tensors [B, F_e, 3, S_e, S_e] in the model's dtype.
        """
        configs = self.config.encoder_configs()
        if not isinstance(pixel_values_videos, Tensor):
            return [
                torch.cat(parts) for parts in zip(*(self.prepare(v[None]) for v in pixel_values_videos), strict=True)
            ]
        if pixel_values_videos.ndim != 5 or pixel_values_videos.shape[2] != 3:
            raise ValueError(
                "MervVideoModel: pixel_values_videos must be [B, F, 3, H, W] or a list of [F, 3, H, W], "
                f"got {list(pixel_values_videos.shape)}"
            )
        frames = pixel_values_videos.to(self.device).movedim(2, -1)
        return [
            prepare(every(frames, config.num_frames, dim=1), config.recipe, dtype=self.dtype)
            for config in configs.values()
        ]

    def encode(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Every encoder's tokens: E tensors [B, T_e, N_e, C_e] from E prepared inputs [B, F_e, 3, S_e, S_e]."""
        if len(inputs) != len(self.encoders):
            raise ValueError(
                f"MervVideoModel: inputs must be one per encoder ({len(self.encoders)}), got {len(inputs)}"
            )
        return [encoder(x) for encoder, x in zip(self.encoders.values(), inputs, strict=True)]

    def fuse(self, features: Sequence[Tensor]) -> MervVideoOutput:
        """Visual tokens [B, S, D] and encoder weights [B, E] from every encoder's tokens."""
        tokens, weights = self.tail(list(features))
        return MervVideoOutput(pooler_output=tokens, encoder_weights=weights)

    def get_video_features(
        self, pixel_values_videos: Tensor | Sequence[Tensor], return_dict: bool | None = None, **kwargs: Any
    ) -> MervVideoOutput:
        """Visual tokens of a batch of videos; ``pooler_output`` is [B, S, D]."""
        return self.fuse(self.encode(self.prepare(pixel_values_videos)))

    def forward(self, pixel_values_videos: Tensor | Sequence[Tensor], **kwargs: Any) -> MervVideoOutput:
        """Same as ``get_video_features``."""
        return self.get_video_features(pixel_values_videos)

    def get_input_embeddings(self) -> nn.Module:
        """A video model embeds no tokens; transformers asks for its first layer."""
        return next(iter(self.encoders.values()))


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
