"""Damaged and hostile files give frames or a `VideoError`, and nothing else happens."""

import ctypes
import json
import logging
import os
import re
import statistics
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from merv_fast.errors import VideoError
from merv_fast.video import VideoLimits, open_video
from merv_fast.video.boxes import check_samples, promised_samples
from merv_fast.video.choice import read_header
from merv_fast.video.container import KEPT_ERRORS, decode_all, open_container, packets
from merv_fast.video.images import without_inflated
from tests.video.clips import indices_of, panned, write_clip
from tests.video.fuzzing import ROOT, Outcome, check_frames, limits_of, memory_bound, run
from tests.video.mutants import MUTATIONS, VP9, X265, make_mutant, read_seeds, write_seeds
from tests.video.test_failures import reason
from tests.video.test_seeking import OPEN, remux

KEPT_PER_HUNDRED = 2e6
"""Bytes that a process may grow by in a hundred mutants; the most that was seen in ten runs is 0.6 MB."""

MOST_WARNINGS = 10
"""Of one mutant: two for each time it is opened or read."""

LEAST_SHARE = 0.1
"""Of mutants that give frames, and of those that are refused: else they are too much alike."""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    write_seeds(folder)
    return folder


def complaints(outcomes: list[Outcome]) -> list[str]:
    """What must not be."""
    found = []
    for outcome in outcomes:
        if outcome.wrong:
            found.append(f"{outcome}\nagain: python -m tests.video.fuzzing {outcome.number}")
        if outcome.peak > memory_bound(limits_of(outcome.number)):
            found.append(f"{outcome}: too much memory")
        if outcome.warnings > MOST_WARNINGS:
            found.append(f"{outcome}: {outcome.warnings} warnings")
    if growth(outcomes) > KEPT_PER_HUNDRED:
        found.append(f"the process grew by {growth(outcomes) / 1e6:.1f} MB in a hundred mutants")
    return found


def growth(outcomes: list[Outcome]) -> float:
    """Bytes for each hundred mutants, between the medians of the first fifth and of the last."""
    kept, part = [outcome.kept for outcome in outcomes], len(outcomes) // 5
    return (statistics.median(kept[-part:]) - statistics.median(kept[:part])) / (len(kept) - part) * 100


def table(outcomes: list[Outcome]) -> str:
    """How many gave frames and how many were refused, by the kind of mutation."""
    lines = [f"{'':20} {'frames':>8} {'refused':>8} {'wrong':>8}"]
    for kind in (*MUTATIONS, "all"):
        those = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        counts = [sum(bool(getattr(outcome, name)) for outcome in those) for name in ("frames", "refused", "wrong")]
        lines.append(f"{kind:20} {counts[0]:8} {counts[1]:8} {counts[2]:8}")
    seconds = sum(outcome.seconds for outcome in outcomes)
    peak = max(outcome.peak for outcome in outcomes)
    more = f"at most {peak / 1e6:.0f} MB for one, {growth(outcomes) / 1e6:.2f} MB kept for each hundred"
    return "\n".join([*lines, f"{seconds:.1f} s of processor time, {more}"])


def check(numbers: range, folder: Path) -> None:
    outcomes = list(run(numbers, folder))
    print("", table(outcomes), sep="\n")
    assert not complaints(outcomes), "\n\n".join(complaints(outcomes))
    assert [outcome.number for outcome in outcomes] == list(numbers)
    share = sum(outcome.refused is None for outcome in outcomes) / len(outcomes)
    assert LEAST_SHARE <= share <= 1 - LEAST_SHARE


def test_a_hundred_mutants(seeds):
    check(range(100), seeds)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_mutants(seeds):
    check(range(2000), seeds)


