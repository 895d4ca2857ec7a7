import pytest

from bench.video import MOST_MEMORY, memory_of
from tests.video.clips import panned, repeat_clip, write_clip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_minutes_of_1080p(tmp_path):
    """32 frames of them are 199 MB."""
    options = {"preset": "ultrafast", "bf": "2", "g": "60", "sc_threshold": "0"}
    part = write_clip(tmp_path / "part.mp4", frames=panned(60, 1080, 1920), height=1080, width=1920, options=options)
    megabytes = memory_of(repeat_clip(part, tmp_path / "long.mp4", 10 * 60 * 25 // 60))
    assert 199 < megabytes < MOST_MEMORY
