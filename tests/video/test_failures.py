import contextlib
import itertools
import logging
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import merv_fast.video.progress
import merv_fast.video.pyav
import merv_fast.video.survey
from merv_fast.errors import VideoError
from merv_fast.video import VideoLimits, load_frames, open_video
from tests.video.clips import indices_of, write_clip


def reason(path, call=open_video, **arguments):
    with pytest.raises(VideoError) as caught:
        call(path, **arguments)
    assert caught.value.path == str(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    return caught.value.reason


def write_audio(path, codec="aac", cover=False):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=48000)
        picture = container.add_stream("mjpeg", rate=25) if cover else None
        if picture:
            picture.height, picture.width, picture.pix_fmt = 32, 32, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24").reformat(format="yuvj420p")
            container.mux(picture.encode(frame))
            container.mux(picture.encode(None))
        frame = av.AudioFrame(format="fltp" if codec == "aac" else "s16", layout="mono", samples=1024)
        frame.sample_rate = 48000
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_no_such_file(tmp_path):
    assert reason(tmp_path / "none.mp4") == "does not exist"


@pytest.mark.parametrize("url", ["http://host/clip.mp4", "https://host/a", "concat:a.mp4|b.mp4", "rtmp://host/live"])
def test_url(url):
    assert reason(url) == "is a URL; only local files are read"


def test_a_local_name_that_reads_like_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "other.mp4", count=9)
    shutil.move(write_clip(tmp_path / "own.mp4", count=4), tmp_path / "concat:other.mp4")
    assert len(open_video("concat:other.mp4")) == 4


def test_empty_file(tmp_path):
    (tmp_path / "empty.mp4").touch()
    assert reason(tmp_path / "empty.mp4") == "is an empty file"


