import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from merv_fast.encoders.hiera import HIERA_ENCODERS, Hiera, HieraConfig, convert_hiera, hiera_config
from merv_fast.encoders.hiera_blocks import pool_units, to_mask_units
from merv_fast.errors import CheckpointError
from tests.budgets import GOLDEN, low_precision, relative_error
from tests.golden_files import load, weights

# Made on import: torch.device() redirects the functions found at its first use; fixtures replace torch.empty.
with torch.device("meta"):
    PIXELS = torch.zeros(2, 32, 3, 224, 224)


@pytest.fixture(scope="module")
def golden() -> tuple[HieraConfig, dict[str, Tensor]]:
    tensors, metadata = load("encoder_hiera")
    shape = metadata["config"]
    config = replace(
        hiera_config("hiera-base-video", shape["num_frames"]),
        image_size=shape["image_size"],
        embed_width=shape["embed_dim"],
        heads=shape["num_heads"],
        stages=tuple(shape["stages"]),
    )
    return config, tensors


def encoder(config: HieraConfig, tensors: dict[str, Tensor]) -> Hiera:
    model = Hiera(config).eval().requires_grad_(False)
    model.load_state_dict(convert_hiera(config, weights(tensors)))
    return model


def test_golden_of_two_views(golden):
    config, tensors = golden
    got = encoder(config, tensors)(tensors["input"].float())
    assert got.shape == (1, config.slots, config.tokens_per_slot, config.width) == (1, 16, 4, 64)
    assert relative_error(got.flatten(1, 2), tensors["features"]) < GOLDEN


def test_videos_and_views_are_independent(golden):
    config, tensors = golden
    pixels = tensors["input"].float()
    pixels = torch.cat([pixels, pixels.flip(1, 4)])
    model = encoder(config, tensors)
    got = model(pixels)
    for video in range(2):
        for view in range(2):
            frames = pixels[video : video + 1, 16 * view : 16 * (view + 1)]
            slots = got[video : video + 1, 8 * view : 8 * (view + 1)]
            assert relative_error(slots, model(frames)) < GOLDEN


def test_no_videos(golden):
    config, tensors = golden
    assert encoder(config, tensors)(torch.zeros(0, 32, 3, 64, 64)).shape == (0, 16, 4, 64)


def test_poolings_take_the_maximum_of_neighbours():
    x = torch.randn(2, 3, 16 * 24, 5)
    picture = x.reshape(6, 16, 24, 5).permute(0, 3, 1, 2)
    # A unit's tokens before the last pooling are the four quarters of its square.
    quarters = pool_units(pool_units(to_mask_units(x, (2, 3))))
    expected = max_pool2d(picture, 4).reshape(6, 5, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1)
    assert torch.equal(quarters.reshape(6, 2, 3, 2, 2, 5), expected)
    whole = pool_units(quarters)
    assert torch.equal(whole.reshape(6, 2, 3, 5), max_pool2d(picture, 8).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("encoder_id", "width", "blocks", "parameters"),
    [
        ("hiera-base-video", 768, 24, 50_783_424),
        ("hiera-base-plus-video", 896, 24, 69_031_648),
        ("hiera-large-video", 1152, 48, 212_628_096),
    ],
)
@pytest.mark.parametrize("suffix", ["", "-noft"])
def test_full_size(encoder_id, width, blocks, parameters, suffix):
    config = hiera_config(encoder_id + suffix, 32)
    assert (config.slots, config.grid, config.tokens_per_slot, config.width) == (16, (7, 7), 49, width)
    assert (config.family, config.files) == ("hiera", ("model.safetensors",))
    assert config.source.endswith("mae_k400" if suffix else "mae_k400_ft_k400")
    with torch.device("meta"):
        model = Hiera(config)
    out = model(PIXELS)
    assert out.shape == (2, 16, 49, width)
    assert len(model.blocks) == blocks
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_id_of_the_reference():
    assert set(HIERA_ENCODERS) == {
        f"hiera-{size}-video{suffix}" for size in ("base", "base-plus", "large") for suffix in ("", "-noft")
    }
    for encoder_id, (size, source) in HIERA_ENCODERS.items():
        assert source.startswith(f"facebook/hiera_{size}_16x224.")
        assert encoder_id.startswith(f"hiera-{size.replace('_', '-')}-video")


