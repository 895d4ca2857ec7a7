"""Every projector and fusion row of the poster as a whole model, built from the reference's strings."""

import dataclasses

import pytest
import torch

from merv_fast import MervConfig, MervVideoModel
from merv_fast.encoders import EncoderConfig
from merv_fast.models.configuration import MervEncoderConfig
from tests.models.random_merv import tiny_config, tiny_encoders

PROJECTORS = {  # arch_specifier -> visual tokens of one encoder, 16 slots of 16 tokens before resampling
    "avg+linear": 16 * 4,
    "avg+gelu-mlp": 16 * 4,
    "no-align+3davg+fused-gelu-mlp": 16 * 4,
    "3davg+frame2+linear": 8 * 4,
    "attntv+linear": 16 * 4,
    "conv+linear": 16 * 4,
    "3dconv+frame4+gelu-mlp": 4 * 4,
    "none+linear": 16 * 16,
}
FUSIONS = {  # feature_fusion -> visual tokens, of 64 from each of four encoders
    "cross_attention_avg_lq": 64,
    "concat": 4 * 64,
    "concat_channel": 64,
    "concat_channel_ln": 64,
    "scalar": 64,
    "mixed25": 64,
    "first": 64,
}


def small(encoder: EncoderConfig) -> EncoderConfig:
    """Frames of 4 x 4 patches."""
    size = 4 * encoder.patch
    recipe = dataclasses.replace(encoder.recipe, size=size, short_side=size)
    return dataclasses.replace(encoder, image_size=size, recipe=recipe)


def video_model(encoders=None, **changes) -> MervVideoModel:
    encoders = encoders or {name: small(config) for name, config in tiny_encoders().items()}
    base = tiny_config()
    torch.manual_seed(0)
    return MervVideoModel(
        MervConfig(
            encoders=list(encoders),
            text_config=base.text_config,
            fusion_query_width=base.fusion_query_width,
            **{f"{name}_config": MervEncoderConfig.from_encoder(config) for name, config in encoders.items()},
            **{"projector_token_length": 4} | changes,
        )
    )


@torch.no_grad()
def run(model: MervVideoModel):
    frames = torch.randint(0, 256, (2, 32, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return model(frames)


@pytest.mark.parametrize(("arch_specifier", "tokens"), PROJECTORS.items())
def test_projectors(arch_specifier, tokens):
    model = video_model(arch_specifier=arch_specifier)
    output = run(model)
    assert output.pooler_output.shape == (2, tokens, 96)
    assert model.num_video_tokens == tokens
    assert output.pooler_output.isfinite().all()
    assert torch.allclose(output.encoder_weights.sum(1), torch.ones(2))


@pytest.mark.parametrize(("feature_fusion", "tokens"), FUSIONS.items())
def test_fusions(feature_fusion, tokens):
    model = video_model(feature_fusion=feature_fusion)
    output = run(model)
    assert output.pooler_output.shape == (2, tokens, 96)
    assert model.num_video_tokens == tokens
    assert (output.encoder_weights is not None) == (feature_fusion in ("cross_attention_avg_lq", "scalar"))


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 100, 144, 256])
def test_tokens_a_slot(tokens):
    assert run(video_model(projector_token_length=tokens)).pooler_output.shape == (2, 16 * tokens, 96)


def test_class_tokens_only():
    """The row "class tok": one token a slot, projected and fused."""
    encoders = tiny_encoders()
    chosen = {
        "languagebind": dataclasses.replace(small(encoders["languagebind"]), tokens="class"),
        "dinov2": dataclasses.replace(small(encoders["dinov2"]), tokens="class"),
    }
    assert run(video_model(chosen, arch_specifier="no-align+linear")).pooler_output.shape == (2, 16, 96)


def test_a_single_token_a_slot_spreads_over_the_grid():
    """The reference pools its 1 x 1 grid to 2 x 2 like any other."""
    chosen = {"dinov2": dataclasses.replace(small(tiny_encoders()["dinov2"]), tokens="class")}
    tokens = run(video_model(chosen, arch_specifier="3davg+linear", feature_fusion="first")).pooler_output
    assert tokens.shape == (2, 16 * 4, 96)
    assert torch.equal(tokens.unflatten(1, (16, 4))[:, :, :1].expand(-1, -1, 4, -1), tokens.unflatten(1, (16, 4)))


def test_all_tokens():
    """The row "257 tok": class token and patches of every slot, none resampled."""
    chosen = {"languagebind": dataclasses.replace(small(tiny_encoders()["languagebind"]), tokens="all")}
    model = video_model(chosen, arch_specifier="no-align+linear", feature_fusion="first")
    assert run(model).pooler_output.shape == (2, 16 * 17, 96)


def test_a_hiera_encoder_joins():
    from merv_fast.encoders import encoder_config

    hiera = dataclasses.replace(encoder_config("hiera-base-video", 32), embed_width=8, stages=(1, 1, 1, 1))
    dinov2 = dataclasses.replace(small(tiny_encoders()["dinov2"]), num_frames=16)
    output = run(video_model({"hiera": hiera, "dinov2": dinov2}))
    assert output.pooler_output.shape == (2, 64, 96)


def test_frames_that_do_not_divide_are_refused():
    model = video_model()
    with pytest.raises(ValueError, match="frames"):
        model(torch.zeros(1, 20, 3, 20, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"pixel_values_videos must be \[B, F, 3, H, W\].* got \[1, 32, 20, 24\]"):
        model(torch.zeros(1, 32, 20, 24, dtype=torch.uint8))


def test_a_ragged_list_of_frames_gives_what_each_video_gives_alone():
    model = video_model()
    videos = [torch.randint(0, 256, (32, 3, *size), dtype=torch.uint8) for size in ((20, 24), (31, 17))]
    with torch.no_grad():
        together = model(videos).pooler_output
        alone = torch.cat([model(video[None]).pooler_output for video in videos])
    torch.testing.assert_close(together, alone)
