"""Small encoders of every family: those of the golden files, with inputs as [B, F, 3, S, S]."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from merv_fast.encoders import EncoderConfig, VisionTransformer, convert_state_dict, encoder_config
from tests.golden_files import load, weights

# torch lists the functions that torch.device() redirects at its first use, which must come before a test
# replaces torch.empty.
with torch.device("meta"):
    torch.empty(0)

SMALL: dict[str, EncoderConfig] = {
    "languagebind": replace(
        encoder_config("languagebind-video-noclass", 8),
        **{
            "image_size": 56,
            "width": 48,
            "depth": 3,
            "heads": 4,
            "mlp_width": 96,
            "blocks": 2,
            "temporal_window": 4,
        },
    ),
    "dinov2": replace(
        encoder_config("dinov2-video-all-tokens", 8),
        **{"image_size": 56, "width": 48, "depth": 4, "heads": 4, "mlp_width": 192, "blocks": 3},
    ),
    "vivit": replace(
        encoder_config("vivit-google-b-all-no-cls-16frames", 32),
        **{
            "image_size": 64,
            "width": 48,
            "depth": 3,
            "heads": 4,
            "mlp_width": 96,
            "blocks": 3,
            "num_frames": 16,
        },
    ),
    "siglip": replace(
        encoder_config("siglip-vit-b16-224px-all-no-cls", 8),
        **{"image_size": 64, "width": 48, "depth": 3, "heads": 4, "mlp_width": 192, "blocks": 2},
    ),
}
"""Two videos each: the 16 images of the DINOv2 and SigLIP files are two videos of eight frames."""


def golden(family: str) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Pixels [2, F, 3, S, S], the reference's state dict, and its outputs."""
    tensors, _ = load(f"encoder_{family}")
    pixels = tensors["input"]
    if family == "languagebind":
        pixels = pixels.transpose(1, 2)
    elif family in ("dinov2", "siglip"):
        pixels = pixels.unflatten(0, (2, 8))
    return pixels, weights(tensors), tensors


def encoder(config: EncoderConfig, tensors: Mapping[str, Tensor]) -> VisionTransformer:
    """The encoder with a checkpoint's weights in their dtype."""
    state = convert_state_dict(config, tensors)
    model = VisionTransformer(config).to(state["position"].dtype).eval()
    model.load_state_dict(state)
    return model


def seeded(config: EncoderConfig) -> VisionTransformer:
    """The encoder with reproducible random weights, LayerScale and norms included."""
    generator = torch.Generator().manual_seed(0)
    model = VisionTransformer(config).eval()
    for name, parameter in model.named_parameters():
        scale = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data.copy_(1 + scale if "norm" in name and name.endswith("weight") else scale)
    return model


def pixels(config: EncoderConfig, videos: int = 2) -> Tensor:
    """Reproducible random input."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(videos, config.num_frames, 3, config.image_size, config.image_size, generator=generator)
