"""GIFs against Pillow, which the reference reads them with."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from merv_fast.errors import VideoError
from merv_fast.video import load_frames, open_video


def write_gif(path, pictures, **options):
    first, *others = pictures
    first.save(path, save_all=True, append_images=others, duration=20, loop=0, **options)
    return path


def pillow(path):
    with Image.open(path) as file:
        return np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)])


@pytest.fixture
def counting(tmp_path):
    """29 grey frames at 20 ms: 29 / fps * fps - 1 rounds to below 28."""
    pictures = [Image.fromarray(np.full((24, 32), 8 * index, np.uint8)) for index in range(29)]
    return write_gif(tmp_path / "counting.gif", pictures)


def test_a_whole_gif_ends_with_its_last_frame(counting):
    expected = pillow(counting)
    assert len(open_video(counting)) == len(expected) == 29
    got = load_frames(counting, 32).numpy()
    assert np.array_equal(got, expected[np.linspace(0, 28, 32, dtype=int)])
    assert got[-1, 0, 0, 0] == 8 * 28


def test_a_clip_of_a_gif_is_a_clip(counting):
    assert load_frames(counting, 4, end_frame=3)[:, 0, 0, 0].tolist() == [0, 8, 16, 24]
    assert load_frames(counting, 2, clip_start_sec=0.1, clip_end_sec=0.2)[:, 0, 0, 0].tolist() == [40, 72]
    with pytest.raises(VideoError, match="clip bounds"):
        load_frames(counting, 2, clip_start_sec=9.0)


def test_transparent_pixels_are_black(tmp_path):
    pictures = []
    for index in range(4):
        pixels = np.zeros((16, 16, 4), np.uint8)
        pixels[4:8, 2 + index : 8 + index] = (200, 40, 40 * index, 255)
        pictures.append(Image.fromarray(pixels))
    path = write_gif(tmp_path / "transparent.gif", pictures, disposal=2)
    expected = pillow(path)
    assert expected[0, 0, 0].tolist() == [0, 0, 0]
    assert np.array_equal(load_frames(path, 4).numpy(), expected)
