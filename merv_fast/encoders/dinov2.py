"""DINOv2 ViT-L/14 with registers, frame by frame."""

from merv_fast.encoders.config import EncoderConfig, Tokens
from merv_fast.encoders.naming import Naming
from merv_fast.encoders.timm import TIMM_NAMES
from merv_fast.video.prepare import Recipe

__all__ = ["DINOV2_ENCODERS", "DINOV2_NAMINGS", "dinov2_config"]

DINOV2_ENCODERS: dict[str, Tokens] = {
    "dinov2-video": "class",
    "dinov2-video-all-tokens": "grid",
    "dinov2-video-all-token-with-cls": "classes-first",
    "dinov2-video-classemb-at-first": "class-first",
}
"""Encoder id -> tokens it returns."""

DINOV2_NAMINGS = (
    Naming(
        source="timm",
        prefixes=("",),
        signature="patch_embed.proj.weight",
        names=TIMM_NAMES,
        unused=r"mask_token$|head\.",
        packed=True,
    ),
    Naming(
        source="transformers",
        prefixes=("", "dinov2_with_registers."),
        signature="embeddings.patch_embeddings.projection.weight",
        names={
            "embeddings.cls_token": "class",
            "embeddings.register_tokens": "registers",
            "embeddings.position_embeddings": "position",
            "embeddings.patch_embeddings.projection": "patch",
            "encoder.layer.{}.norm1": "blocks.{}.norm1",
            "encoder.layer.{}.attention.attention.query": "blocks.{}.attention.q",
            "encoder.layer.{}.attention.attention.key": "blocks.{}.attention.k",
            "encoder.layer.{}.attention.attention.value": "blocks.{}.attention.v",
            "encoder.layer.{}.attention.output.dense": "blocks.{}.attention.proj",
            "encoder.layer.{}.attention.q_proj": "blocks.{}.attention.q",
            "encoder.layer.{}.attention.k_proj": "blocks.{}.attention.k",
            "encoder.layer.{}.attention.v_proj": "blocks.{}.attention.v",
            "encoder.layer.{}.attention.o_proj": "blocks.{}.attention.proj",
            "encoder.layer.{}.layer_scale1.lambda1": "blocks.{}.scale1",
            "encoder.layer.{}.norm2": "blocks.{}.norm2",
            "encoder.layer.{}.mlp.fc1": "blocks.{}.mlp.fc1",
            "encoder.layer.{}.mlp.fc2": "blocks.{}.mlp.fc2",
            "encoder.layer.{}.layer_scale2.lambda1": "blocks.{}.scale2",
            "layernorm": "norm",
        },
        unused=r"embeddings\.mask_token$|classifier\.",
        class_position=True,
    ),
)


def dinov2_config(encoder_id: str, num_frames: int, resize: str = "resize-naive") -> EncoderConfig:
    """Configuration of one of ``DINOV2_ENCODERS``.

    It is the stream after block 22; for ``dinov2-video`` the class tokens after the last block and norm.
    """
    tokens = DINOV2_ENCODERS[encoder_id]
    whole = tokens == "class"
    return EncoderConfig(
        name=encoder_id,
        family="dinov2",
        source="timm/vit_large_patch14_reg4_dinov2.lvd142m",
        files=("model.safetensors", "pytorch_model.bin"),
        recipe=Recipe(
            size=224,
            short_side=224,
            resize=resize,
            method="bicubic",
            antialias=True,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        image_size=224,
        num_frames=num_frames,
        patch=14,
        width=1024,
        depth=24,
        heads=16,
        mlp_width=4096,
        blocks=24 if whole else 23,
        tokens=tokens,
        register_tokens=4,
        layer_scale=True,
        final_norm=whole,
    )
