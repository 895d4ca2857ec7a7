import doctest
import importlib
import json
import logging
import math

import pytest
import torch

from merv_fast.video import every, sample_indices
from tests.golden_files import GOLDEN

CASES = json.loads((GOLDEN / "sampling.json").read_text())
CLIP = ("frames", "fps", "clip_start_sec", "clip_end_sec", "end_frame")


def name(case):
    return f"{case['frames']}@{case['fps']}-{case['clip_start_sec']}-{case['clip_end_sec']}-{case['end_frame']}"


@pytest.mark.parametrize("case", [case for case in CASES if case["in_range"]], ids=name)
def test_matches_the_reference(case, caplog):
    got = sample_indices(count=case["num_frames"], **{key: case[key] for key in CLIP})
    assert got == case["indices"]
    assert not caplog.records


@pytest.mark.parametrize("case", [case for case in CASES if not case["in_range"]], ids=name)
def test_moves_the_reference_s_stray_indices_inside_and_says_so(case, caplog):
    with caplog.at_level(logging.WARNING, "merv_fast"):
        got = sample_indices(count=case["num_frames"], **{key: case[key] for key in CLIP})
    assert got == [min(index, case["frames"] - 1) for index in case["indices"]]
    (record,) = caplog.records
    assert f"lie outside the video's {case['frames']} frames" in record.getMessage()


def test_end_before_the_first_frame_gives_the_first_frame(caplog):
    assert sample_indices(30, 30.0, 4, 0.0, 0.01) == [0, 0, 0, 0]
    assert "3 of 4 indices (-1 to 0)" in caplog.text


@pytest.mark.parametrize("bound", [None, math.nan], ids=str)
def test_bounds_that_are_not_given(bound):
    assert sample_indices(250, 25.0, 32, bound, bound) == sample_indices(250, 25.0, 32)


def test_negative_end_frame_is_not_given():
    assert sample_indices(250, 25.0, 8, 1.0, 3.5, end_frame=-1) == sample_indices(250, 25.0, 8, 1.0, 3.5)
    assert sample_indices(250, 25.0, 8, 1.0, 3.5, end_frame=0) == [0] * 8


def test_endless_clip_ends_with_the_video():
    assert sample_indices(250, 25.0, 8, 0.0, math.inf) == sample_indices(250, 25.0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 25.0, 8), "sample_indices: frames must be at least 1, got 0"),
        ((10, 25.0, 0), "sample_indices: count must be at least 1, got 0"),
        ((10, 0.0, 8), "sample_indices: fps must be positive and finite, got 0.0"),
        ((10, math.nan, 8), "sample_indices: fps must be positive and finite, got nan"),
        ((10, 25.0, 8, math.inf), "sample_indices: clip bounds must be finite, got inf to None"),
    ],
)
def test_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_indices(*arguments)


@pytest.mark.parametrize("dim", [0, 1, -3])
def test_every_takes_the_reference_s_slice_as_a_view(dim):
    frames = torch.arange(8 * 8 * 8 * 2).view(8, 8, 8, 2)
    got = every(frames, 4, dim)
    assert torch.equal(got, frames.index_select(dim, torch.tensor([0, 2, 4, 6])))
    assert got.untyped_storage().data_ptr() == frames.untyped_storage().data_ptr()


@pytest.mark.parametrize("count", [0, 12, 64])
def test_every_refuses_a_count_that_does_not_divide(count):
    with pytest.raises(ValueError, match=f"every: count must divide the 32 frames, got {count}"):
        every(torch.arange(32), count)


@pytest.mark.parametrize("module", ["sampling", "prepare"])
def test_examples_run(module):
    result = doctest.testmod(importlib.import_module(f"merv_fast.video.{module}"))
    assert result.attempted
    assert not result.failed
