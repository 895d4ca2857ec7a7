"""ViViT-B/16x2: tubelets of two frames, all of which attend to each other."""

from merv_fast.encoders.config import EncoderConfig, Tokens
from merv_fast.encoders.naming import Naming
from merv_fast.video.prepare import Recipe

__all__ = ["VIVIT_ENCODERS", "VIVIT_NAMINGS", "vivit_config"]

VIVIT_ENCODERS: dict[str, tuple[Tokens, int]] = {
    "vivit-google-b-cls-token": ("class", 1),
    "vivit-google-b-all-tokens": ("all", 1),
    "vivit-google-b-all-no-cls": ("grid", 2),
    "vivit-google-b-all-no-cls-16frames": ("grid", 1),
    "vivit-google-b-classemb-at-first-16frames": ("class-first", 1),
}
"""Encoder id -> tokens it returns, of every how many slots."""

VIVIT_NAMINGS = (
    Naming(
        source="transformers",
        prefixes=("vivit.", ""),
        signature="embeddings.patch_embeddings.projection.weight",
        names={
            "embeddings.cls_token": "class",
            "embeddings.position_embeddings": "position",
            "embeddings.patch_embeddings.projection": "patch",
            "encoder.layer.{}.layernorm_before": "blocks.{}.norm1",
            "encoder.layer.{}.attention.attention.query": "blocks.{}.attention.q",
            "encoder.layer.{}.attention.attention.key": "blocks.{}.attention.k",
            "encoder.layer.{}.attention.attention.value": "blocks.{}.attention.v",
            "encoder.layer.{}.attention.output.dense": "blocks.{}.attention.proj",
            "encoder.layer.{}.layernorm_after": "blocks.{}.norm2",
            "encoder.layer.{}.intermediate.dense": "blocks.{}.mlp.fc1",
            "encoder.layer.{}.output.dense": "blocks.{}.mlp.fc2",
            "layers.{}.layernorm_before": "blocks.{}.norm1",
            "layers.{}.attention.q_proj": "blocks.{}.attention.q",
            "layers.{}.attention.k_proj": "blocks.{}.attention.k",
            "layers.{}.attention.v_proj": "blocks.{}.attention.v",
            "layers.{}.attention.o_proj": "blocks.{}.attention.proj",
            "layers.{}.layernorm_after": "blocks.{}.norm2",
            "layers.{}.mlp.fc1": "blocks.{}.mlp.fc1",
            "layers.{}.mlp.fc2": "blocks.{}.mlp.fc2",
            "layernorm": "norm",
        },
        unused=r"pooler\.|classifier\.",
        class_position=True,
    ),
)


def vivit_config(encoder_id: str, num_frames: int, resize: str = "resize-naive") -> EncoderConfig:
    """Configuration of one of ``VIVIT_ENCODERS``: everything after the last block and the final norm.

    Raises:
        ValueError: ``num_frames`` is not the 32 for which the checkpoint has positions.
    """
    if num_frames != 32:
        raise ValueError(f"{encoder_id}: num_frames must be 32, as many as have positions, got {num_frames}")
    tokens, stride = VIVIT_ENCODERS[encoder_id]
    return EncoderConfig(
        name=encoder_id,
        family="vivit",
        source="google/vivit-b-16x2-kinetics400",
        files=("model.safetensors", "pytorch_model.bin"),
        recipe=Recipe(
            size=224,
            short_side=224,
            resize=resize,
            method="bilinear",
            antialias=True,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        image_size=224,
        num_frames=num_frames,
        patch=16,
        width=768,
        depth=12,
        heads=12,
        mlp_width=3072,
        blocks=12,
        tokens=tokens,
        tubelet=2,
        attention="joint",
        final_norm=True,
        activation="gelu_tanh",
        slot_stride=stride,
    )
