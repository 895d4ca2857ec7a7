"""SigLIP's image towers, frame by frame, always at 224 pixels."""

from typing import Any

from merv_fast.encoders.config import EncoderConfig, Tokens
from merv_fast.encoders.naming import Naming
from merv_fast.encoders.timm import TIMM_NAMES
from merv_fast.video.prepare import Recipe

__all__ = ["SIGLIP_ENCODERS", "SIGLIP_NAMINGS", "SIGLIP_REFUSED", "siglip_config"]

BASE: dict[str, Any] = {"patch": 16, "width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}
SO400M: dict[str, Any] = {"patch": 14, "width": 1152, "depth": 27, "heads": 16, "mlp_width": 4304}

SIGLIP_ENCODERS: dict[str, tuple[Tokens, str, dict[str, Any]]] = {
    "siglip-vit-b16-224px": ("pooled", "timm/ViT-B-16-SigLIP", BASE),
    "siglip-vit-b16-224px-all-no-cls": ("grid", "timm/ViT-B-16-SigLIP", BASE),
    "siglip-vit-b16-256px": ("pooled", "timm/ViT-B-16-SigLIP-256", BASE),
    "siglip-vit-b16-384px": ("pooled", "timm/ViT-B-16-SigLIP-384", BASE),
    "siglip-vit-so400m": ("pooled", "timm/ViT-SO400M-14-SigLIP", SO400M),
    "siglip-vit-so400m-384px": ("pooled", "timm/ViT-SO400M-14-SigLIP-384", SO400M),
}
"""Encoder id -> tokens it returns, repository of the weights on the hub, size."""

SIGLIP_REFUSED = dict.fromkeys(
    (
        "siglip-vit-b16-224px-all-tokens",
        "siglip-vit-b16-224px-classemb-at-first",
        "siglip-vit-b16-256px-all-tokens",
        "siglip-vit-b16-384px-all-tokens",
        "siglip-vit-so400m-all-tokens",
        "siglip-vit-so400m-384px-all-tokens",
    ),
    "SigLIP has no class token",
)
"""Ids the reference lists and fails on -> why."""

SIGLIP_NAMINGS = (
    Naming(
        source="timm, perhaps inside open_clip",
        prefixes=("visual.trunk.", ""),
        signature="patch_embed.proj.weight",
        names=TIMM_NAMES,
        unused=r"text\.|visual\.head\.|logit_scale$|logit_bias$",
        packed=True,
    ),
    Naming(
        source="transformers",
        prefixes=("vision_model.", ""),
        signature="embeddings.patch_embedding.weight",
        names={
            "embeddings.patch_embedding": "patch",
            "embeddings.position_embedding.weight": "position",
            "encoder.layers.{}.layer_norm1": "blocks.{}.norm1",
            "encoder.layers.{}.self_attn.q_proj": "blocks.{}.attention.q",
            "encoder.layers.{}.self_attn.k_proj": "blocks.{}.attention.k",
            "encoder.layers.{}.self_attn.v_proj": "blocks.{}.attention.v",
            "encoder.layers.{}.self_attn.out_proj": "blocks.{}.attention.proj",
            "encoder.layers.{}.layer_norm2": "blocks.{}.norm2",
            "encoder.layers.{}.mlp.fc1": "blocks.{}.mlp.fc1",
            "encoder.layers.{}.mlp.fc2": "blocks.{}.mlp.fc2",
            "post_layernorm": "norm",
            "head.probe": "pool.latent",
            "head.attention.in_proj_weight": "pool.qkv.weight",
            "head.attention.in_proj_bias": "pool.qkv.bias",
            "head.attention.out_proj": "pool.proj",
            "head.layernorm": "pool.norm",
            "head.mlp.fc1": "pool.mlp.fc1",
            "head.mlp.fc2": "pool.mlp.fc2",
        },
        unused=r"text_model\.|logit_scale$|logit_bias$|embeddings\.position_ids$",
    ),
)


def siglip_config(encoder_id: str, num_frames: int, resize: str = "resize-naive") -> EncoderConfig:
    """Configuration of one of ``SIGLIP_ENCODERS``.

    ``all-no-cls`` is the stream after the last block but one, the others the output of the pooling head.
    The checkpoints of 256 and 384 pixels run at 224 as in the reference, their positions resampled.
    """
    tokens, source, size = SIGLIP_ENCODERS[encoder_id]
    whole = tokens == "pooled"
    return EncoderConfig(
        name=encoder_id,
        family="siglip",
        source=source,
        files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
        recipe=Recipe(
            size=224,
            short_side=224,
            resize=resize,
            method="bicubic",
            antialias=True,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        image_size=224,
        num_frames=num_frames,
        blocks=size["depth"] if whole else size["depth"] - 1,
        tokens=tokens,
        class_token=False,
        final_norm=whole,
        **size,
    )
