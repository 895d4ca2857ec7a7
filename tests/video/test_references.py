"""Reference pictures of H.264 that nothing wanted is decoded from are replaced, and every frame stays what it is."""

import itertools
import logging
import random

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import merv_fast.video.pyav
import merv_fast.video.references
import merv_fast.video.seeking
from merv_fast.video import open_video
from merv_fast.video.container import decode_all
from merv_fast.video.h264 import (
    Picture,
    PictureSet,
    SequenceSet,
    Slice,
    Unknown,
    read_slice,
    skipped_slice,
    skipping_set,
)
from merv_fast.video.references import References
from merv_fast.video.units import in_record
from tests.video.clips import panned, plain_decode, write_clip
from tests.video.test_seeking import remux
from tests.video.test_units import Writer

HEIGHT, WIDTH = 48, 64


def moving(count):
    """Two motions, cuts and a light that goes down and up, for which encoders weight their references."""
    frames = []
    scenes = panned(count, HEIGHT, WIDTH)
    for place, (one, other) in enumerate(zip(scenes, scenes[::-1], strict=True)):
        picture = one.to_ndarray(format="rgb24")
        picture[HEIGHT // 2 :] = other.to_ndarray(format="rgb24")[HEIGHT // 2 :]
        light = 0.3 + 0.7 * abs(place % 30 - 15) / 15
        frames.append(
            av.VideoFrame.from_ndarray((picture * light).astype(np.uint8), "rgb24").reformat(format="yuv420p")
        )
    return frames


FRAMES = moving(100)


def encode(path, preset="medium", frames=FRAMES, **params):
    joined = ":".join(f"{name.replace('_', '-')}={value}" for name, value in params.items())
    options = {"preset": preset, "x264-params": joined}
    return write_clip(path, options=options, frames=frames, height=HEIGHT, width=WIDTH)


@pytest.fixture
def decoded(monkeypatch):
    """Packets that go into decoders while seeking, with whether they are the file's; small pictures count too."""
    monkeypatch.setattr(merv_fast.video.references, "LEAST_MACROBLOCKS", 0)
    sizes, seen = {}, []
    decode, take = merv_fast.video.seeking.decode, merv_fast.video.seeking.PacketReader._take

    def taking(reader):
        packet = take(reader)
        sizes[packet.pts] = packet.size
        return packet

    def counting(stream, packet, errors):
        if packet:
            seen.append((packet.pts, packet.size == sizes[packet.pts]))
        return decode(stream, packet, errors)

    monkeypatch.setattr(merv_fast.video.seeking.PacketReader, "_take", taking)
    monkeypatch.setattr(merv_fast.video.seeking, "decode", counting)
    return seen


def check(path, decoded, rounds, monkeypatch):
    """Random choices of frames are those of a plain decode; how many pictures were replaced."""
    expected = plain_decode(path)
    chance = random.Random(0)
    replaced = 0
    for place in range(rounds):
        monkeypatch.setattr(merv_fast.video.pyav, "decoding_threads", lambda place=place: 1 + 2 * (place % 2))
        video = open_video(path, strict=True)
        wanted = sorted(chance.sample(range(len(video)), chance.choice([1, 1, 2, 3, 5])))
        decoded.clear()
        assert np.array_equal(video.frames_at(wanted).numpy(), expected[wanted]), wanted
        replaced += sum(not whole for _, whole in decoded)
    return replaced


# Name: encoder options, and whether pictures can be replaced.
SETTINGS = {
    "default.mp4": ({}, True),
    "default.ts": ({}, True),
    "fast.mkv": ({"preset": "veryfast"}, True),
    "slow.mp4": ({"preset": "slower", "b_adapt": 0}, True),
    "one.mp4": ({"ref": 1, "bframes": 3, "b_pyramid": "normal", "weightp": 0}, True),
    "strict.mp4": ({"ref": 2, "bframes": 5, "b_pyramid": "strict", "weightb": 0, "b_adapt": 0}, True),
    "six.mp4": ({"ref": 6, "bframes": 5, "b_pyramid": "normal", "b_adapt": 0}, True),
    "temporal.mp4": ({"ref": 3, "direct": "temporal", "keyint": 40, "b_adapt": 0, "bframes": 4}, True),
    "slices.mp4": ({"slices": 3, "ref": 2, "cabac": 0}, True),
    "weights.mp4": ({"weightp": 2, "ref": 3, "bframes": 2, "b_adapt": 0}, True),
    "wrap.mp4": ({"keyint": 250, "scenecut": 0, "ref": 1}, True),
    # Every list holds the pictures before.
    "all.mp4": ({"scenecut": 0, "ref": 3}, False),
    "open.mp4": ({"open_gop": 1, "keyint": 20, "min_keyint": 10}, True),
    "flat.mp4": ({"b_pyramid": "none", "ref": 1, "bframes": 3}, True),
    "chain.mp4": ({"bframes": 0}, False),
    "interlaced.mp4": ({"tff": 1}, False),
    "many-slices.mp4": ({"slices": 12, "bframes": 3, "slice_max_mbs": 1}, False),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_frames_are_those_of_a_plain_decode(name, tmp_path, decoded, monkeypatch, caplog):
    options, replaces = SETTINGS[name]
    path = encode(tmp_path / name, **options)
    with caplog.at_level(logging.WARNING, "merv_fast"):
        replaced = check(path, decoded, 16, monkeypatch)
    assert not caplog.messages
    assert (replaced > 0) == replaces, replaced


GRID = itertools.product(
    (1, 2, 3, 4, 6), (1, 2, 3, 5), ("none", "strict", "normal"), (0, 1, 2), (0, 1), (0, 1), ("superfast", "slow")
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_any_settings(tmp_path, decoded, monkeypatch):
    replaced = 0
    for ref, bframes, pyramid, weightp, weightb, gop, preset in random.Random(1).sample(list(GRID), 150):
        more = {"b_adapt": 0, "scenecut": 40 * (ref % 2), "keyint": 20 + 30 * bframes, "slices": 1 + ref % 3}
        options = {"ref": ref, "bframes": bframes, "b_pyramid": pyramid, "weightp": weightp, "weightb": weightb} | more
        direct = ("none", "spatial", "temporal", "auto")[(ref + bframes) % 4]
        path = encode(tmp_path / "a.mp4", preset, open_gop=gop, direct=direct, **options)
        replaced += check(path, decoded, 12, monkeypatch)
    assert replaced > 5000


def test_most_references_between_wanted_frames_are_replaced(tmp_path, decoded):
    """One reference each, and a pyramid of B pictures."""
    path = encode(tmp_path / "a.mp4", "veryfast", b_adapt=0, bframes=3, scenecut=0, keyint=100, weightp=0)
    video = open_video(path)
    video.frames_at([90])
    whole = [whole for _, whole in decoded]
    # P pictures are four frames apart, with one B picture as a reference between.
    assert 23 <= sum(whole) <= 25
    assert 20 <= len(whole) - sum(whole) <= 23


SEQUENCE = SequenceSet(
    number=0,
    chroma=True,
    planes_apart=False,
    frame_num_bits=4,
    order_kind=0,
    order_bits=6,
    references=4,
    macroblocks=900,
    frames_only=True,
)
PICTURE_SET = PictureSet(
    number=0, sequence=0, bottom_order=False, counts=(1, 1), weighted=False, weighted_both=False, redundant=False
)


def head(kind, frame_num, order, *, counts=None, steps=((), ()), marking=(), idr=False, reference=True, **more):
    """A slice of kind P, B or I; ``steps`` and ``marking`` are pairs of an operation and what stands with it."""
    writer = Writer()
    for value in (more.get("first", 0), more.get("number", "PBIS".index(kind)), more.get("set", 0)):
        writer.unsigned(value)
    writer.fixed(frame_num, 4)
    if idr:
        writer.unsigned(0)
    writer.fixed(order, 6)
    if "bottom" in more:
        writer.signed(more["bottom"])
    if kind == "B":
        writer.fixed(1, 1)
    lists = {"P": 1, "B": 2}.get(kind, 0)
    if lists:
        writer.fixed(counts is not None, 1)
        for count in counts or ():
            writer.unsigned(count - 1)
    for those in steps[:lists]:
        writer.fixed(bool(those), 1)
        for operation, value in those:
            writer.unsigned(operation)
            writer.unsigned(value)
        if those:
            writer.unsigned(3)
    if reference and idr:
        writer.fixed(more.get("lasting", 0), 2)
    elif reference:
        writer.fixed(bool(marking), 1)
        for operation, *values in marking:
            for value in (operation, *values):
                writer.unsigned(value)
        if marking:
            writer.unsigned(0)
    return writer.unit((0x65 if idr else 0x61) & (0xFF if reference else 0x1F))


# The second P leans on the first, three back in all: 0, -1.
FIRST = head("I", 0, 0, idr=True)
BEFORE = head("P", 1, 16)
BETWEEN = head("B", 2, 8)
AFTER = head("P", 3, 32, steps=[[(0, 1)]])
STREAM = [(FIRST,), (BEFORE,), (BETWEEN,), (AFTER,), (head("P", 4, 40),)]


def stand_ins(stream, wanted=4, sequence=SEQUENCE, sets=(PICTURE_SET,)):
    references = References(sequence, {each.number: each for each in sets}, stream)
    return references.stand_ins(range(len(stream)), {0, wanted} if isinstance(wanted, int) else wanted)


def test_stand_ins():
    assert set(stand_ins(STREAM)) == {2}
    assert set(stand_ins(STREAM, 3)) == {2, 4}
    assert set(stand_ins(STREAM, 1)) == {2, 3, 4}
    assert set(stand_ins(STREAM, 2)) == {3, 4}
    # The B picture before is the last one.
    assert set(stand_ins([*STREAM[:3], (head("P", 3, 32),), STREAM[4]])) == set()
    assert set(stand_ins([*STREAM[:3], (head("P", 3, 32, counts=[2]),), STREAM[4]])) == set()
    # Up, round the end of frame_num: 3 + 14 is 1.
    assert set(stand_ins([*STREAM[:3], (head("P", 3, 32, steps=[[(1, 13)]]),), STREAM[4]])) == {2}
    # Two slices, of which the second needs more.
    second = head("P", 3, 32, first=30)
    assert set(stand_ins([*STREAM[:3], (AFTER, second), STREAM[4]])) == set()
    # A picture decoded anew stays, even if nothing takes it.
    assert set(stand_ins([*STREAM, (head("I", 0, 0, idr=True),)])) == {2}
    assert set(stand_ins([*STREAM, (head("I", 0, 0, idr=True),), (head("P", 1, 8),)], 6)) == {1, 2, 3, 4}


def with_picture(place, *slices):
    return [*STREAM[:place], slices, *STREAM[place + 1 :]]


UNKNOWN = {
    "no slices": with_picture(2),
    "cut short": with_picture(2, BETWEEN[:3]),
    "another picture set": with_picture(2, head("B", 2, 8, set=1)),
    "a switching slice": with_picture(2, head("P", 2, 8, number=3)),
    "the first macroblock missing": with_picture(2, head("B", 2, 8, first=1)),
    "two pictures": with_picture(2, BETWEEN, BETWEEN),
    "slices of two pictures": with_picture(2, BETWEEN, head("B", 2, 10, first=1)),
    "a picture decoded anew that lasts": with_picture(0, head("I", 0, 0, idr=True, lasting=1)),
    "a picture decoded anew with a number": [
        (head("I", 3, 0, idr=True),),
        (head("P", 4, 16),),
        (head("B", 5, 8),),
        (head("P", 6, 32, steps=[[(0, 1)]]),),
    ],
    "no picture decoded anew": with_picture(0, head("I", 0, 0)),
    "a gap": with_picture(4, head("P", 5, 40)),
    "the same number again": with_picture(2, head("B", 1, 8)),
    "the same order again": with_picture(2, head("B", 2, 16)),
    "a list longer than what there is": with_picture(1, head("P", 1, 16, counts=[2])),
    "a list longer than any": with_picture(3, head("P", 3, 32, counts=[33])),
    "a step to nothing": with_picture(1, head("P", 1, 16, steps=[[(0, 5)]])),
    "a long-term reference": with_picture(3, head("P", 3, 32, steps=[[(2, 13)]])),
    "more steps than entries": with_picture(3, head("P", 3, 32, steps=[[(0, 1), (0, 0)]])),
    "removal of nothing": with_picture(2, head("B", 2, 8, marking=[(1, 5)])),
    "removal of long-term references": with_picture(2, head("B", 2, 8, marking=[(2, 0)])),
    "a picture made long-term": with_picture(2, head("B", 2, 8, marking=[(6, 0)])),
    "everything removed by a reset": with_picture(2, head("B", 2, 8, marking=[(5,)])),
    "too much kept": [
        *STREAM,
        (head("P", 5, 48, marking=[(1, 0), (1, 1)]),),
        *[(head("P", 6, 50, marking=[(1, 40)]),)],
    ],
    "nothing left": with_picture(2, head("B", 2, 8, marking=[(1, 0), (1, 1), (1, 2)])),
}


@pytest.mark.parametrize("reason", UNKNOWN)
def test_nothing_is_replaced_where_something_is_unknown(reason):
    stream = UNKNOWN[reason]
    assert stand_ins(stream, len(stream) - 1) == {}


def test_lists_of_one_direction():
    """Where all references are shown before a B picture, its second list starts with the second."""
    stream = [(FIRST,), (BEFORE,), (head("P", 2, 24, steps=[[(0, 1)]]),), (head("B", 3, 30),)]
    assert set(stand_ins(stream, 3)) == set()
    assert set(stand_ins([*stream[:3], (head("P", 3, 30),)], 3)) == {1}


def test_order_of_fields():
    """A picture is shown with the first of its fields, here the bottom one: 15, 16, 18, 30."""
    stream = [
        (head("I", 0, 0, idr=True, bottom=0),),
        (head("P", 1, 19, bottom=-4),),
        (head("P", 2, 16, bottom=0, steps=[[(0, 1)]]),),
        (head("P", 3, 30, bottom=0),),
        (head("B", 4, 18, bottom=0),),
    ]
    found = stand_ins(stream, sets=[PICTURE_SET._replace(bottom_order=True)])
    assert set(found) == {1}


def test_the_oldest_gives_way():
    stream = [*STREAM[:4], (head("P", 4, 40, steps=[[(0, 2)]]),)]
    assert set(stand_ins(stream)) == {2, 3}
    assert stand_ins(stream, sequence=SEQUENCE._replace(references=2)) == {}


def test_removals():
    """What is removed is not in later lists, which have one entry less."""
    removed = head("B", 2, 8, marking=[(1, 1)])
    behind = (head("P", 4, 40, counts=[3], steps=[[(0, 0), (0, 1)]]),)
    assert set(stand_ins([*STREAM[:2], (removed,), STREAM[3], behind])) == set()
    assert stand_ins([*STREAM[:2], (removed,), STREAM[3], (head("P", 4, 40, counts=[4]),)]) == {}
    after = stand_ins([*STREAM[:2], (removed,), STREAM[3], (head("P", 4, 40, counts=[1]),)])
    assert set(after) == {2}


def sets_of(path):
    with av.open(str(path)) as container:
        return in_record(container.streams.video[0].codec_context.extradata)


def test_sets_of_x264(tmp_path):
    """As its options say; High profile, with and without lists of the quantizer."""
    for more in ({}, {"cqm": "jvt"}):
        first, second = sets_of(encode(tmp_path / "a.mp4", ref=3, bframes=2, weightp=1, **more))
        sequence, pictures = SequenceSet.read(first), PictureSet.read(second)
        assert (sequence.references, sequence.macroblocks, sequence.order_kind) == (4, 12, 0)
        assert (sequence.chroma, sequence.frames_only, sequence.planes_apart) == (True, True, False)
        assert (pictures.number, pictures.sequence, pictures.counts) == (0, 0, (3, 1))
        assert (pictures.weighted, pictures.weighted_both, pictures.redundant) == (True, False, False)
        assert References.of_stream([first, second], [])


def test_known_bytes():
    """What x264 made of a clip of 64 x 48: two weights for each of two references, so four entries."""
    sequence = SequenceSet.read(bytes.fromhex("6764000aacd9447a1000000300100000030320f1225960"))
    pictures = PictureSet.read(bytes.fromhex("68ebe3cb22c0"))
    assert sequence == SEQUENCE._replace(macroblocks=12)
    assert pictures == PICTURE_SET._replace(counts=(3, 1), weighted=True)
    unit = bytes.fromhex("419a4349e10843208c079240794084bfd3750b8a8d9da717")
    expected = Slice(Picture(False, True, 2, 6, 0, None), True, (4,), ((-1, -16, -16, -1),))
    assert read_slice(unit, sequence, {0: pictures}) == expected


def test_streams_of_other_kinds(tmp_path):
    first, second = sets_of(encode(tmp_path / "a.mp4"))
    third, fourth = sets_of(encode(tmp_path / "b.mp4", ref=5))
    assert References.of_stream([first, second, first, second], [])
    assert not References.of_stream([first], []).stand_ins([0, 1], {0})
    other = SequenceSet.read(first)
    assert References.of_stream([first, second, skipping_set(1, other)], [])
    for number, sequence in ((1, other._replace(number=1)), (32, other)):
        assert References.of_stream([first, second, skipping_set(number, sequence)], []) is None
    for sets in ([], [second], [first, third, second], [first, second, fourth], [b"", first, second], [first[:6]]):
        assert References.of_stream(sets, []) is None
    for more in ({"tff": 1}, {"bframes": 0}, {"fake_interlaced": 1}):
        assert References.of_stream(sets_of(encode(tmp_path / "c.mp4", **more)), []) is None


def test_where_it_would_not_pay(monkeypatch):
    assert stand_ins(STREAM, {0, 1, 4}) == {}
    assert stand_ins(STREAM, sequence=SEQUENCE._replace(macroblocks=899)) == {}


@st.composite
def slices(draw):
    """A sequence, its picture set, the beginning of a slice, and what it says."""
    flag, number, signed = st.booleans(), st.integers(0, 40), st.integers(-40, 40)
    sequence = SEQUENCE._replace(
        chroma=draw(flag), frame_num_bits=draw(st.integers(4, 16)), order_bits=draw(st.integers(4, 16))
    )
    sets = PICTURE_SET._replace(
        number=draw(number),
        bottom_order=draw(flag),
        counts=(draw(st.integers(1, 16)), draw(st.integers(1, 16))),
        weighted=draw(flag),
        weighted_both=draw(flag),
        redundant=draw(flag),
    )
    kind, idr, reference = draw(st.integers(0, 2)), draw(flag), draw(flag)
    idr &= reference and kind == 2
    writer = Writer()
    first = draw(number)
    for value in (first, kind + 5 * draw(flag), sets.number):
        writer.unsigned(value)
    frame_num = draw(st.integers(0, 2**sequence.frame_num_bits - 1))
    writer.fixed(frame_num, sequence.frame_num_bits)
    if idr:
        writer.unsigned(draw(number))
    order, bottom = draw(st.integers(0, 2**sequence.order_bits - 1)), 0
    writer.fixed(order, sequence.order_bits)
    if sets.bottom_order:
        bottom = draw(signed)
        writer.signed(bottom)
    if sets.redundant:
        writer.unsigned(0)
    if kind == 1:
        writer.fixed(draw(flag), 1)
    lists = (1, 2, 0)[kind]
    counts = sets.counts[:lists]
    if lists:
        override = draw(flag)
        writer.fixed(override, 1)
        if override:
            counts = tuple(draw(st.integers(1, 8)) for _ in counts)
            for count in counts:
                writer.unsigned(count - 1)
    modifications = tuple(tuple(draw(st.lists(signed.filter(bool), max_size=min(count, 4)))) for count in counts)
    for steps in modifications:
        writer.fixed(bool(steps), 1)
        for step in steps:
            writer.unsigned(step > 0)
            writer.unsigned(abs(step) - 1)
        if steps:
            writer.unsigned(3)
    if (lists == 1 and sets.weighted) or (lists == 2 and sets.weighted_both):
        writer.unsigned(draw(number))
        if sequence.chroma:
            writer.unsigned(draw(number))
        for _ in range(sum(counts)):
            for values in (2, 4)[: 1 + sequence.chroma]:
                present = draw(flag)
                writer.fixed(present, 1)
                for _ in range(values * present):
                    writer.signed(draw(signed))
    removals = None
    if idr:
        writer.fixed(draw(flag), 1)
        writer.fixed(0, 1)
    elif reference:
        explicit = draw(flag)
        writer.fixed(explicit, 1)
        if explicit:
            removals = tuple(draw(st.lists(st.integers(1, 40), max_size=4)))
            for removal in removals:
                writer.unsigned(1)
                writer.unsigned(removal - 1)
            writer.unsigned(0)
    picture = Picture(idr, reference, frame_num, order, bottom, removals)
    header = (draw(st.integers(1, 3)) << 5 if reference else 0) | (5 if idr else 1)
    return sequence, sets, writer.unit(header), Slice(picture, first == 0, counts, modifications)


@settings(max_examples=400, deadline=None)
@given(slices())
def test_any_slice(given):
    sequence, sets, unit, expected = given
    read = {sets.number: sets}
    assert read_slice(unit, sequence, read) == expected
    assert read_slice(unit + b"\x80more", sequence, read) == expected
    with pytest.raises(Unknown):
        read_slice(unit[:2], sequence, read)
    # What stands in for its picture marks the same.
    own = PictureSet.read(skipping_set(31, sequence))
    assert own == PictureSet(31, sequence.number, True, (1, 1), False, False, False)
    if not expected.picture.idr:
        again = read_slice(skipped_slice(31, sequence, expected.picture), sequence, {31: own})
        assert again == Slice(expected.picture._replace(reference=True), True, (1,), ((),))


def test_no_start_code_in_a_stand_in():
    sequence = SEQUENCE._replace(frame_num_bits=16, order_bits=16)
    picture = Picture(False, True, 0, 1, 0, None)
    unit = skipped_slice(31, sequence, picture)
    assert b"\0\0\3" in unit
    assert not any(b"\0\0" + bytes([code]) in unit for code in range(3))
    assert read_slice(unit, sequence, {31: PictureSet.read(skipping_set(31, sequence))}).picture == picture


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 4), st.binary(max_size=12), st.integers(0, 200))
def test_damaged_headers_give_fewer_or_no_stand_ins(place, noise, bit):
    """And nothing else, whatever they hold."""
    unit = bytearray(STREAM[place][0])
    unit[bit // 8 % len(unit)] ^= 1 << bit % 8
    for damaged in (bytes(unit), unit[:1] + noise, bytes(unit) + noise):
        found = stand_ins(with_picture(place, bytes(damaged)))
        assert set(found) <= {1, 2, 3}
        assert all(len(units) == 2 for units in found.values())


@pytest.mark.parametrize("rounds", [60, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_damaged_files(rounds, tmp_path, decoded, monkeypatch):
    """Where a bit is turned round at the start of a picture, frames are what they were or come of a plain decode."""
    # How an error is concealed hangs on the number of threads.
    monkeypatch.setattr(merv_fast.video.pyav, "decoding_threads", lambda: 1)
    path = encode(tmp_path / "a.mp4", "veryfast", b_adapt=0, bframes=3, keyint=50, frames=FRAMES[:60])
    whole = plain_decode(path)
    chance = random.Random(0)
    frames = replaced = 0
    for _ in range(rounds):
        hit, bit = chance.randrange(1, 60), chance.randrange(32, 120)

        def change(number, packet, hit=hit, bit=bit):
            data = bytearray(packet)
            data[bit // 8 % len(data)] ^= (number == hit) << bit % 8
            return bytes(data)

        damaged = remux(path, tmp_path / "b.mp4", change)
        wanted = sorted(chance.sample(range(60), 3))
        video = open_video(damaged)
        decoded.clear()
        got = video.frames_at([number for number in wanted if number < len(video)]).numpy()
        replaced += sum(not own for _, own in decoded)
        with av.open(str(damaged)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            plain = [frame.to_ndarray(format="rgb24") for frame in decode_all(container, stream, [])]
        for number, frame in zip(wanted, got, strict=False):
            frames += 1
            assert any(np.array_equal(frame, each) for each in (whole[number], *plain)), (hit, bit, wanted)
    assert frames > 2 * rounds
    assert replaced > rounds
