"""What H.264 says of its pictures: whether they may come as two fields."""

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import merv_fast.video.seeking
from merv_fast.video import open_video
from merv_fast.video.h264 import HIGH_PROFILES
from merv_fast.video.units import HEAD, are_frames, in_record, slice_heads
from tests.video.clips import panned, write_clip
from tests.video.test_seeking import X264, check

PROGRESSIVE = {
    "a.mp4": {},
    "a.mkv": {},
    "a.ts": {},
    "baseline.mp4": {"profile": "baseline", "bf": "0", "b-pyramid": "none"},
    "lists.mp4": {"x264-params": "cqm=jvt"},
}


@pytest.mark.parametrize("name", PROGRESSIVE)
def test_progressive(name, tmp_path):
    path = write_clip(tmp_path / name, "libx264", options=X264 | PROGRESSIVE[name], frames=panned(30))
    assert not open_video(path)._index.fields


@pytest.mark.parametrize("name", ["a.mp4", "a.ts"])
def test_interlaced(name, tmp_path):
    path = write_clip(tmp_path / name, "libx264", options=X264 | {"flags": "+ildct+ilme"}, frames=panned(30))
    assert open_video(path)._index.fields


def test_nothing_is_decoded_for_a_second_field_that_cannot_be(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", "libx264", options=X264, frames=panned(60))
    video = open_video(path)
    index, decode = video._index, merv_fast.video.seeking.decode
    decoded = []

    def counting(stream, packet, errors):
        decoded.extend([packet] if packet else [])
        return decode(stream, packet, errors)

    monkeypatch.setattr(merv_fast.video.seeking, "decode", counting)
    monkeypatch.setattr(merv_fast.video.pyav, "decoding_threads", lambda: 1)
    for first in range(54):
        decoded.clear()
        wanted = [first, first + 5]
        video.frames_at(wanted)
        dropped = int(index.droppable[index.positions[wanted]].sum())
        assert len(decoded) <= sum(map(index.cost, index.runs(wanted))) + dropped


def test_a_set_that_comes_later_counts(tmp_path):
    """Progressive by its record, but another set stands in a packet."""
    path = write_clip(tmp_path / "a.mp4", "libx264", options=X264, frames=panned(30))
    other = write_clip(tmp_path / "b.mp4", "libx264", options=X264 | {"flags": "+ildct+ilme"}, frames=panned(2))
    with av.open(str(other)) as container:
        late, _ = in_record(container.streams.video[0].codec_context.extradata)
    joined = tmp_path / "joined.mp4"
    with av.open(str(path)) as source, av.open(str(joined), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            data = bytes(packet) + (len(late).to_bytes(4) + late if number == 9 else b"")
            new = av.Packet(data)
            new.pts, new.dts, new.time_base, new.is_keyframe = (
                packet.pts,
                packet.dts,
                packet.time_base,
                packet.is_keyframe,
            )
            new.stream = copy
            target.mux(new)
    assert not open_video(path)._index.fields
    assert open_video(joined)._index.fields
    check(joined, rounds=3)


def test_slice_heads():
    long, anew = b"\x41" + bytes(200), b"\x65\x88"
    assert slice_heads([b"\x09\x10", b"\x06\5", long, b"\x01\2"]) == (long[:HEAD], b"\x01\2")
    assert slice_heads([b"\x67\x64", b"\x68\xee", anew]) == (anew,)
    # Later pictures may need the sets, and a partition is no slice.
    for unit in (b"\x67\x64", b"\x68\xee", b"\x42\0", b"\x43\0", b"\x44\0"):
        assert slice_heads([unit, long]) == ()
    assert slice_heads([long] * 9) == slice_heads([]) == ()


class Writer:
    """Writes the fields of a unit, bit by bit."""

    def __init__(self):
        self.bits = ""

    def fixed(self, value, size):
        self.bits += f"{value:0{size}b}"

    def unsigned(self, value):
        code = f"{value + 1:b}"
        self.bits += "0" * (len(code) - 1) + code

    def signed(self, value):
        self.unsigned(2 * value - 1 if value > 0 else -2 * value)

    def unit(self, header=0x67):
        bits = self.bits + "1"
        bits += "0" * (-len(bits) % 8)
        data = int(bits, 2).to_bytes(len(bits) // 8)
        escaped = bytearray()
        for byte in data:
            if escaped[-2:] == b"\0\0" and byte <= 3:
                escaped.append(3)
            escaped.append(byte)
        return bytes([header]) + bytes(escaped)


@st.composite
def sequence_parameter_sets(draw):
    """A unit, the size up to which it is needed, and what it says."""
    number, flag = st.integers(0, 40), st.booleans()
    writer = Writer()
    profile = draw(st.sampled_from([66, 77, 88, *sorted(HIGH_PROFILES)]))
    for value in (profile, 0, 40):
        writer.fixed(value, 8)
    writer.unsigned(draw(number))
    if profile in HIGH_PROFILES:
        chroma = draw(st.integers(0, 3))
        writer.unsigned(chroma)
        if chroma == 3:
            writer.fixed(draw(flag), 1)
        writer.unsigned(draw(number))
        writer.unsigned(draw(number))
        writer.fixed(draw(flag), 1)
        lists = draw(flag)
        writer.fixed(lists, 1)
        for place in range((12 if chroma == 3 else 8) * lists):
            present = draw(flag)
            writer.fixed(present, 1)
            last = 8
            for _ in range((16 if place < 6 else 64) * present):
                delta = draw(st.integers(-128, 127))
                writer.signed(delta)
                last = (last + delta) % 256
                if not last:
                    break
    writer.unsigned(draw(number))
    order = draw(st.integers(0, 2))
    writer.unsigned(order)
    if order == 0:
        writer.unsigned(draw(number))
    if order == 1:
        writer.fixed(draw(flag), 1)
        writer.signed(draw(st.integers(-999, 999)))
        writer.signed(draw(st.integers(-999, 999)))
        offsets = draw(st.lists(st.integers(-9, 9), max_size=5))
        writer.unsigned(len(offsets))
        for offset in offsets:
            writer.signed(offset)
    writer.unsigned(draw(number))
    writer.fixed(draw(flag), 1)
    writer.unsigned(draw(number))
    writer.unsigned(draw(number))
    frames = draw(flag)
    writer.fixed(frames, 1)
    return writer.unit(), frames


@settings(max_examples=300)
@given(sequence_parameter_sets())
def test_any_set(given):
    unit, frames = given
    assert are_frames([unit]) == frames
    record = b"\1\x64\0\x28\xff\xe1" + len(unit).to_bytes(2) + unit + b"\1\0\4\x68\xee\x3c\x80"
    assert in_record(record) == [unit, b"\x68\xee\x3c\x80"]
    assert in_record(b"\0\0\0\1" + unit + b"\0\0\1\x68\xee") == [unit, b"\x68\xee"]
    # One that is cut short, or missing, promises nothing.
    assert not are_frames([unit[: len(unit) // 2 - 2]])
    assert not are_frames([])
    assert not are_frames([unit, b""])