def test_configuration_is_json():
    config = hiera_config("hiera-base-video", 16, "resize-crop")
    written = json.loads(json.dumps(asdict(config)))
    assert written["name"] == "hiera-base-video"
    assert written["num_frames"] == 16
    assert written["recipe"] == {
        "size": 224,
        "short_side": 256,
        "resize": "resize-crop",
        "method": "bilinear",
        "antialias": True,
        "mean": [0.45] * 3,
        "std": [0.225] * 3,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 24}, "hiera-base-video: frames must be a positive multiple of 16, got 24"),
        ({"num_frames": 0}, "hiera-base-video: frames must be a positive multiple of 16, got 0"),
        ({"image_size": 240}, "hiera: image_size must be a positive multiple of 32, got 240"),
        ({"stages": (2, 3, 16)}, r"hiera: stages must be 4 positive block counts, got \(2, 3, 16\)"),
        ({"heads": 5}, r"hiera: heads must divide embed_width \(96\), got 5"),
    ],
)
def test_configuration_errors(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(hiera_config("hiera-base-video", 16), **change)


def test_unknown_encoder():
    with pytest.raises(ValueError, match=r"^hiera: encoder_id must be one of \[.*\], got 'hiera-huge'$"):
        hiera_config("hiera-huge", 16)


@pytest.mark.parametrize("shape", [(1, 32, 3, 64, 96), (1, 3, 32, 64, 64), (32, 3, 64, 64)])
def test_pixel_shape(golden, shape):
    config, tensors = golden
    with pytest.raises(ValueError, match=r"^hiera-base-video: pixels must be \[B, F, 3, 64, 64\], got \["):
        encoder(config, tensors)(torch.zeros(shape))


@pytest.mark.parametrize("frames", [0, 8, 24])
def test_frames_of_a_call(golden, frames):
    config, tensors = golden
    message = f"^hiera-base-video: frames must be a positive multiple of 16, got {frames}$"
    with pytest.raises(ValueError, match=message):
        encoder(config, tensors)(torch.zeros(2, frames, 3, 64, 64))


def test_unused_keys_are_dropped(golden):
    config, tensors = golden
    state = weights(tensors)
    assert "head.projection.weight" in state
    pretraining = {key: value for key, value in state.items() if not key.startswith(("norm.", "head."))}
    converted = convert_hiera(config, state)
    assert converted.keys() == pretraining.keys()
    decoder = ["mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "encoder_norm.weight"]
    decoder.append("multi_scale_fusion_heads.0.weight")
    again = convert_hiera(config, pretraining | {key: torch.zeros(1) for key in decoder})
    assert all(again[key] is pretraining[key] for key in pretraining)
    assert again.keys() == pretraining.keys()


def test_checkpoint_errors_list_the_keys(golden):
    config, tensors = golden
    state = weights(tensors)
    state["blocks.0.attn.gate"] = torch.zeros(1)
    del state["blocks.3.norm1.weight"]
    state["pos_embed_spatial"] = torch.zeros(1, 9, 8)
    with pytest.raises(CheckpointError) as caught:
        convert_hiera(config, state)
    assert str(caught.value) == (
        "convert_hiera: checkpoint must match hiera-base-video, got unknown: blocks.0.attn.gate; "
        "missing: blocks.3.norm1.weight; misshapen: pos_embed_spatial [1, 9, 8] for [1, 256, 8]"
    )


def test_bfloat16(golden):
    config, tensors = golden
    pixels = tensors["input"].float()
    model = encoder(config, tensors).bfloat16()
    got = model(pixels)
    exact = model.double()(pixels.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() <= low_precision(got, exact)


def test_one_graph(golden):
    config, tensors = golden
    model = encoder(config, tensors)
    pixels = tensors["input"].float()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(pixels), model(pixels)) < GOLDEN
