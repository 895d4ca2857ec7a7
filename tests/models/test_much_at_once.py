"""64 videos, and 512 frames, within a budget of memory."""

import gc
import logging
import sys

import pytest
import torch

from merv_fast.models.windows import encode_windows
from merv_fast.runtime.peaks import PeakMemory
from merv_fast.runtime.trace import StageTimer

VIDEOS = 64


@pytest.fixture
def video_model(tiny):
    model = tiny.model.video_model
    yield model
    model.encode_budget = None


def inputs_of(model, batch):
    """All of them the same video, which takes no memory for each."""
    configs = model.encoder_configs.values()
    videos = [torch.randn(1, c.num_frames, 3, c.recipe.size, c.recipe.size) for c in configs]
    return [x.expand(batch, *x.shape[1:]) for x in videos]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count of memory")
@torch.inference_mode()
def test_64_videos_take_the_memory_of_two(video_model):
    inputs = inputs_of(video_model, VIDEOS)
    expected = video_model.encode([x[:2] for x in inputs])
    each = video_model.bytes_per_video()
    video_model.encode_budget = 2 * each
    gc.collect()
    memory = PeakMemory([], host=True)
    memory.start()
    before = memory.read()
    features = video_model.encode(inputs)
    grown = memory.read() - before
    # What is returned, once in parts and once joined, and what two videos take.
    assert grown < 2 * sum(x.nbytes for x in features) + 4 * each < VIDEOS * each / 4
    for got, two in zip(features, expected, strict=True):
        assert torch.equal(got, two.repeat(VIDEOS // 2, 1, 1, 1))


@torch.inference_mode()
def test_512_frames_are_encoded_a_window_at_a_time(tiny, video_model, monkeypatch):
    count = max(tiny.config.num_frames)
    frames = torch.randint(0, 256, (512, 24, 32, 3), dtype=torch.uint8)
    batches = []
    run = type(video_model.concurrent).__call__
    monkeypatch.setattr(
        type(video_model.concurrent), "__call__", lambda self, x: batches.append(len(x[0])) or run(self, x)
    )
    # The language model of the tests has positions for fewer.
    video = encode_windows(video_model, frames, 512 // count, {}, "auto", None, StageTimer(tiny.device))
    assert batches == [1] * (512 // count)
    part = tiny.encode(frames[-count:]).tokens
    assert len(video.tokens) == 512 // count * len(part)
    assert torch.equal(video.tokens[-len(part) :], part)


@torch.inference_mode()
def test_a_budget_that_no_video_fits_into_is_said_once(video_model, caplog):
    inputs = inputs_of(video_model, 3)
    video_model.encode_budget = 1
    with caplog.at_level(logging.WARNING, "merv_fast"):
        first, second = video_model.encode(inputs), video_model.encode(inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    need = video_model.bytes_per_video() / 2**20
    rule = f"at least the {need:.1f} MiB that one video takes"
    assert caplog.messages == [f"encode_budget should be {rule}, got 0.0 MiB: videos are encoded one at a time"]
