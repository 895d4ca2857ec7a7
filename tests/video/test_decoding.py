import pickle
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
import torch

import merv_fast.video.pyav
import merv_fast.video.seeking
from merv_fast.video import load_frames, open_video, sample_indices
from tests.budgets import RGB_LEVELS
from tests.video.clips import bars, index_of, indices_of, write_clip

B_FRAMES = {"bf": "3", "g": "12", "b-pyramid": "normal"}
KINDS = {
    "h264-b-frames.mp4": ("libx264", B_FRAMES, {}),
    "h264-b-frames.mkv": ("libx264", B_FRAMES, {}),
    "h264-b-frames.ts": ("libx264", B_FRAMES, {}),
    "h264-b-frames.flv": ("libx264", B_FRAMES, {}),
    "h264-no-times.avi": ("libx264", B_FRAMES, {}),
    "h264-bare.h264": ("libx264", B_FRAMES, {}),
    "mpeg4-b-frames.avi": ("mpeg4", {"bf": "2"}, {}),
    "mpeg2.mpg": ("mpeg2video", {"bf": "2"}, {}),
    "hevc-10-bit.mp4": ("libx265", {"x265-params": "log-level=none"}, {"pix_fmt": "yuv420p10le"}),
    "vp8.webm": ("libvpx", {"deadline": "realtime"}, {}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, {}),
    "mjpeg.avi": ("mjpeg", {}, {"pix_fmt": "yuvj420p"}),
    "animated.gif": ("gif", {}, {"pix_fmt": "rgb8"}),
    "odd-size.mp4": ("libx264", B_FRAMES, {"pix_fmt": "yuv444p", "height": 63, "width": 131}),
    "odd-size.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, {"height": 63, "width": 131}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_frame_exact(kind, tmp_path):
    codec, options, more = KINDS[kind]
    video = open_video(write_clip(tmp_path / kind, codec, options=options, **more))
    assert len(video) == 30
    assert video.fps == 25.0
    assert video.duration == 30 / 25
    assert video.size == (more.get("height", 64), more.get("width", 128))
    everything = video.frames_at(range(30))
    assert everything.shape == (30, *video.size, 3)
    assert everything.dtype == torch.uint8
    assert indices_of(everything) == list(range(30))
    asked = [29, 3, 3, 17, 0, 29, 16]
    some = video.frames_at(asked)
    assert indices_of(some) == asked
    assert torch.equal(some, everything[asked])


@pytest.mark.parametrize("kind", ["h264-b-frames.mp4", "odd-size.mp4", "hevc-10-bit.mp4", "vp9.webm"])
def test_bitwise_equal_to_a_full_decode(kind, tmp_path):
    codec, options, more = KINDS[kind]
    path = write_clip(tmp_path / kind, codec, options=options, **more)
    with av.open(str(path)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.array_equal(open_video(path).frames_at(range(30)).numpy(), expected)


@pytest.mark.parametrize("kind", ["h264.mp4", "h264.mkv", "vp9.webm"])
def test_variable_frame_rate(kind, tmp_path):
    codec, options, _ = KINDS["vp9.webm" if kind == "vp9.webm" else "h264-b-frames.mp4"]
    times = [0, 1, 2, 5, 6, 20, 21, 22, 23, 40, 41, 70]
    path = write_clip(tmp_path / kind, codec, count=len(times), options=options, pts=times)
    video = open_video(path)
    assert indices_of(video.frames_at(range(len(times)))) == list(range(12))
    assert video.duration >= 70 / 25
    # A clip inside the video is read, though the rate that the file states would put it outside.
    assert load_frames(path, 4, clip_start_sec=0.1, clip_end_sec=2.7).shape == (4, 64, 128, 3)


@pytest.mark.parametrize("kind", ["one.mp4", "one.gif", "one.webm"])
def test_one_frame(kind, tmp_path):
    codec, options, more = KINDS[{"mp4": "h264-b-frames.mp4", "gif": "animated.gif", "webm": "vp9.webm"}[kind[4:]]]
    path = write_clip(tmp_path / kind, codec, count=1, options=options, **more)
    assert len(open_video(path)) == 1
    assert indices_of(load_frames(path, 5)) == [0] * 5


@pytest.mark.parametrize("mirrored", [(False, False), (True, False), (False, True)], ids=["", "hflip", "vflip"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation(degrees, mirrored, tmp_path):
    upright = open_video(write_clip(tmp_path / "plain.mp4", count=3)).frames_at(range(3)).numpy()
    path = write_clip(tmp_path / "turned.mp4", count=3, rotation=(degrees, *mirrored))
    expected = np.rot90(upright, degrees // 90, axes=(1, 2))
    if mirrored[0]:
        expected = expected[:, :, ::-1]
    if mirrored[1]:
        expected = expected[:, ::-1]
    video = open_video(path)
    assert video.size == expected.shape[1:3]
    assert np.array_equal(video.frames_at(range(3)).numpy(), expected)


def yuv(rgb, matrix, full):
    """8-bit Y'CbCr of an RGB colour by the definition of BT.601 or BT.709."""
    red, green, blue = (value / 255 for value in rgb)
    kr, kb = {"601": (0.299, 0.114), "709": (0.2126, 0.0722)}[matrix]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = ((blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr))
    if full:
        return round(255 * luma), *(round(128 + 255 * value) for value in chroma)
    return round(16 + 219 * luma), *(round(128 + 224 * value) for value in chroma)


@pytest.mark.parametrize(
    ("flags", "matrix", "full"),
    [
        ((1, 1), "709", False),
        ((1, 2), "709", True),
        ((6, 1), "601", False),
        ((5, 2), "601", True),
        ((2, 0), "601", False),
        ((8, 1), "601", False),
    ],
    ids=["709", "709-full", "601", "601-full", "unspecified", "unknown-to-swscale"],
)
def test_colour(flags, matrix, full, tmp_path):
    colours = [(200, 40, 60), (30, 180, 90), (20, 60, 220), (128, 128, 128), (250, 240, 10)]
    frames = []
    for rgb in colours:
        planes = np.array(yuv(rgb, matrix, full), np.uint8)[:, None, None].repeat(32, 1).repeat(32, 2)
        frames.append(av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), "yuv444p"))
        frames[-1].colorspace, frames[-1].color_range = flags
    path = write_clip(
        tmp_path / "colour.mp4",
        height=32,
        width=32,
        pix_fmt="yuv444p",
        options={"qp": "0"},
        frames=frames,
        colour=flags,
    )
    got = open_video(path).frames_at(range(len(colours))).float()
    expected = torch.tensor(colours).view(-1, 1, 1, 3).float()
    assert (got - expected).abs().max().item() <= RGB_LEVELS


def test_hidden_vp8_pictures_are_not_frames(tmp_path):
    """Reference pictures that are never shown lie in packets of their own."""
    source = write_clip(tmp_path / "plain.webm", "libvpx", options={"deadline": "realtime"})
    with av.open(str(source)) as reader, av.open(str(tmp_path / "hidden.webm"), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if not packet.size:
                continue
            data = bytearray(bytes(packet))
            packet.stream = stream
            time = packet.pts
            writer.mux(packet)
            if time % 200 == 0:
                data[0] &= ~0x10
                hidden = av.Packet(bytes(data))
                hidden.stream, hidden.time_base = stream, packet.time_base
                hidden.pts = hidden.dts = time + 1
                writer.mux(hidden)
    with av.open(str(tmp_path / "hidden.webm")) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 36
    video = open_video(tmp_path / "hidden.webm", strict=True)
    assert len(video) == 30
    assert indices_of(video.frames_at(range(30))) == list(range(30))


def test_stream_that_changes_its_size_keeps_the_first(tmp_path):
    large = write_clip(tmp_path / "large.h264", count=6, options=B_FRAMES).read_bytes()
    small = write_clip(tmp_path / "small.h264", count=6, options=B_FRAMES, height=32, width=64).read_bytes()
    path = tmp_path / "both.h264"
    path.write_bytes(large + small)
    frames = open_video(path).frames_at(range(12))
    assert frames.shape == (12, 64, 128, 3)
    assert indices_of(frames) == [*range(6), *range(6)]


def test_audio_beside_the_video_is_passed_over(tmp_path):
    path = tmp_path / "both.mp4"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=48000)
        video = container.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 64, 128, "yuv420p"
        for index in range(30):
            picture = av.VideoFrame.from_ndarray(bars(index, 64, 128), "rgb24")
            container.mux(video.encode(picture.reformat(format="yuv420p")))
            silence = av.AudioFrame(format="fltp", layout="stereo", samples=1024)
            silence.sample_rate = 48000
            for plane in silence.planes:
                plane.update(bytes(plane.buffer_size))
            container.mux(audio.encode(silence))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    assert indices_of(load_frames(path, 30)) == list(range(30))


def test_reads_no_further_and_converts_no_more_than_asked(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "long.mp4", count=200, options=B_FRAMES | {"g": "250", "sc_threshold": "0"})
    video = open_video(path)
    decoded, converted = [], []
    decode, to_rgb = merv_fast.video.seeking.decode, merv_fast.video.pyav.to_rgb

    def counting_decode(*arguments):
        frames = decode(*arguments)
        decoded.extend(frame.pts for frame in frames)
        return frames

    def counting_convert(*arguments):
        converted.append(1)
        return to_rgb(*arguments)

    monkeypatch.setattr(merv_fast.video.seeking, "decode", counting_decode)
    monkeypatch.setattr(merv_fast.video.pyav, "to_rgb", counting_convert)
    assert indices_of(video.frames_at([20, 5, 5, 20])) == [20, 5, 5, 20]
    assert len(converted) == 2
    assert 2 <= len(decoded) <= 22


def test_load_frames_follows_the_sampling_rule(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", count=100, options=B_FRAMES)
    bounds = {"clip_start_sec": 1.0, "clip_end_sec": 3.5}
    assert indices_of(load_frames(path, 32, **bounds)) == sample_indices(100, 25.0, 32, **bounds)
    assert indices_of(load_frames(path, 8, end_frame=50)) == sample_indices(100, 25.0, 8, end_frame=50)
    assert indices_of(load_frames(str(path), 8)) == sample_indices(100, 25.0, 8)


def test_end_frame_overrides_bounds_outside_the_video(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", count=10)
    assert indices_of(load_frames(path, 2, clip_start_sec=99.0, end_frame=4)) == [0, 4]


def test_no_frames_and_wrong_indices(tmp_path):
    video = open_video(write_clip(tmp_path / "clip.mp4", count=5))
    assert video.frames_at([]).shape == (0, 64, 128, 3)
    assert index_of(video.frames_at(torch.tensor([3]))[0]) == 3
    for index in (-1, 5):
        with pytest.raises(ValueError, match=rf"frames_at: indices must lie in 0\.\.4, got {index}"):
            video.frames_at([0, index])
    with pytest.raises(TypeError):
        video.frames_at([0.5])


def test_pickles_and_serves_several_threads(tmp_path):
    video = pickle.loads(pickle.dumps(open_video(write_clip(tmp_path / "clip.mp4"))))
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start: indices_of(video.frames_at(range(start, 30, 4))), range(4)))
    assert parts == [list(range(start, 30, 4)) for start in range(4)]


def test_says_what_decodes(tmp_path):
    assert open_video(write_clip(tmp_path / "clip.mp4")).decoder.startswith("PyAV (h264, ")
