"""Encoders of somebody else's on streams of their own: who waits for whom, on streams that only write it down."""

import pytest
import torch
from torch import nn

from merv_fast.integrations.swaps import side_by_side
from merv_fast.integrations.swaps.deferred import Deferred
from merv_fast.integrations.swaps.findings import install
from tests.runtime.happens_before import Recorded, RecordingStreams


class Backbones(nn.Module):
    """Calls its encoders one after another and reads what they return at the end, as the reference does."""

    def __init__(self, streams, fails=False):
        super().__init__()
        self.streams = streams
        self.video_backbones = nn.ModuleList(Recorded(streams, factor, fails=fails) for factor in (2, 3, 4))

    def forward(self, videos):
        features = [encoder(video) for encoder, video in zip(self.video_backbones, videos, strict=True)]
        for feature in features:
            self.streams.read(feature[:])
        return torch.stack(features)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(side_by_side, "on_gpu", lambda x: True)
    model = Backbones(RecordingStreams())
    for encoder, swap in side_by_side.find_lanes(model, model.streams).items():
        install(encoder, swap)
    return model


@pytest.fixture
def videos(model):
    videos = [torch.randn(5) for _ in range(3)]
    for video in videos:
        model.streams.write(video)
    return videos


@torch.no_grad()
def test_each_has_a_stream_and_is_waited_for_when_read(model, videos):
    got = model(videos)
    assert torch.equal(got, torch.stack([videos[0] * 2, videos[1] * 3, videos[2] * 4]))
    assert [encoder.ran_on for encoder in model.video_backbones] == [["cpu/0"], ["cpu/1"], ["cpu/2"]]
    waits = model.streams.waits
    # All have begun before the caller waits for the first.
    assert waits == [(f"cpu/{n}", "caller") for n in range(3)] + [("caller", f"cpu/{n}") for n in range(3)]


@torch.no_grad()
def test_nothing_waits_before_somebody_reads(model, videos):
    feature = model.video_backbones[0](videos[0])
    assert isinstance(feature, Deferred)
    assert feature.shape == (5,)
    assert ("caller", "cpu/0") not in model.streams.waits
    assert (videos[0].data_ptr(), "cpu/0") in model.streams.kept


def test_with_gradients_they_run_where_the_caller_is(model, videos):
    model(videos)
    assert [encoder.ran_on for encoder in model.video_backbones] == [["caller"]] * 3


@torch.no_grad()
def test_an_error_reaches_the_caller_at_once(model, videos):
    model.video_backbones[1].fails = True
    with pytest.raises(RuntimeError, match="the encoder's own error"):
        model(videos)
    assert model.streams.active == "caller"


def test_one_encoder_has_nothing_to_run_beside():
    model = Backbones(RecordingStreams())
    model.video_backbones = model.video_backbones[:1]
    assert side_by_side.find_lanes(model) == {}