def test_a_mutant_is_determined_by_its_number(seeds, tmp_path):
    write_seeds(tmp_path)
    clips, again = read_seeds(seeds), read_seeds(tmp_path)
    assert clips == again
    mutants = [make_mutant(number, clips) for number in range(200)]
    assert mutants == [make_mutant(number, again) for number in range(200)]
    assert len({mutant.data for mutant in mutants}) > 190
    assert {mutant.kind for mutant in mutants} == set(MUTATIONS)
    assert {mutant.source for mutant in mutants} == set(clips)


kept = []


def misbehave(path: Path, limits: VideoLimits) -> int:
    """A reader that goes wrong in another way for each mutant."""
    match int(path.stem):
        case 0:
            os.abort()
        case 1:
            ctypes.string_at(0)
        case 2:
            while True:
                pass
        case 3:
            raise KeyError(path)
        case 4:
            check_frames(torch.zeros(2, 3, 3, dtype=torch.uint8), (2, 3, 3, 3))
        case 5:
            check_frames(torch.from_numpy(np.empty((2, 3, 3, 3), np.uint8)), (2, 3, 3, 3))
        case 6:
            raise VideoError("another.mp4", "is bad")
        case 7:
            kept.append(bytearray(memory_bound(limits) + 2**24))
            kept.clear()
        case 8:
            os.write(2, b"a message of the decoder")
        case 9:
            for _ in range(MOST_WARNINGS + 1):
                logging.getLogger("merv_fast").warning("again")
        case _:
            kept.append(bytearray(5_000_000))
    return 1


WRONG = [
    "ended the process (SIGABRT)",
    "ended the process (SIGSEGV)",
    "hung: took over 5 s of processor time",
    "KeyError",
    "AssertionError: (2, 3, 3), not (2, 3, 3, 3)",
    "AssertionError: frames [0, 1] were not written",
    "the error names another.mp4",
    "too much memory",
    "wrote to stderr: b'a message of the decoder'",
    "11 warnings",
]


@pytest.mark.slow
def test_what_goes_wrong_is_seen(seeds):
    outcomes = list(run(range(40), seeds, "tests.video.test_fuzz:misbehave"))
    assert [outcome.number for outcome in outcomes] == list(range(40))
    found = complaints(outcomes)
    for number, what in enumerate(WRONG):
        assert [text for text in found if text.startswith(f"{number} (") and what in text]
    assert len(found) == len(WRONG) + 1
    assert found[-1].startswith("the process grew by")


# What follows was found by reading the code with a hostile eye; chance would meet it rarely.


