import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import merv_fast
from merv_fast.encoders import build_encoder, encoder_config
from merv_fast.models.video_model import ALIVE
from tests.budgets import GOLDEN, relative_error


@pytest.fixture
def video_model(tiny):
    model = tiny.model.video_model
    yield model
    model.encode_budget = None


@pytest.fixture
def batches(video_model, monkeypatch):
    """How many videos each call of the first encoder was given."""
    sizes = []
    first = next(iter(video_model.encoders.values()))
    hook = first.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    yield sizes
    hook.remove()


def test_videos_are_encoded_as_the_budget_allows(video_model, batches):
    configs = video_model.encoder_configs.values()
    inputs = [torch.randn(3, c.num_frames, 3, c.recipe.size, c.recipe.size) for c in configs]
    with torch.inference_mode():
        whole = video_model.encode(inputs)
        assert batches == [3]
        for room, expected in ((2.9, [2, 1]), (0.1, [1, 1, 1])):
            batches.clear()
            video_model.encode_budget = int(room * video_model.bytes_per_video())
            parts = video_model.encode(inputs)
            assert batches == expected
            assert all(relative_error(a, b) < GOLDEN for a, b in zip(parts, whole, strict=True))
    batches.clear()
    # For a backward pass everything is kept, so parts would save nothing.
    assert video_model.encode(inputs)[0].requires_grad
    assert batches == [3]


def test_frozen_encoders_keep_nothing_for_a_backward_pass(video_model, batches):
    configs = video_model.encoder_configs.values()
    inputs = [torch.randn(2, c.num_frames, 3, c.recipe.size, c.recipe.size) for c in configs]
    video_model.encode_budget = video_model.bytes_per_video()
    video_model.encoders.requires_grad_(False)
    try:
        features = video_model.encode(inputs)
        assert batches == [1, 1]
        assert not any(feature.requires_grad for feature in features)
        assert video_model.fuse(features).pooler_output.requires_grad
        # What goes in may learn all the same.
        batches.clear()
        assert video_model.encode([inputs[0].requires_grad_(), *inputs[1:]])[0].requires_grad
        assert batches == [2]
    finally:
        video_model.encoders.requires_grad_(True)


def test_explain_tells_how_many(video_model):
    video_model.encode_budget = 3 * video_model.bytes_per_video()
    row = next(choice for choice in merv_fast.explain(video_model) if choice.part == "encoders")
    assert row.runs == "one after another"
    assert row.why.startswith("3 videos at a time, about ")


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("siglip-vit-b16-224px-all-no-cls", 1),
        pytest.param("languagebind-video-noclass", 8, marks=pytest.mark.slow),
        pytest.param("dinov2-video-all-tokens", 2, marks=pytest.mark.slow),
        pytest.param("vivit-google-b-all-no-cls-16frames", 32, marks=pytest.mark.slow),
        pytest.param("hiera-base-video", 16, marks=pytest.mark.slow),
    ],
)
def test_an_encoder_takes_no_more_than_is_said(name, frames, tmp_path):
    config = encoder_config(name, frames)
    if hasattr(config, "blocks"):
        config = replace(config, blocks=2)
    encoder = build_encoder(config).eval()
    pixels = torch.rand(1, frames, 3, config.recipe.size, config.recipe.size)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        encoder(pixels)
    run.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    alive = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    returned = config.slots * config.tokens_per_slot * config.width * 4
    assert 0.8 < peak / returned / ALIVE[name.startswith("hiera")] < 1
