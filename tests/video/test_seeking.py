import logging
import struct
import subprocess
import sys

import av
import numpy as np
import pytest

import merv_fast.video.seeking
from merv_fast.video import open_video
from merv_fast.video.seeking import PacketIndex, PacketLog
from tests.video.clips import panned, plain_decode, repeat_clip, write_clip
from tests.video.test_real_clips import CLIPS

X264 = {"bf": "3", "b-pyramid": "normal", "g": "12"}
OPEN = X264 | {"x264-params": "open-gop=1"}
X265 = "log-level=none:keyint=12:min-keyint=12"
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "12"}
RAGGED = [2 * place + 3 * (place // 7) + (place % 3 == 2) for place in range(100)]

# Kind: codec, encoder options, what else `write_clip` takes, and how many places decoding may start at (None: it
# must start with the file; ... : whatever the encoder made).
KINDS = {
    "closed.mp4": ("libx264", X264, {}, ...),
    "closed.mkv": ("libx264", X264, {}, ...),
    "closed.ts": ("libx264", X264, {}, ...),
    "closed.flv": ("libx264", X264, {}, ...),
    "closed.mov": ("libx264", X264, {"rotation": (90, False, False)}, ...),
    "open.mp4": ("libx264", OPEN, {}, ...),
    "open.mkv": ("libx264", OPEN, {}, ...),
    "open.ts": ("libx264", OPEN, {}, ...),
    "close-keys.mp4": ("libx264", X264 | {"g": "3", "bf": "2"}, {}, ...),
    "keyint-250.mp4": ("libx264", X264 | {"g": "250", "sc_threshold": "0"}, {}, 1),
    "gradual.mp4": ("libx264", {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}, {}, 1),
    "gradual.mkv": ("libx264", {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}, {}, 1),
    "ragged.mp4": ("libx264", X264, {"pts": RAGGED}, ...),
    "ragged.mkv": ("libx264", OPEN, {"pts": RAGGED}, ...),
    "interlaced.mp4": ("libx264", OPEN | {"flags": "+ildct+ilme"}, {}, ...),
    "10-bit.mp4": ("libx264", X264, {"pix_fmt": "yuv420p10le"}, ...),
    "odd.mp4": ("libx264", X264, {"pix_fmt": "yuv444p", "height": 63, "width": 131}, ...),
    "no-times.avi": ("libx264", X264, {}, None),
    "bare.h264": ("libx264", X264, {}, None),
    "hevc-closed.mp4": ("libx265", {"x265-params": X265 + ":open-gop=0"}, {}, ...),
    "hevc-open.mp4": ("libx265", {"x265-params": X265 + ":open-gop=1"}, {}, ...),
    "hevc-open.mkv": ("libx265", {"x265-params": X265 + ":open-gop=1"}, {"pix_fmt": "yuv420p10le"}, ...),
    "hevc-layers.mp4": ("libx265", {"x265-params": X265 + ":open-gop=0:temporal-layers=3:bframes=3"}, {}, ...),
    "hevc-open.ts": ("libx265", {"x265-params": X265 + ":open-gop=1"}, {}, ...),
    "vp9.webm": ("libvpx-vp9", VP9, {"height": 63, "width": 131}, ...),
    "vp9-hidden.mp4": ("libvpx-vp9", {"deadline": "good", "cpu-used": "5", "g": "12", "lag-in-frames": "10"}, {}, ...),
    "vp8.webm": ("libvpx", VP9 | {"auto-alt-ref": "1", "lag-in-frames": "10", "deadline": "good"}, {}, ...),
    "av1.mp4": ("libsvtav1", {"preset": "12", "g": "12"}, {}, ...),
    "av1.mkv": ("libsvtav1", {"preset": "12", "g": "12", "svtav1-params": "irefresh-type=1"}, {}, 1),
    "mpeg4.mp4": ("mpeg4", {"bf": "2", "g": "12"}, {}, ...),
    "mpeg4.avi": ("mpeg4", {"g": "12"}, {}, ...),
    "mpeg2.ts": ("mpeg2video", {"bf": "2", "g": "12"}, {}, ...),
    "mpeg2.mkv": ("mpeg2video", {"bf": "2", "g": "12"}, {}, ...),
    "mpeg1.mkv": ("mpeg1video", {"bf": "2", "g": "12"}, {}, ...),
    "ffv1.mkv": ("ffv1", {"g": "12"}, {}, ...),
    "mjpeg.avi": ("mjpeg", {}, {"pix_fmt": "yuvj420p"}, 100),
    "mjpeg.mkv": ("mjpeg", {}, {"pix_fmt": "yuvj420p"}, 100),
    "prores.mov": ("prores_ks", {}, {"pix_fmt": "yuv422p10le"}, 100),
    "animated.gif": ("gif", {}, {"pix_fmt": "rgb8"}, 1),
    "one.mp4": ("libx264", X264, {"count": 1}, None),
    "one.mkv": ("mjpeg", {}, {"pix_fmt": "yuvj420p", "count": 1}, 1),
}


def make(tmp_path, kind):
    codec, options, more, _ = KINDS[kind]
    more = dict(more)
    shape = {name: more[name] for name in ("height", "width", "pix_fmt") if name in more}
    return write_clip(tmp_path / kind, codec, options=options, frames=panned(more.pop("count", 100), **shape), **more)


def check(path, rounds=12):
    """Every random choice of frames is what a plain decode gives, bit for bit."""
    expected = plain_decode(path)
    video = open_video(path, strict=True)
    assert len(video) == len(expected)
    expected = np.stack([video._survey.orientation.apply(frame) for frame in expected])
    random = np.random.default_rng(0)
    choices = [random.choice(len(video), min(int(random.integers(1, 6)), len(video)), False) for _ in range(rounds)]
    for choice in [[len(video) - 1], [0, len(video) - 1], *choices]:
        assert np.array_equal(video.frames_at(choice).numpy(), expected[choice])
    return video


@pytest.mark.parametrize("eager", [False, True], ids=["as-is", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_bitwise_equal_to_a_plain_decode(kind, eager, tmp_path, monkeypatch, caplog):
    if eager:
        # Start anew at every chance, and seek for each start.
        monkeypatch.setattr(merv_fast.video.seeking, "RESTART", 0)
        monkeypatch.setattr(merv_fast.video.seeking, "READ_THROUGH", 0)
    with caplog.at_level(logging.WARNING, "merv_fast"):
        video = check(make(tmp_path, kind))
    assert not caplog.messages
    entries = KINDS[kind][3]
    if entries is None:
        assert video._index is None
    else:
        found = len(video._index.entries)
        assert found == entries if entries is not ... else found > 5


def with_edits(path, edits):
    """``path`` with the edit list of its only track replaced by (duration in seconds/1000, first media time)."""
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") - 4
    old = struct.unpack_from(">I", data, place)[0]
    body = b"".join(struct.pack(">IiHH", *edit, 1, 0) for edit in edits)
    new = struct.pack(">I4sII", 16 + len(body), b"elst", 0, len(edits)) + body
    data[place : place + old] = new
    for box in (b"edts", b"trak", b"moov"):
        head = data.index(box) - 4
        struct.pack_into(">I", data, head, struct.unpack_from(">I", data, head)[0] + len(new) - old)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("gop", ["closed.mp4", "open.mp4"])
@pytest.mark.parametrize(("first", "length"), [(30, 50), (18, 60), (17, 83), (5, 20)])
def test_edit_list_that_cuts_both_ends(gop, first, length, tmp_path, monkeypatch):
    monkeypatch.setattr(merv_fast.video.seeking, "RESTART", 0)
    path = make(tmp_path, gop)
    whole = plain_decode(path)
    # B-frames put the first frame at media time 1024; a frame lasts 512.
    with_edits(path, [(40 * length, 1024 + 512 * first)])
    video = check(path)
    assert len(video._index.entries) >= 2
    assert np.array_equal(video.frames_at([0, length - 1]).numpy(), whole[[first, first + length - 1]])


@pytest.mark.parametrize("edits", [[(5, 20), (52, 30)], [(0, 12), (40, 30)]], ids=["anywhere", "at-key-frames"])
def test_edit_list_with_a_cut_inside_is_decoded_from_the_start(edits, tmp_path, monkeypatch):
    monkeypatch.setattr(merv_fast.video.seeking, "RESTART", 0)
    path = make(tmp_path, "closed.mp4")
    video = check(with_edits(path, [(40 * length, 1024 + 512 * first) for first, length in edits]))
    assert video._index is None


def test_edit_list_of_a_truncated_file(tmp_path):
    """What the edit list cuts off does not count as missing, what the file lacks does."""
    frames, muxer = panned(100), {"movflags": "faststart"}
    path = write_clip(tmp_path / "cut.mp4", options=X264, frames=frames, muxer=muxer)
    with_edits(path, [(40 * 50, 1024 + 512 * 10)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    survey = open_video(path)._survey
    assert survey.damaged
    assert 20 < survey.frames < survey.promised
    # Frames that lead up to the edit's end in decoding order may count as well.
    assert 50 <= survey.promised <= 53


def remux(source, path, change):
    """``source`` with each packet changed by ``change(place, packet)``, which returns its data."""
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for place, packet in enumerate(packet for packet in reader.demux(video=0) if packet.size):
            new = av.Packet(change(place, packet))
            new.stream, new.time_base, new.duration = stream, packet.time_base, packet.duration
            new.pts, new.dts, new.is_keyframe = packet.pts, packet.dts, packet.is_keyframe
            writer.mux(new)
    return path


@pytest.mark.parametrize("kind", ["closed.mp4", "hevc-open.mp4", "vp9.mp4", "mpeg4.mp4", "mpeg4-b.mp4"])
def test_container_that_takes_every_frame_for_a_key_frame(kind, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(merv_fast.video.seeking, "RESTART", 0)

    def change(place, packet):
        packet.is_keyframe = True
        return bytes(packet)

    source = {"vp9.mp4": "vp9-hidden.mp4", "mpeg4.mp4": "mpeg4.avi", "mpeg4-b.mp4": "mpeg4.mp4"}.get(kind, kind)
    path = remux(make(tmp_path, source), tmp_path / f"lying-{kind}", change)
    with caplog.at_level(logging.WARNING, "merv_fast"):
        video = check(path)
    if not kind.startswith("mpeg4"):
        # These packets are looked into, VP9's by FFmpeg.
        assert 5 < len(video._index.entries) < 60
    else:
        assert video._index is None
        # B-frames among the key frames are seen at once, the rest when it comes out of the decoder.
        assert sum("decoding from its start" in message for message in caplog.messages) == (kind != "mpeg4-b.mp4")


def test_key_frame_without_its_parameter_sets_is_no_entry(tmp_path):
    def change(place, packet):
        units = bytes(packet).split(b"\0\0\1")[1:]
        return b"".join(b"\0\0\1" + unit for unit in units if not place or unit[0] >> 1 & 63 not in (32, 33, 34))

    video = check(remux(make(tmp_path, "hevc-open.ts"), tmp_path / "bare.ts", change))
    assert len(video._index.entries) == 1


@pytest.mark.parametrize("name", ["bigbuckbunny", "bikes", "carphone_pristine", "carphone_distorted"])
def test_real_clip(name, monkeypatch):
    monkeypatch.setattr(merv_fast.video.seeking, "RESTART", 0)
    path = next(path for path in CLIPS if path.stem == name)
    check(path, rounds=3)


@pytest.fixture
def decoded(monkeypatch):
    """Frames that left the decoder while seeking."""
    frames = []
    decode = merv_fast.video.seeking.decode

    def counting(*arguments):
        new = decode(*arguments)
        frames.extend(frame.pts for frame in new)
        return new

    monkeypatch.setattr(merv_fast.video.seeking, "decode", counting)
    return frames


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_sparse_frames_are_sought(suffix, tmp_path, decoded):
    source = write_clip(tmp_path / "part.mp4", options=X264 | {"g": "50", "sc_threshold": "0"}, frames=panned(50))
    if suffix == ".ts":
        source = write_clip(tmp_path / "part.ts", options=X264 | {"g": "50", "sc_threshold": "0"}, frames=panned(50))
    path = repeat_clip(source, tmp_path / f"long{suffix}", 40)
    expected = plain_decode(source)
    video = open_video(path, strict=True)
    assert len(video) == 2000
    wanted = [3, 204, 1002, 1003, 1955]
    assert np.array_equal(video.frames_at(wanted).numpy(), expected[[index % 50 for index in wanted]])
    # From four key frames up to the frames; 1956 from the start. Some are left out, and the decoder held others.
    assert 4 + 1 <= len(decoded) <= 4 + 5 + 4 + 6 + 4 * 6
    decoded.clear()
    wanted = range(0, 400, 8)
    assert np.array_equal(video.frames_at(wanted).numpy(), expected[[index % 50 for index in wanted]])
    # Between two wanted ones lie two groups of three B pictures, of which no other leans on two.
    assert len(decoded) < 0.75 * 393


def test_packets_between_two_parts_are_passed_over_or_sought(tmp_path, monkeypatch):
    """A short gap is read through, a long one is not."""
    path = make(tmp_path, "mjpeg.mkv")
    video = open_video(path)
    read = []
    packets = merv_fast.video.seeking.packets

    def counting(*arguments):
        for packet in packets(*arguments):
            read.append(packet.pts)
            yield packet

    monkeypatch.setattr(merv_fast.video.seeking, "packets", counting)
    video.frames_at([0, 50])
    assert len(read) == 51
    read.clear()
    video.frames_at([0, 90])
    assert len(read) < 15


@pytest.mark.parametrize(
    "kind", ["closed.mp4", "open.ts", "gradual.mp4", "bare.h264", "hevc-closed.mp4", "hevc-open.ts", "mpeg4.mp4"]
)
def test_pictures_that_none_leans_on_are_those_that_ffmpeg_knows(kind, tmp_path):
    path = make(tmp_path, kind)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        log = PacketLog(context.codec.canonical_name, context.extradata)
        for packet in container.demux(stream):
            if packet.size:
                log.add(packet, True)
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.skip_frame = "NONREF"
        left = sum(1 for _ in container.decode(video=0))
    assert len(log.referenced) == 100
    assert sum(log.referenced) == (100 if kind == "mpeg4.mp4" else left)
    assert set(log.layers) == {1 if kind.startswith("hevc") else 0}


def test_only_the_highest_temporal_layer_is_left_out(tmp_path):
    """Pictures of a higher layer may lean on one that its own layer does without."""
    index = open_video(make(tmp_path, "hevc-layers.mp4"), strict=True)._index
    log = PacketLog("hevc", None)
    log.pts, log.sizes, log.shown = [0, 1, 2, 3], [1] * 4, [0, 1, 2, 3]
    log.entries, log.layers, log.referenced = [0], [1, 1, 2, 2], [True, False, False, True]
    assert log.index().droppable.tolist() == [False, False, True, False]
    assert 0 < index.droppable.sum() <= 50


def index_of(keys, frames):
    numbers = np.arange(frames)
    return PacketIndex(numbers, numbers, numbers, numbers, np.zeros(frames, bool), np.array(keys))


def test_stretches_are_the_cheapest():
    index = index_of([0, 10, 30, 60], 100)
    stretches = {
        (5,): [(0, 5)],
        (9,): [(0, 9)],
        (12,): [(10, 12)],
        (20, 29, 31): [(10, 31)],
        (2, 12): [(0, 12)],
        (0, 10): [(0, 0), (10, 10)],
        (1, 10): [(0, 1), (10, 10)] if merv_fast.video.seeking.RESTART < 8 else [(0, 10)],
        (5, 59, 60): [(0, 5), (30, 60)],
        (5, 35, 99): [(0, 5), (30, 35), (60, 99)],
    }
    for wanted, expected in stretches.items():
        runs = index.runs(list(wanted))
        assert [(run.start, run.stop) for run in runs] == expected
        assert sorted(frame for run in runs for frame in run.wanted) == list(wanted)


def test_frames_that_lead_a_key_frame_are_reached_from_the_one_before():
    """In decoding order: key 0, ..., key frame shown at 24, then 22 and 23, which are shown before it."""
    times = np.array([*range(22), 24, 22, 23, *range(25, 40)])
    order = np.argsort(times)
    index = PacketIndex(times, times, times[order], order, np.zeros(40, bool), np.array([0, 12, 22]))
    assert [(run.start, run.stop) for run in index.runs([23])] == [(12, 24)]
    assert [(run.start, run.stop) for run in index.runs([24])] == [(22, 22)]


@pytest.mark.parametrize("change", ["other packets", "fewer packets", "a damaged packet"])
def test_file_that_is_not_as_surveyed_is_decoded_from_its_start(change, tmp_path, caplog):
    path = make(tmp_path, "prores.mov")
    video = open_video(path)
    expected = plain_decode(path)
    if change == "a damaged packet":
        head, *packets = path.read_bytes().split(b"icpf")
        path.write_bytes(head + b"icpf" + b"icpf".join(packets[:80]) + b"nope" + b"icpf".join(packets[80:]))
    else:
        frames = panned(110, pix_fmt="yuv422p10le")
        frames = frames[10:] if change == "other packets" else frames[:60]
        write_clip(path, "prores_ks", frames=frames, pix_fmt="yuv422p10le")
        expected = plain_decode(path)
    with caplog.at_level(logging.WARNING, "merv_fast"):
        got = video.frames_at([5, 80]).numpy()
        assert np.array_equal(video.frames_at([5, 80]).numpy(), got)
    assert sum("decoding from its start" in message for message in caplog.messages) == 1
    # A frame that is gone is replaced by the one before it, with a warning.
    shown = {"other packets": 80, "fewer packets": 59, "a damaged packet": 79}[change]
    assert np.array_equal(got, expected[[5, shown]])
    assert any("1 of 2 frames are missing" in message for message in caplog.messages) == (shown != 80)


MEASURE = """
import re, sys
import av, torch
from merv_fast.video import load_frames, open_video
# Unlike ru_maxrss, this holds nothing of the process that started this one.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
frames = load_frames(sys.argv[1], int(sys.argv[2]))
print(peak() - before, frames.numel(), len(open_video(sys.argv[1])))
"""


def test_memory_is_bounded_to_the_frames_asked_for(tmp_path):
    """Ten minutes in 1080p, of which 32 frames are 199 MB."""
    options = {"preset": "ultrafast", "g": "25"}
    source = write_clip(tmp_path / "part.mp4", options=options, count=25, height=1080, width=1920)
    path = repeat_clip(source, tmp_path / "long.mp4", 600)
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path), "32"], capture_output=True, text=True, check=True)
    grown, asked, count = map(int, run.stdout.split())
    assert count == 15000
    assert asked == 32 * 1080 * 1920 * 3
    assert grown < 600e6