def patch(path: Path, mark: bytes, offset: int, form: str, *values: int) -> Path:
    """Overwrite fields at ``offset`` from the end of the first ``mark``."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.index(mark) + len(mark) + offset, *values)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("codec", "mark"), [("libx264", b"avcC"), ("libx265", b"hvcC")])
def test_configuration_record_cut_short(codec, mark, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", codec, options=X265 if codec == "libx265" else {})
    data = path.read_bytes()
    (size,) = struct.unpack_from(">I", data, data.index(mark) - 4)
    # The rest of the box becomes one that nobody reads.
    patch(path, mark, -8, ">I", 12)
    patch(path, mark, 4, ">I4s", size - 12, b"free")
    assert reason(path) == "holds no frame that can be decoded"


def test_message_that_does_not_end(tmp_path):
    # Key frames that are no instantaneous refreshes are known by such messages.
    source = write_clip(tmp_path / "clip.mp4", options=OPEN, frames=panned(60))
    message = struct.pack(">I", 5) + b"\6" + b"\xff" * 4

    def change(place, packet):
        return message + bytes(packet) if packet.is_keyframe and place else bytes(packet)

    assert len(open_video(remux(source, tmp_path / "endless.mp4", change))) == 60


def test_duration_of_too_many_digits(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.metadata["NOITARUD"] = "9" * 400 + ":00:00.00"
        for frame in panned(5, 48, 64):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"SOMETHNG").replace(b"NOITARUD", b"DURATION"))
    with av.open(str(path)) as container:
        assert container.streams.video[0].metadata["DURATION"].startswith("999")
    assert len(open_video(path, strict=True)) == 5


def test_first_frame_larger_than_its_container_says(tmp_path):
    path = write_clip(tmp_path / "clip.webm", "libvpx", count=3, options={"threads": "1"})
    # The element PixelWidth: 128 becomes 64.
    path.write_bytes(path.read_bytes().replace(b"\xb0\x81\x80", b"\xb0\x81\x40", 1))
    got = reason(path, limits=VideoLimits(max_pixels=64 * 64))
    assert got == "a frame of 128 x 64 pixels exceeds the limit of 4096 pixels (VideoLimits.max_pixels)"
    assert open_video(path).size == (64, 128)


def test_more_hidden_pictures_than_frames_allowed(tmp_path):
    source = write_clip(tmp_path / "clip.webm", "libvpx", count=30, options={"threads": "1"})

    def hide(place, packet):
        data = bytearray(bytes(packet))
        data[0] &= 0xFF if place < 4 else 0xEF
        return bytes(data)

    path = remux(source, tmp_path / "hidden.webm", hide)
    assert reason(path, limits=VideoLimits(max_frames=10)) == "holds more than 10 frames (VideoLimits.max_frames)"
    assert len(open_video(path)) == 4


def test_packets_that_bring_more_than_a_frame_each(tmp_path):
    with av.open(str(write_clip(tmp_path / "clip.webm", "libvpx-vp9", count=24, options=VP9))) as reader:
        data = [bytes(packet) for packet in reader.demux(video=0) if packet.size]

    def gather(place, packet):
        """Eight frames and a list of their sizes (VP9, annex B)."""
        parts = data[8 * place : 8 * place + 8]
        mark = bytes([0b110 << 5 | 3 << 3 | len(parts) - 1])
        return b"".join(parts) + mark + b"".join(struct.pack("<I", len(part)) for part in parts) + mark

    source = write_clip(tmp_path / "three.webm", "libvpx-vp9", count=3, options=VP9)
    path = remux(source, tmp_path / "gathered.webm", gather)
    # A longer duration makes it worth to decode and count.
    path.write_bytes(path.read_bytes().replace(b"00:00:00.1", b"00:00:01.1"))
    assert len(open_video(path)) == 24
    assert reason(path, limits=VideoLimits(max_frames=23)) == "holds more than 23 frames (VideoLimits.max_frames)"


def test_gif_that_changes_its_size_midway(tmp_path):
    """In a container of another kind each picture may start a GIF anew."""
    sizes = {"a.gif": (48, 64), "b.gif": (56, 96)}
    pictures = []
    for name, (height, width) in sizes.items():
        clip = write_clip(tmp_path / name, "gif", count=4, pix_fmt="rgb8", height=height, width=width)
        with av.open(str(clip)) as reader:
            pictures += [bytes(packet) for packet in reader.demux(video=0) if packet.size]
    source = write_clip(tmp_path / "eight.gif", "gif", count=8, pix_fmt="rgb8", height=48, width=64)
    path = remux(source, tmp_path / "both.mov", lambda place, packet: pictures[place])
    frames = open_video(path).frames_at(range(8))
    assert indices_of(frames) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert frames.shape == (8, 48, 64, 3)


def test_streams_that_show_up_later(tmp_path):
    """PyAV (18.1) then reads past the end of an array, and may look for more streams than it knows at the end."""

    class Container:
        def demux(self, stream):
            yield from (av.Packet(b"one"), av.Packet(b"two"))
            raise IndexError("list index out of range")

    errors = []
    assert [bytes(packet) for packet in packets(Container(), None, errors)] == [b"one", b"two"]
    assert not errors


def test_errors_do_not_hold_on_to_packets(tmp_path):
    path = write_clip(tmp_path / "clip.mov", "prores_ks", count=KEPT_ERRORS + 20, pix_fmt="yuv422p10le")
    path.write_bytes(path.read_bytes().replace(b"icpf", b"nope"))
    errors = []
    with open_container(str(path), VideoLimits()) as (container, stream):
        assert not list(decode_all(container, stream, errors))
    assert len(errors) == KEPT_ERRORS
    assert all(error.__traceback__ is None for error in errors)


CRASH = """
import sys
import merv_fast.video.pyav
from merv_fast.video import open_video, seeking
merv_fast.video.pyav.decoding_threads = lambda: 4
seeking.RESTART = seeking.READ_THROUGH = 0
for _ in range(20):
    video = open_video(sys.argv[1])
    assert len(video) == 24
    assert 8 in video._index.entries
    video.frames_at([0, 8, 9, 10, 11, 23])