def test_not_a_regular_file():
    assert reason("/dev/null") == "is not a regular file"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_that_nobody_writes_to(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert reason(tmp_path / "pipe.mp4") == "is not a regular file"


def test_broken_link(tmp_path):
    (tmp_path / "link.mp4").symlink_to(tmp_path / "none.mp4")
    assert reason(tmp_path / "link.mp4") == "cannot be read (No such file or directory)"


def test_folder_without_pictures(tmp_path):
    (tmp_path / "readme.txt").write_text("none here")
    assert reason(tmp_path) == "is a folder without pictures (.jpg, .jpeg, .png)"


@pytest.mark.parametrize(
    "content", [b"no video at all\n" * 99, bytes(4096), os.urandom(9999)], ids=["text", "zeros", "noise"]
)
def test_not_a_video(content, tmp_path):
    path = tmp_path / "fake.mp4"
    path.write_bytes(content)
    assert reason(path).startswith("is not a video that can be read here (FFmpeg: ")


def test_subtitles_are_not_a_video(tmp_path):
    path = tmp_path / "titles.mkv"
    path.write_text("1\n00:00:00,000 --> 00:00:05,000\nHello\n\n2\n00:00:06,000 --> 00:00:09,000\nAgain\n")
    assert "is not a video" in reason(path)


def test_audio_only(tmp_path):
    assert reason(write_audio(tmp_path / "sound.mp4")) == "holds audio only, no video"
    assert reason(write_audio(tmp_path / "sound.wav", "pcm_s16le")) == "holds audio only, no video"


def test_cover_art_is_no_video(tmp_path):
    path = write_audio(tmp_path / "song.mp4", cover=True)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    assert reason(path) == "holds audio only, no video"


def test_no_frame_decodes(tmp_path):
    path = write_clip(tmp_path / "clip.mov", "prores_ks", count=3, pix_fmt="yuv422p10le")
    path.write_bytes(path.read_bytes().replace(b"icpf", b"nope"))
    assert reason(path) == "holds no frame that can be decoded"


@pytest.mark.parametrize(
    "bounds",
    [(1.2, None), (5.0, 9.0), (-0.5, None), (0.5, 0.5), (0.8, 0.2), (0.0, -1.0), (float("inf"), None)],
    ids=str,
)
def test_clip_bounds_outside_the_video(bounds, tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    got = reason(path, load_frames, count=8, clip_start_sec=bounds[0], clip_end_sec=bounds[1])
    end = "its end" if bounds[1] is None else f"{bounds[1]} s"
    assert got == f"clip bounds {bounds[0]} s to {end} lie outside the video, which lasts 1.200 s"


def test_clip_that_ends_after_the_video_is_cut(tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    assert indices_of(load_frames(path, 3, clip_start_sec=0.4, clip_end_sec=1e9)) == [10, 19, 29]


KINDS = {
    "a.mp4": ("libx264", {}),
    "a.webm": ("libvpx-vp9", {}),
    "a8.webm": ("libvpx", {}),
    "a.avi": ("mjpeg", {"pix_fmt": "yuvj420p"}),
    "b.avi": ("mpeg4", {}),
    "a.gif": ("gif", {"pix_fmt": "rgb8"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_more_pixels_than_allowed(kind, tmp_path):
    codec, more = KINDS[kind]
    path = write_clip(tmp_path / kind, codec, count=3, **more)
    got = reason(path, limits=VideoLimits(max_pixels=64 * 128 - 1))
    assert got == "a frame of 128 x 64 pixels exceeds the limit of 8191 pixels (VideoLimits.max_pixels)"
    assert len(open_video(path, limits=VideoLimits(max_pixels=64 * 128))) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_far_more_pixels_than_allowed_are_never_decoded(kind, tmp_path, monkeypatch):
    codec, more = KINDS[kind]
    path = write_clip(tmp_path / kind, codec, count=3, height=480, width=640, **more)
    decoded = []
    decode = merv_fast.video.survey.decode
    monkeypatch.setattr(merv_fast.video.survey, "decode", lambda *a: decoded.extend(decode(*a)) or decoded)
    got = reason(path, limits=VideoLimits(max_pixels=1000))
    assert got.endswith("the limit of 1000 pixels (VideoLimits.max_pixels)")
    assert not decoded
    if kind in ("a.webm", "a.avi", "b.avi", "a.gif"):
        # Here FFmpeg learns the size from the decoder, and its own guard stopped that one.
        assert "640 x 480" not in got


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_small_picture_that_claims_to_be_huge(suffix, tmp_path):
    path = tmp_path / f"bomb{suffix}"
    if suffix == ".png":
        header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
        body = b"IDAT" + zlib.compress(bytes(1000))
        chunks = (
            struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, body)
        )
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    else:
        write_clip(path, "mjpeg", count=1, pix_fmt="yuvj420p", muxer={"update": "1"})
        data = path.read_bytes()
        start = data.index(b"\xff\xc0") + 5
        path.write_bytes(data[:start] + struct.pack(">HH", 30000, 30000) + data[start + 4 :])
    assert (
        reason(path) == "a frame of 30000 x 30000 pixels exceeds the limit of 67108864 pixels (VideoLimits.max_pixels)"
    )


def test_more_frames_or_bytes_than_allowed(tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    assert reason(path, limits=VideoLimits(max_frames=29)) == "holds more than 29 frames (VideoLimits.max_frames)"
    size = path.stat().st_size
    got = reason(path, limits=VideoLimits(max_bytes=size - 1))
    assert got == f"has {size} bytes, the limit is {size - 1} (VideoLimits.max_bytes)"
    assert len(open_video(path, limits=VideoLimits(max_frames=30, max_bytes=size))) == 30
    with pytest.raises(ValueError, match="VideoLimits: max_frames must be at least 1, got 0"):
        VideoLimits(max_frames=0)
    for name in ("max_duration", "max_decode_seconds"):
        with pytest.raises(ValueError, match=f"VideoLimits: {name} must be positive, got nan"):
            VideoLimits(**{name: float("nan")})


def test_time_limits(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4")
    limits = VideoLimits(max_duration=1.1)
    assert reason(path, limits=limits) == "lasts 1.2 s, the limit is 1.1 s (VideoLimits.max_duration)"
    assert len(open_video(path, limits=VideoLimits(max_duration=1.2))) == 30
    limits = VideoLimits(max_decode_seconds=29.5)
    clock = itertools.count()
    monkeypatch.setattr(merv_fast.video.progress, "monotonic", lambda: next(clock))
    assert reason(path, limits=limits) == "took longer than 29.5 s to decode (VideoLimits.max_decode_seconds)"
    monkeypatch.setattr(merv_fast.video.pyav, "decoding_threads", lambda: 1)
    start = next(clock)
    open_video(path)
    # As long as opening the file takes, and less than opening it and reading it twice.
    video = open_video(path, limits=VideoLimits(max_decode_seconds=next(clock) - start))
    # Each call has its own time.
    for _ in range(2):
        assert indices_of(video.frames_at(range(20))) == list(range(20))


def test_time_limit_of_a_folder(tmp_path, monkeypatch):
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    video = open_video(tmp_path, limits=VideoLimits(max_decode_seconds=2.5))
    clock = itertools.count()
    monkeypatch.setattr(merv_fast.video.progress, "monotonic", lambda: next(clock))
    assert len(video.frames_at([0, 1])) == 2
    with pytest.raises(VideoError, match=r"took longer than 2\.5 s to decode"):
        video.frames_at([0, 1, 2])


HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.mp4\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile secret.mp4\n"
SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 5004 RTP/AVP 26\r\n"
DASH = '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period></Period></MPD>\n'


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".m3u8", ".gif"])
@pytest.mark.parametrize(
    ("script", "name"),
    [
        (HLS, "an HLS playlist"),
        (CONCAT, "a concat script"),
        (SDP, "an SDP description"),
        (DASH, "a DASH manifest"),
    ],
    ids=["hls", "concat", "sdp", "dash"],
)
def test_hidden_playlist(script, name, suffix, tmp_path):
    write_clip(tmp_path / "secret.mp4")
    path = tmp_path / f"clip{suffix}"
    path.write_text(script)
    if (script, suffix) in ((HLS, ".m3u8"), (CONCAT, ".mp4")):
        # What is refused would work: FFmpeg itself opens the other file.
        with av.open(str(path)) as container:
            assert next(container.decode(video=0)).width == 128
    assert reason(path) == f"is {name}, which points to other files or to a network; only a file's own frames are read"


def test_name_that_is_a_pattern_opens_no_sequence(tmp_path):
    for index in range(3):
        write_clip(tmp_path / f"part{index}.jpg", "mjpeg", count=1, pix_fmt="yuvj420p", muxer={"update": "1"})
    assert reason(tmp_path / "part%d.jpg") == "does not exist"
    shutil.copy(tmp_path / "part0.jpg", tmp_path / "part%d.jpg")
    assert len(open_video(tmp_path / "part%d.jpg")) == 1


def count_decodable(path):
    """Frames that come out of FFmpeg when every error is stepped over."""
    count = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for packet in container.demux(stream):
            with contextlib.suppress(av.FFmpegError):
                count += len(packet.decode())
    return count


CUT = {
    "cut.mp4": ("libx264", {"options": {"bf": "2", "g": "12"}, "muxer": {"movflags": "faststart"}}),
    "cut.mkv": ("libx264", {"options": {"bf": "2", "g": "12"}}),
    "cut.webm": ("libvpx-vp9", {"options": {"deadline": "realtime"}}),
    "cut.avi": ("mpeg4", {}),
}


@pytest.mark.parametrize("kind", CUT)
def test_truncated(kind, tmp_path, caplog):
    codec, more = CUT[kind]
    path = write_clip(tmp_path / kind, codec, count=60, **more)
    data = path.read_bytes()
    # The index of an .avi and .mkv lies at the end; all frames lie before.
    path.write_bytes(data[: int(len(data) * 0.6)])
    with caplog.at_level(logging.WARNING, "merv_fast"):
        video = open_video(path)
    assert len(video) == count_decodable(path)
    assert 0 < len(video) < 60
    missing = f"{60 - len(video)} of 60 frames are missing"
    assert caplog.messages == [f"{path}: truncated or damaged, {missing}"]
    # The last frame may be torn; every one before it is whole.
    assert indices_of(video.frames_at(range(len(video) - 1))) == list(range(len(video) - 1))
    assert load_frames(path, 32).shape == (32, 64, 128, 3)
    assert reason(path, strict=True) == f"is truncated or damaged: {missing}"


def test_torn_last_packet_of_a_container_that_counts_nothing(tmp_path, caplog):
    path = write_clip(tmp_path / "cut.flv", count=60, options={"bf": "0"})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.8)])
    with caplog.at_level(logging.WARNING, "merv_fast"):
        video = open_video(path)
    assert len(video) == count_decodable(path)
    assert caplog.messages == [f"{path}: truncated or damaged, 1 of {len(video) + 1} frames are missing"]


def test_container_that_promises_too_much(tmp_path, caplog):
    path = write_clip(tmp_path / "clip.avi", "mpeg4", count=30)
    data = bytearray(path.read_bytes())
    header = data.index(b"strh") + 8
    assert struct.unpack_from("<I", data, header + 32) == (30,)
    struct.pack_into("<I", data, header + 32, 5000)
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, "merv_fast"):
        video = open_video(path)
    assert len(video) == 30
    assert indices_of(video.frames_at(range(30))) == list(range(30))
    assert caplog.messages == [f"{path}: truncated or damaged, 4970 of 5000 frames are missing"]
    assert "4970 of 5000" in reason(path, strict=True)


def test_last_frame_that_is_held_promises_nothing_more(tmp_path, caplog):
    source = write_clip(tmp_path / "source.mkv", count=5, pts=[0, 1, 2, 22, 23], options={"bf": "0"})
    path = tmp_path / "held.mkv"
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.duration = 400 if packet.pts == 920 else packet.duration
                writer.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams.video[0].metadata["DURATION"].startswith("00:00:01.32")
    assert len(open_video(path, strict=True)) == 5


@pytest.mark.parametrize("lost", [12, 27, 28, 29])
def test_lost_frame_shows_the_one_before(lost, tmp_path, caplog, monkeypatch):
    # Enough threads that the frames after a lost one are in flight when the file ends.
    monkeypatch.setattr(merv_fast.video.pyav, "decoding_threads", lambda: 4)
    path = write_clip(tmp_path / "clip.mov", "prores_ks", pix_fmt="yuv422p10le")
    data = path.read_bytes()
    place = -1
    for _ in range(lost + 1):
        place = data.index(b"icpf", place + 1)
    path.write_bytes(data[:place] + b"nope" + data[place + 4 :])
    video = open_video(path)
    assert len(video) == 30
    with caplog.at_level(logging.WARNING, "merv_fast"):
        got = indices_of(video.frames_at(range(30)))
    assert got == [*range(lost), lost - 1, *range(lost + 1, 30)]
    assert caplog.messages == [f"{path}: truncated or damaged, 1 of 30 frames are missing"]
    strict = open_video(path, strict=True)
    assert indices_of(strict.frames_at([3, 20])) == [3, 20]
    with pytest.raises(VideoError, match="is truncated or damaged: 1 of 2 frames are missing"):
        strict.frames_at([lost, 2])


def test_first_frame_lost(tmp_path, caplog):
    path = write_clip(tmp_path / "clip.mov", "prores_ks", pix_fmt="yuv422p10le")
    path.write_bytes(path.read_bytes().replace(b"icpf", b"nope", 1))
    with caplog.at_level(logging.WARNING, "merv_fast"):
        video = open_video(path)
    assert indices_of(video.frames_at(range(len(video)))) == list(range(1, 30))
    assert caplog.messages == [f"{path}: truncated or damaged, 1 of 30 frames are missing"]
    assert "1 of 30" in reason(path, strict=True)


def test_clip_that_starts_without_its_keyframe(tmp_path, caplog):
    source = write_clip(tmp_path / "whole.ts", count=40, options={"bf": "0", "g": "10"})
    path = tmp_path / "tail.ts"
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for place, packet in enumerate(reader.demux(video=0)):
            if packet.size and place >= 5:
                packet.stream = stream
                writer.mux(packet)
    with caplog.at_level(logging.WARNING, "merv_fast"):
        video = open_video(path)
    # The decoder may start before the next keyframe, frame 10; from there on every frame is sure.
    assert len(video) == count_decodable(path) < 35
    assert indices_of(video.frames_at(range(len(video)))[-30:]) == list(range(10, 40))
    assert caplog.messages == [f"{path}: truncated or damaged, {35 - len(video)} of 35 frames are missing"]


def test_fps_belongs_to_folders(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", count=3)
    with pytest.raises(ValueError, match="open_video: fps must be None unless path is a folder of frames, got 3"):
        open_video(path, fps=3)
    with pytest.raises(ValueError, match=r"open_video: fps must be positive and finite, got 0\.0"):
        open_video(tmp_path, fps=0.0)


def test_nothing_reaches_stderr(tmp_path, capfd):
    path = write_clip(tmp_path / "clip.mp4", count=90, muxer={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.9)])
    capfd.readouterr()
    reason(path, strict=True)
    assert load_frames(path, 4).shape == (4, 64, 128, 3)
    (tmp_path / "noise.mp4").write_bytes(os.urandom(9999))
    reason(tmp_path / "noise.mp4")
    assert capfd.readouterr() == ("", "")


def test_error_survives_a_trip_between_processes():
    error = pickle.loads(pickle.dumps(VideoError(Path("a.mp4"), "does not exist")))
    assert (error.path, error.reason) == ("a.mp4", "does not exist")


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    with pytest.raises(VideoError, match=r"cannot be read \(Permission denied\)"):
        open_video(tmp_path)


def test_a_path_that_cannot_be_looked_at():
    with pytest.raises(VideoError, match=r"cannot be read \("):
        open_video("x" * 5000)
    with pytest.raises(VideoError, match=r"cannot be read \("):
        open_video("nul\0l.mp4")
