import doctest
import json
from dataclasses import replace

import pytest
import torch

from merv_fast.encoders import (
    EncoderConfig,
    available_encoders,
    build_encoder,
    config_from_dict,
    config_to_dict,
    encoder_config,
    registry,
)
from merv_fast.encoders.siglip import SIGLIP_REFUSED
from tests.encoders.small_encoders import SMALL

# id: frames, slots, tokens a slot, grid, width, blocks, heads
ENCODERS = {
    "languagebind-video": (16, 16, 257, None, 1024, 23, 16),
    "languagebind-video-averagetoken": (16, 16, 1, (1, 1), 1024, 23, 16),
    "languagebind-video-classemb": (16, 16, 1, (1, 1), 1024, 23, 16),
    "languagebind-video-noclass": (16, 16, 256, (16, 16), 1024, 23, 16),
    "languagebind-video-classemb-at-first": (16, 1, 4097, None, 1024, 23, 16),
    "dinov2-video": (16, 16, 1, (1, 1), 1024, 24, 16),
    "dinov2-video-all-tokens": (16, 16, 256, (16, 16), 1024, 23, 16),
    "dinov2-video-all-token-with-cls": (16, 1, 4112, None, 1024, 23, 16),
    "dinov2-video-classemb-at-first": (16, 1, 4097, None, 1024, 23, 16),
    "vivit-google-b-cls-token": (32, 1, 1, (1, 1), 768, 12, 12),
    "vivit-google-b-all-tokens": (32, 1, 3137, None, 768, 12, 12),
    "vivit-google-b-all-no-cls": (32, 8, 196, (14, 14), 768, 12, 12),
    "vivit-google-b-all-no-cls-16frames": (32, 16, 196, (14, 14), 768, 12, 12),
    "vivit-google-b-classemb-at-first-16frames": (32, 1, 3137, None, 768, 12, 12),
    "siglip-vit-b16-224px": (16, 16, 1, (1, 1), 768, 12, 12),
    "siglip-vit-b16-224px-all-no-cls": (16, 16, 196, (14, 14), 768, 11, 12),
    "siglip-vit-b16-256px": (16, 16, 1, (1, 1), 768, 12, 12),
    "siglip-vit-b16-384px": (16, 16, 1, (1, 1), 768, 12, 12),
    "siglip-vit-so400m": (16, 16, 1, (1, 1), 1152, 27, 16),
    "siglip-vit-so400m-384px": (16, 16, 1, (1, 1), 1152, 27, 16),
}

