import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from merv_fast.errors import VideoError
from merv_fast.video import VideoLimits, load_frames, open_video
from tests.video.clips import bars, indices_of


def write_folder(folder, names, height=64, width=128):
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(names):
        Image.fromarray(bars(index, height, width)).save(folder / name)
    return folder


def noise(height=30, width=41):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA"])
def test_png_is_lossless(mode, tmp_path):
    picture = Image.fromarray(noise()).convert(mode)
    picture.save(tmp_path / "a.png")
    frames = open_video(tmp_path / "a.png").frames_at([0])
    assert np.array_equal(frames[0].numpy(), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png"])
def test_a_picture_is_a_video_of_one_repeated_frame(name, tmp_path):
    Image.fromarray(bars(77, 63, 128)).save(tmp_path / name)
    video = open_video(tmp_path / name)
    assert (len(video), video.size, video.fps, video.duration) == (1, (63, 128), 0.0, math.inf)
    frames = load_frames(tmp_path / name, 5, clip_start_sec=20.0, clip_end_sec=30.0)
    assert frames.shape == (5, 63, 128, 3)
    assert indices_of(frames) == [77] * 5


def test_content_and_not_the_name_chooses_the_decoder(tmp_path):
    Image.fromarray(bars(3, 64, 128)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert indices_of(load_frames(tmp_path / "a.jpg", 1)) == [3]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_exif_orientation(suffix, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(bars(0b00110101, 48, 96))
    stored.save(tmp_path / f"plain{suffix}")
    stored.save(tmp_path / f"turned{suffix}", exif=exif)
    plain = open_video(tmp_path / f"plain{suffix}").frames_at([0])[0].numpy()
    upright = Image.fromarray(plain)
    upright.getexif()[0x0112] = orientation
    got = open_video(tmp_path / f"turned{suffix}").frames_at([0])[0].numpy()
    assert np.array_equal(got, np.asarray(ImageOps.exif_transpose(upright)))


def test_folder_in_natural_order(tmp_path):
    names = ["frame1.jpg", "frame2.png", "frame9.jpeg", "frame10.jpg", "Frame11.JPG", "frame100.jpg"]
    folder = write_folder(tmp_path / "frames", names)
    (folder / ".hidden.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    video = open_video(folder)
    assert (len(video), video.fps, video.duration, video.size) == (6, 3.0, 2.0, (64, 128))
    assert indices_of(video.frames_at([5, 0, 3, 3])) == [5, 0, 3, 3]
    # Two frames a second: the clip is frames 2 to 4 - 1.
    assert indices_of(load_frames(folder, 2, fps=2, clip_start_sec=1.0, clip_end_sec=2.0)) == [2, 3]


def test_folder_s_bounds(tmp_path):
    folder = write_folder(tmp_path / "frames", ["1.jpg", "2.jpg", "3.jpg"])
    with pytest.raises(VideoError, match=r"clip bounds 1\.0 s to its end lie outside the video, which lasts 1\.000 s"):
        load_frames(folder, 2, clip_start_sec=1.0)


def test_folder_of_unequal_pictures(tmp_path):
    folder = write_folder(tmp_path / "frames", ["1.jpg", "2.jpg"])
    Image.new("RGB", (50, 40)).save(folder / "3.jpg")
    with pytest.raises(VideoError, match=r"3\.jpg: has height and width \(40, 50\), the first picture \(64, 128\)"):
        open_video(folder).frames_at([0, 2])


def test_limits(tmp_path):
    folder = write_folder(tmp_path / "frames", ["1.jpg", "2.jpg"])
    with pytest.raises(VideoError, match=r"holds 2 pictures, more than 1 \(VideoLimits\.max_frames\)"):
        open_video(folder, limits=VideoLimits(max_frames=1))
    for path in (folder, folder / "1.jpg"):
        with pytest.raises(VideoError, match=r"1\.jpg: has \d+ bytes, the limit is 99 \(VideoLimits\.max_bytes\)"):
            open_video(path, limits=VideoLimits(max_bytes=99))
        with pytest.raises(VideoError, match="a frame of 128 x 64 pixels exceeds the limit of 8191 pixels"):
            open_video(path, limits=VideoLimits(max_pixels=8191))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is an empty file"),
        (b"plain text", "is not a JPEG or PNG picture"),
        (
            b"\x89PNG\r\n\x1a\n" + bytes(99),
            "cannot be decoded (FFmpeg: Invalid data found when processing input)",
        ),
        (b"\xff\xd8\xff" + bytes(99), "cannot be decoded (FFmpeg: Invalid data found when processing input)"),
    ],
    ids=["empty", "text", "png", "jpeg"],
)
def test_broken_picture(content, reason, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(VideoError) as caught:
        open_video(tmp_path / "a.jpg")
    assert caught.value.reason == reason


def test_frames_are_independent_of_the_batch(tmp_path):
    folder = write_folder(tmp_path / "frames", [f"{index}.png" for index in range(12)])
    video = open_video(folder)
    assert torch.equal(video.frames_at([7]), video.frames_at(range(12))[7:8])


@pytest.mark.parametrize("count", [0, -1])
def test_no_frames_of_a_picture(tmp_path, count):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"load_frames: count must be at least 1, got {count}"):
        load_frames(tmp_path / "a.png", count)