"""


def test_vp9_packet_of_zeros_that_is_sought(tmp_path):
    """FFmpeg (8.1) takes it for a key frame, and crashes at the next one if it decodes several at once."""
    path = write_clip(tmp_path / "clip.mp4", "libvpx-vp9", options=VP9, frames=panned(24, 48, 64), height=48, width=64)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][8]
        data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    done = subprocess.run([sys.executable, "-c", CRASH, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def png_with(path: Path, kind: bytes, body: bytes) -> bytes:
    """``path`` with a chunk behind its header."""
    data = path.read_bytes()
    chunk = struct.pack(">I", len(body)) + kind + body
    return data[:33] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + data[33:]


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_png_goes_to_the_decoder_without_what_it_would_inflate(kind, tmp_path):
    path = write_clip(tmp_path / "a.png", "png", count=1, pix_fmt="rgb24", muxer={"update": "1"})
    plain = path.read_bytes()
    pixels = open_video(path).frames_at([0])
    assert without_inflated(plain) == plain
    texts = png_with(path, kind, b"key\0\0" + zlib.compress(bytes(1000)))
    assert without_inflated(texts) == plain
    assert without_inflated(texts[:60]) == plain[:33]
    path.write_bytes(texts)
    assert torch.equal(open_video(path).frames_at([0]), pixels)
    # The same letters elsewhere are left alone.
    path.write_bytes(plain)
    other = png_with(path, b"tEXt", b"key\0zTXt iTXt iCCP")
    assert without_inflated(other) == other


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_picture_whose_size_is_hidden(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    codec, pix_fmt = {".jpg": ("mjpeg", "yuvj420p"), ".png": ("png", "rgb24")}[suffix]
    write_clip(path, codec, count=1, pix_fmt=pix_fmt, muxer={"update": "1"})
    data = path.read_bytes()
    if suffix == ".jpg":
        # The decoder skips what lies between two segments.
        path.write_bytes(data[:2] + b"\xff\xfe\0\2" + b"junk" + data[2:])
    else:
        text = b"tEXt" + struct.pack(">II", 1, 1) + b"key\0text"
        chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
        path.write_bytes(data[:8] + chunk + data[8:])
    got = reason(path, limits=VideoLimits(max_pixels=128 * 64 - 1))
    assert got == "a frame of 128 x 64 pixels exceeds the limit of 8191 pixels (VideoLimits.max_pixels)"
    assert open_video(path, limits=VideoLimits(max_pixels=128 * 64)).size == (64, 128)


def with_samples(path: Path, count: int) -> Path:
    """An MP4 clip whose table of sizes says that it holds ``count`` samples of one byte, all in one chunk."""
    patch(path, b"stsz", 4, ">II", 1, count)
    patch(path, b"stts", 4, ">III", 1, count, 512)
    return patch(path, b"stsc", 12, ">I", count)


def with_fragment(path: Path, count: int) -> Path:
    """A fragmented clip whose first run has ``count`` samples, of which it tells nothing."""
    return patch(path, b"trun", 0, ">II", 1, count)


def box(name: bytes, *parts: bytes | int) -> bytes:
    body = b"".join(part if isinstance(part, bytes) else struct.pack(">I", part) for part in parts)
    return struct.pack(">I4s", 8 + len(body), name) + body


def same_packet(path: Path, count: int, size: int) -> Path:
    """An MP4 file of ``count`` samples that lie all in the same ``size`` bytes, and do not decode."""
    data = write_clip(path).read_bytes().replace(b"edts", b"free")
    table, moov = data.index(b"stsd") - 4, data.index(b"moov") - 4
    described = data[table : table + struct.unpack_from(">I", data, table)[0]]
    start = data[: struct.unpack_from(">I", data)[0]]
    times, chunks = box(b"stts", 0, 1, count, 512), box(b"stsc", 0, 1, 1, 1, 1)
    places = box(b"stco", 0, count, *[len(start) + 8] * count)
    tables = box(b"stbl", described, times, chunks, box(b"stsz", 0, size, count), places)
    old = data.index(b"stbl") - 4
    old = data[old : old + struct.unpack_from(">I", data, old)[0]]
    header = bytearray(data[moov:].replace(old, tables))
    for name in (b"moov", b"trak", b"mdia", b"minf"):
        place = header.index(name) - 4
        struct.pack_into(">I", header, place, struct.unpack_from(">I", header, place)[0] + len(tables) - len(old))
    path.write_bytes(start + box(b"mdat", b"\xff" * size) + header)
    return path


def test_small_file_that_would_be_read_for_long(tmp_path):
    """A megabyte that says it is 50 GB."""
    path = same_packet(tmp_path / "same.mp4", 50_000, 1_000_000)
    got = reason(path, limits=VideoLimits(max_decode_seconds=0.2))
    assert got == "took longer than 0.2 s to decode (VideoLimits.max_decode_seconds)"


FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


def write_with_sound(path: Path, samples: int) -> Path:
    """A QuickTime clip with one second of PCM whose chunks each have ``samples``, as the file says."""
    with av.open(str(path), "w") as container:
        picture, sound = container.add_stream("mpeg4", rate=25), container.add_stream("pcm_s16le", rate=48000)
        picture.height, picture.width, picture.pix_fmt = 48, 64, "yuv420p"
        for place, frame in enumerate(panned(25, 48, 64)):
            container.mux(picture.encode(frame))
            noise = av.AudioFrame(format="s16", layout="mono", samples=1920)
            noise.sample_rate, noise.pts = 48000, 1920 * place
            container.mux(sound.encode(noise))
        container.mux(picture.encode(None))
        container.mux(sound.encode(None))
    if samples:
        data = path.read_bytes()
        head, tail = data[: data.index(b"soun")], data[data.index(b"soun") :]
        tail = bytearray(tail)
        struct.pack_into(">I", tail, tail.index(b"stsc") + 16, samples)
        path.write_bytes(head + tail)
    return path


def test_samples_are_counted_as_ffmpeg_counts_them(tmp_path):
    clips = [
        write_clip(tmp_path / "clip.mp4", options={"bf": "2"}),
        write_clip(tmp_path / "fast.mov", muxer={"movflags": "faststart"}),
        write_clip(tmp_path / "fragments.mp4", muxer=FRAGMENTS, options={"g": "6"}),
    ]
    for path in clips:
        check_samples(str(path), VideoLimits(max_frames=4))
        # Fragments are added up until there are too many.
        got = reason(path, limits=VideoLimits(max_frames=3))
        assert re.fullmatch(r"promises \d+ samples, the limit is 8 for each of 3 frames \(.*max_frames\)", got)
        assert reason(str(path), read_header, limits=VideoLimits(max_frames=3)) == got
    path = write_with_sound(tmp_path / "sound.mov", 0)
    with av.open(str(path)) as container:
        entries = [len(stream.index_entries) for stream in container.streams]
    header = path.read_bytes()[path.read_bytes().index(b"moov") :]
    assert entries == [25, 50]
    assert sum(entries) <= promised_samples(header) <= 2 * sum(entries)
    assert len(open_video(path, limits=VideoLimits(max_frames=25))) == 25


@pytest.mark.parametrize("name", ["clip.webm", "clip.avi", "clip.ts", "clip.gif"])
def test_other_containers_have_no_samples(name, tmp_path):
    codec, pix_fmt = {".webm": ("libvpx-vp9", "yuv420p"), ".gif": ("gif", "rgb8")}.get(name[4:], ("mpeg4", "yuv420p"))
    path = write_clip(tmp_path / name, codec, pix_fmt=pix_fmt)
    with open(path, "ab") as file:
        file.write(with_samples(write_clip(tmp_path / "clip.mp4"), 10_000_000).read_bytes())
    check_samples(str(path), VideoLimits())


@pytest.mark.parametrize("size", [0, 1, 7, 8, 2**31])
def test_boxes_of_wrong_sizes(size, tmp_path):
    path = tmp_path / "clip.mp4"
    data = struct.pack(">I4sI4sQ", 8, b"free", size, b"moov", size) + b"stsz" * 9 + b"stsc"
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        check_samples(str(path), VideoLimits())


def test_header_far_larger_than_its_frames_need(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(box(b"ftyp", b"isom", 0) + struct.pack(">I4s", 2**25, b"moov"))
    os.truncate(path, 2**25)
    check_samples(str(path), VideoLimits())
    assert reason(path, limits=VideoLimits(max_frames=9)) == "has a header of 33554416 bytes, too many for 9 frames"


def test_file_that_is_cut_while_it_is_looked_at(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4")
    size = path.stat().st_size
    monkeypatch.setattr(os.path, "getsize", lambda path: 10 * size)
    check_samples(str(path), VideoLimits())


MEASURE = """
import json, re, sys
from merv_fast.errors import VideoError
from merv_fast.video import open_video
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
open_video(sys.argv[1]).frames_at([0])
before = peak()
for path in sys.argv[1:]:
    try:
        found = open_video(path).frames_at([0]).shape[0]
    except VideoError as error:
        found = error.reason
    print(json.dumps([path, found, peak() - before]))