# id of merv-base: repository, depth, patch, prefix tokens, attention, temporal window, final norm, mean, std
MERV_BASE = {
    "languagebind-video-noclass": (
        "LanguageBind/LanguageBind_Video_merge",
        (24, 14, 1, "frame", 8, False),
        ("bilinear", False, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ),
    "dinov2-video-all-tokens": (
        "timm/vit_large_patch14_reg4_dinov2.lvd142m",
        (24, 14, 5, "frame", None, False),
        ("bicubic", True, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ),
    "vivit-google-b-all-no-cls-16frames": (
        "google/vivit-b-16x2-kinetics400",
        (12, 16, 1, "joint", None, True),
        ("bilinear", True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ),
    "siglip-vit-b16-224px-all-no-cls": (
        "timm/ViT-B-16-SigLIP",
        (12, 16, 0, "frame", None, False),
        ("bicubic", True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ),
}


def block_parameters(width: int, hidden: int) -> int:
    """Attention, MLP and two norms."""
    return 4 * width * (width + 1) + 2 * width * hidden + hidden + width + 4 * width


def parameters(encoder_id: str) -> int:
    """What a checkpoint of the full model holds for the blocks and heads that are run."""
    _, _, _, _, width, blocks, _ = ENCODERS[encoder_id]
    family = encoder_id.split("-")[0]
    if family == "vivit":
        return 1536 * width + 3137 * width + blocks * block_parameters(width, 3072) + 2 * width
    if family == "dinov2":
        norm = 2 * width if blocks == 24 else 0
        return 588 * width + 261 * width + blocks * (block_parameters(width, 4096) + 2 * width) + norm
    if family == "languagebind":
        temporal = 4 * width * (width + 1) + 2 * width + 8 * width
        return 588 * width + 257 * width + 2 * width + blocks * (block_parameters(width, 4096) + temporal)
    hidden, patch, patches = (4304, 588, 256) if width == 1152 else (3072, 768, 196)
    mlp = 2 * width * hidden + hidden + width
    # The pooling head: query, key and value, output, norm, MLP; and the final norm.
    head = width + 2 * width * (width + 1) + width * (width + 1) + 2 * width + mlp + 2 * width
    whole = 0 if encoder_id.endswith("all-no-cls") else head
    return patch * width + patches * width + blocks * block_parameters(width, hidden) + whole


def test_every_id_is_in_the_table():
    assert [name for name in available_encoders() if not name.startswith("hiera")] == list(ENCODERS)
    assert sum(name.startswith("hiera") for name in available_encoders()) == 6


@pytest.mark.parametrize("encoder_id", ENCODERS)
def test_full_size(encoder_id):
    frames, slots, tokens, grid, width, blocks, heads = ENCODERS[encoder_id]
    config = encoder_config(encoder_id, frames)
    assert isinstance(config, EncoderConfig)
    assert (config.slots, config.tokens_per_slot, config.grid) == (slots, tokens, grid)
    assert (config.width, config.blocks, config.heads, config.name) == (width, blocks, heads, encoder_id)
    with torch.device("meta"):
        model = build_encoder(config)
        assert model(torch.empty(1, frames, 3, 224, 224)).shape == (1, slots, tokens, width)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters(encoder_id)
    assert len(model.blocks) == blocks


@pytest.mark.parametrize("encoder_id", MERV_BASE)
def test_encoders_of_merv_base(encoder_id):
    config = encoder_config(encoder_id, ENCODERS[encoder_id][0])
    source, shape, recipe = MERV_BASE[encoder_id]
    assert config.source == source
    assert shape == (
        config.depth,
        config.patch,
        config.prefix_tokens,
        config.attention,
        config.temporal_window,
        config.final_norm,
    )
    assert recipe == (config.recipe.method, config.recipe.antialias, config.recipe.mean, config.recipe.std)
    assert (config.recipe.size, config.recipe.short_side, config.recipe.resize) == (224, 224, "resize-naive")
    assert config.layer_scale == (config.family == "dinov2")
    assert config.embedding_norm == (config.family == "languagebind")
    assert config.activation == ("gelu_tanh" if config.family == "vivit" else "gelu")
    assert config.eps == (1e-5 if config.family == "languagebind" else 1e-6)


@pytest.mark.parametrize("encoder_id", available_encoders())
def test_json(encoder_id):
    config = encoder_config(encoder_id, 32)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_examples():
    assert doctest.testmod(registry) == (0, 3)


def test_resize_reaches_the_recipe():
    assert encoder_config("dinov2-video", 4, "letterbox").recipe.resize == "letterbox"
    assert encoder_config("hiera-base-video", 16, "resize-crop").recipe.resize == "resize-crop"


@pytest.mark.parametrize("encoder_id", SIGLIP_REFUSED)
def test_ids_the_reference_fails_on(encoder_id):
    with pytest.raises(ValueError, match=r"one that the reference can run \(SigLIP has no class token\), got"):
        encoder_config(encoder_id, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clip", 16), r"encoder_id must be one of \['languagebind-video', .*\], got 'clip'"),
        (("vivit-google-b-cls-token", 16), "num_frames must be 32, .* got 16"),
        (("languagebind-video", 12), "frames must be a positive multiple of 8, got 12"),
        (("dinov2-video", 0), "frames must be a positive multiple of 1, got 0"),
        (("languagebind-video", 16, "letterbox"), "resize must be 'resize-naive' .*, got 'letterbox'"),
        (("dinov2-video", 16, "stretch"), "resize must be .*, got 'stretch'"),
    ],
)
def test_encoder_config_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        encoder_config(*arguments)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("dinov2", {"width": 0}, "width must be at least 1, got 0"),
        ("dinov2", {"heads": 5}, r"heads must divide width \(48\), got 5"),
        ("dinov2", {"image_size": 57}, r"image_size must be a positive multiple of the patch \(14\), got 57"),
        ("dinov2", {"blocks": 5}, r"blocks must be 1 to depth \(4\), got 5"),
        ("dinov2", {"tokens": "some"}, "tokens must be one of .*, got 'some'"),
        ("dinov2", {"attention": "local"}, "attention must be one of .*, got 'local'"),
        ("dinov2", {"activation": "relu"}, "activation must be one of .*, got 'relu'"),
        ("dinov2", {"tokens": "class", "slot_stride": 2}, "slot_stride must be 1 with tokens 'class', got 2"),
        ("siglip", {"tokens": "class"}, "tokens must do without a class token, got 'class'"),
        ("vivit", {"tokens": "mean"}, "attention must be 'frame' with .* tokens 'mean', got 'joint'"),
        ("vivit", {"num_frames": 15}, "frames must be a positive multiple of 2, got 15"),
        ("languagebind", {"temporal_window": 1}, "temporal_window must be at least 2, got 1"),
    ],
)
def test_config_errors(family, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL[family], **changes)


def test_from_dict_errors():
    values = config_to_dict(SMALL["dinov2"])
    with pytest.raises(ValueError, match=r"got unknown \['colour'\], missing \['width'\]"):
        EncoderConfig.from_dict({key: value for key, value in values.items() if key != "width"} | {"colour": 1})
    with pytest.raises(ValueError, match=r"got unknown \['colour'\], missing \[\]"):
        EncoderConfig.from_dict({**values, "colour": 1})
    with pytest.raises(ValueError, match="hiera: keys must be"):
        config_from_dict({"family": "hiera", "colour": 1})
