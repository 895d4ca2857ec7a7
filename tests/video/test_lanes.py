import threading
from collections import deque
from itertools import chain

import numpy as np
import pytest

import merv_fast.video.lanes
import merv_fast.video.progress
import merv_fast.video.pyav
from merv_fast.errors import VideoError
from merv_fast.video import VideoLimits, open_video
from merv_fast.video.lanes import choose_lanes, drain
from merv_fast.video.seeking import Mismatch, PacketIndex
from tests.video.clips import panned, plain_decode, write_clip

SMALL = (64, 128)
X264 = {"bf": "3", "g": "25", "sc_threshold": "0"}


def index_of(entries, frames, droppable=()):
    numbers = np.arange(frames)
    return PacketIndex(numbers, numbers, numbers, numbers, np.isin(numbers, droppable), np.array(entries))


def test_groups_of_pictures_go_to_decoders_of_their_own():
    lanes = choose_lanes(index_of(range(0, 400, 100), 400), [*range(0, 400, 10)], 2, SMALL)
    assert (lanes.count, lanes.threads) == (2, 1)
    assert [(run.start, run.stop) for run in lanes.runs] == [(0, 90), (100, 190), (200, 290), (300, 390)]
    assert sorted(chain(*(run.wanted for run in lanes.runs))) == [*range(0, 400, 10)]


@pytest.mark.parametrize(
    ("entries", "wanted", "threads", "size"),
    [
        ([0], range(0, 400, 10), 4, SMALL),
        # Two decoders would wait for the longer group: 350 frames, where two threads take 400 / 1.4.
        ([0, 350], range(0, 400, 10), 2, SMALL),
        (range(0, 400, 100), range(0, 400, 10), 1, SMALL),
        # Another decoder takes time to open.
        ([0, 12], [2, 14], 2, SMALL),
        (range(0, 400, 100), range(0, 400, 10), 4, (8192, 8192)),
    ],
    ids=["one entry", "uneven", "one thread", "short", "large"],
)
def test_one_decoder_where_more_do_not_pay(entries, wanted, threads, size):
    lanes = choose_lanes(index_of([*entries], 400), [*wanted], threads, size)
    assert (lanes.count, lanes.threads) == (1, threads)


def test_threads_are_shared_out():
    lanes = choose_lanes(index_of(range(0, 400, 50), 400), [*range(0, 400, 10)], 16, SMALL)
    assert (lanes.count, lanes.threads) == (4, 4)


def test_short_groups_are_kept_together():
    lanes = choose_lanes(index_of(range(400), 400), [*range(400)], 2, SMALL)
    assert [run.start for run in lanes.runs] == [*range(0, 400, 32)]


def test_the_longest_come_first():
    lanes = choose_lanes(index_of([0, 100, 250, 300], 400), [50, 80, 240, 290, 310, 399], 2, SMALL)
    assert [(run.start, run.stop) for run in lanes.runs] == [(100, 240), (300, 399), (0, 80), (250, 290)]


def test_pictures_left_out_cost_nothing():
    index = index_of([0, 100], 200, droppable=range(1, 200, 2))
    run, _ = index.runs([0, 99, 150], apart=True)
    assert (run.start, run.stop, index.cost(run)) == (0, 99, 50)


@pytest.mark.parametrize(
    ("entries", "droppable", "wanted", "expected"),
    [([0], [], [5, 9], False), ([0], [3], [5, 9], True), ([0], [9], [5], False), ([0, 12], [], [15], True)],
)
def test_whether_anything_is_skipped(entries, droppable, wanted, expected):
    index = index_of(entries, 20, droppable)
    assert choose_lanes(index, wanted, 1, SMALL).skips(index) is expected


def test_draining_by_several_takes_everything_once():
    runs, taken = deque(range(10_000)), [[] for _ in range(4)]
    threads = [threading.Thread(target=lambda mine=mine: mine.extend(drain(runs))) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(chain(*taken)) == [*range(10_000)]


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip.mp4", options=X264, frames=panned(200))


@pytest.fixture
def opened(monkeypatch):
    """The threads of each decoder that is opened to read frames."""
    threads = []
    open_decoder = merv_fast.video.pyav.PyAVVideo._open

    def noting(video, count):
        threads.append(count)
        return open_decoder(video, count)

    monkeypatch.setattr(merv_fast.video.pyav.PyAVVideo, "_open", noting)
    return threads


@pytest.mark.parametrize(("threads", "decoders"), [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (9, [2, 2, 2, 2])])
def test_frames_are_the_same_however_many_decode(clip, threads, decoders, opened, monkeypatch):
    monkeypatch.setattr(merv_fast.video.pyav, "decoding_threads", lambda: threads)
    expected = plain_decode(clip)
    video = open_video(clip, strict=True)
    assert np.array_equal(video.frames_at(range(200)).numpy(), expected)
    assert opened == decoders
    for wanted in ([7, 190], [199, 0, 3, 101, 101], range(0, 200, 7), range(1, 200, 3)):
        assert np.array_equal(video.frames_at(wanted).numpy(), expected[list(wanted)])


def test_an_error_in_one_decoder_ends_the_others(clip, monkeypatch, caplog):
    monkeypatch.setattr(merv_fast.video.pyav, "decoding_threads", lambda: 2)
    decode_runs, seen = merv_fast.video.pyav.decode_runs, []

    def failing(container, stream, index, runs):
        for number, frame in decode_runs(container, stream, index, runs):
            seen.append(number)
            if number == 60:
                raise Mismatch("the test wants it")
            yield number, frame

    monkeypatch.setattr(merv_fast.video.pyav, "decode_runs", failing)
    video = open_video(clip)
    assert np.array_equal(video.frames_at(range(200)).numpy(), plain_decode(clip))
    assert "decoding from its start, for the test wants it" in caplog.text
    assert len(seen) < 150


def test_the_time_limit_holds_in_every_decoder(clip, monkeypatch):
    monkeypatch.setattr(merv_fast.video.pyav, "decoding_threads", lambda: 2)
    video = open_video(clip, limits=VideoLimits(max_decode_seconds=5))
    clock = iter(range(1000))
    monkeypatch.setattr(merv_fast.video.progress, "monotonic", lambda: next(clock))
    with pytest.raises(VideoError, match=r"took longer than 5 s to decode \(VideoLimits.max_decode_seconds\)"):
        video.frames_at(range(200))
    assert not any("decoder" in thread.name for thread in threading.enumerate())
