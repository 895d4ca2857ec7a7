"""LanguageBind's video tower: a CLIP ViT-L/14 with temporal attention in every block."""

from merv_fast.encoders.config import EncoderConfig, Tokens
from merv_fast.encoders.naming import Naming
from merv_fast.video.prepare import Recipe

__all__ = ["LANGUAGEBIND_ENCODERS", "LANGUAGEBIND_NAMINGS", "languagebind_config"]

LANGUAGEBIND_ENCODERS: dict[str, Tokens] = {
    "languagebind-video": "all",
    "languagebind-video-averagetoken": "mean",
    "languagebind-video-classemb": "class",
    "languagebind-video-noclass": "grid",
    "languagebind-video-classemb-at-first": "class-first",
}
"""Encoder id -> tokens it returns."""

LANGUAGEBIND_NAMINGS = (
    Naming(
        source="LanguageBind",
        prefixes=("vision_model.", ""),
        signature="embeddings.patch_embedding.weight",
        names={
            "embeddings.class_embedding": "class",
            "embeddings.patch_embedding": "patch",
            "embeddings.position_embedding.weight": "position",
            "pre_layrnorm": "embedding_norm",
            "encoder.layers.{}.temporal_embedding": "blocks.{}.temporal_embedding",
            "encoder.layers.{}.temporal_layer_norm1": "blocks.{}.temporal_norm",
            "encoder.layers.{}.temporal_attn.q_proj": "blocks.{}.temporal_attention.q",
            "encoder.layers.{}.temporal_attn.k_proj": "blocks.{}.temporal_attention.k",
            "encoder.layers.{}.temporal_attn.v_proj": "blocks.{}.temporal_attention.v",
            "encoder.layers.{}.temporal_attn.out_proj": "blocks.{}.temporal_attention.proj",
            "encoder.layers.{}.layer_norm1": "blocks.{}.norm1",
            "encoder.layers.{}.self_attn.q_proj": "blocks.{}.attention.q",
            "encoder.layers.{}.self_attn.k_proj": "blocks.{}.attention.k",
            "encoder.layers.{}.self_attn.v_proj": "blocks.{}.attention.v",
            "encoder.layers.{}.self_attn.out_proj": "blocks.{}.attention.proj",
            "encoder.layers.{}.layer_norm2": "blocks.{}.norm2",
            "encoder.layers.{}.mlp.fc1": "blocks.{}.mlp.fc1",
            "encoder.layers.{}.mlp.fc2": "blocks.{}.mlp.fc2",
            "post_layernorm": "norm",
        },
        unused=r"text_model\.|text_projection\.|visual_projection\.|logit_scale$|embeddings\.position_ids$",
        class_position=True,
        patch_bias=False,
    ),
)


def languagebind_config(encoder_id: str, num_frames: int, resize: str = "resize-naive") -> EncoderConfig:
    """Configuration of one of ``LANGUAGEBIND_ENCODERS``: the stream after block 22, no norm.

    Raises:
        ValueError: the temporal window (8) does not divide ``num_frames``, or ``resize`` is another.
    """
    if resize != "resize-naive":
        raise ValueError(f"{encoder_id}: resize must be 'resize-naive' as in the reference, got {resize!r}")
    return EncoderConfig(
        name=encoder_id,
        family="languagebind",
        source="LanguageBind/LanguageBind_Video_merge",
        files=("model.safetensors", "pytorch_model.bin"),
        recipe=Recipe(
            size=224,
            short_side=224,
            resize=resize,
            method="bilinear",
            antialias=False,
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
        ),
        image_size=224,
        num_frames=num_frames,
        patch=14,
        width=1024,
        depth=24,
        heads=16,
        mlp_width=4096,
        blocks=23,
        tokens=LANGUAGEBIND_ENCODERS[encoder_id],
        temporal_window=8,
        embedding_norm=True,
        eps=1e-5,
    )