"""


def test_small_files_take_no_more_memory_than_they_should(tmp_path):
    picture = write_clip(tmp_path / "a.png", "png", count=1, pix_fmt="rgb24", muxer={"update": "1"})
    zeros = zlib.compress(bytes(200_000_000), 1)
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_with(picture, b"zTXt", b"key\0\0" + zeros))
    profile = tmp_path / "profile.png"
    profile.write_bytes(png_with(picture, b"iCCP", b"key\0\0" + zeros))
    large = write_clip(tmp_path / "large.jpg", "mjpeg", count=1, pix_fmt="yuvj420p", muxer={"update": "1"})
    os.truncate(large, 2**30)
    files = [
        write_clip(tmp_path / "good.mp4"),
        with_samples(write_clip(tmp_path / "samples.mp4"), 10_000_000),
        with_fragment(write_clip(tmp_path / "fragment.mp4", muxer=FRAGMENTS), 20_000_000),
        write_with_sound(tmp_path / "sound.mov", 2**29),
        same_packet(tmp_path / "same.mp4", 300, 1_000_000),
        bomb,
        profile,
        large,
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, files)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(path) for path, _, _ in found] == files
    limit = "samples, the limit is 8 for each of 1000000 frames (VideoLimits.max_frames)"
    assert [what for _, what, _ in found] == [
        1,
        f"promises 10000000 {limit}",
        f"promises 20000000 {limit}",
        f"promises {25 * (2**19 + 2)} {limit}",
        "holds no frame that can be decoded",
        1,
        1,
        "has 1073741824 bytes, more than a picture of 67108864 pixels (VideoLimits.max_pixels) takes",
    ]
    # Without its guards, each of the others takes over 200 MB.
    assert max(grown for _, _, grown in found) < 100e6
