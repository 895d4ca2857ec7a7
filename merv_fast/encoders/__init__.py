from merv_fast.encoders.config import EncoderConfig
from merv_fast.encoders.registry import (
    AnyEncoderConfig,
    available_encoders,
    build_encoder,
    config_from_dict,
    config_to_dict,
    convert_state_dict,
    encoder_config,
)
from merv_fast.encoders.vit import VisionTransformer
from merv_fast.encoders.weights import read_weights

__all__ = [
    "AnyEncoderConfig",
    "EncoderConfig",
    "VisionTransformer",
    "available_encoders",
    "build_encoder",
    "config_from_dict",
    "config_to_dict",
    "convert_state_dict",
    "encoder_config",
    "read_weights",
]
