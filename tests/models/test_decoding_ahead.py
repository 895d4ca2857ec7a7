"""Videos of one batch: the next is decoded while one is prepared."""

import threading

import pytest
import torch

from merv_fast.errors import VideoError
from merv_fast.models.encoding import VideoEncoding
from merv_fast.runtime.trace import StageTimer


@pytest.fixture
def encoding(tiny):
    clip = {"clip_start_sec": 0.0, "clip_end_sec": None, "end_frame": None, "fps": None}
    return VideoEncoding(tiny.model.video_model, clip, "auto", None)


@pytest.fixture
def timer():
    return StageTimer(torch.device("cpu"))


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("merv-decode")]


def test_the_next_video_is_decoded_while_one_is_prepared(encoding, timer, clips, monkeypatch):
    begun = {clip: threading.Event() for clip in clips}
    decode, prepare = encoding._decode, encoding._prepare

    def decoding(source):
        if source is not None:
            begun[source].set()
        return decode(source)

    following = iter([*clips[1:], None])

    def preparing(frames, timer):
        source = next(following)
        # Would wait for ever if it were decoded afterwards.
        assert source is None or begun[source].wait(20)
        return prepare(frames, timer)

    monkeypatch.setattr(encoding, "_decode", decoding)
    monkeypatch.setattr(encoding, "_prepare", preparing)
    together = encoding.encode(clips, timer)
    assert threads() == []
    assert timer.milliseconds["decode"] > 0
    monkeypatch.undo()
    for clip, visual in zip(clips, together, strict=True):
        (alone,) = encoding.encode([clip], timer)
        assert torch.allclose(visual.tokens, alone.tokens, rtol=1e-4, atol=1e-5)


def test_no_more_than_one_is_decoded_ahead(encoding, timer, clips, monkeypatch):
    decoded, prepared = [], []
    decode = encoding._decode

    def decoding(source):
        frames = decode(source)
        if source is not None:
            # The one that is prepared, and this one.
            assert len(decoded) - len(prepared) <= 1
            decoded.append(source)
        return frames

    def preparing(frames, timer):
        threading.Event().wait(0.05)
        prepared.append(frames)
        return [frames[:1].float()]

    monkeypatch.setattr(encoding, "_decode", decoding)
    monkeypatch.setattr(encoding, "_prepare", preparing)
    monkeypatch.setattr(encoding, "_encode", lambda inputs, timer: len(inputs))
    assert encoding._features(clips * 2, timer) == 6
    assert decoded == clips * 2


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_an_error_comes_in_its_turn_and_ends_the_thread(encoding, timer, clips, tmp_path, monkeypatch, bad):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nothing")
    sources = [*clips, clips[0]]
    sources[bad] = broken
    prepared, prepare = [], encoding._prepare
    monkeypatch.setattr(encoding, "_prepare", lambda frames, timer: prepared.append(1) or prepare(frames, timer))
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        encoding.encode(sources, timer)
    assert len(prepared) == bad
    assert threads() == []


def test_an_error_of_the_caller_ends_the_thread(encoding, timer, clips, monkeypatch):
    def preparing(frames, timer):
        raise KeyboardInterrupt

    monkeypatch.setattr(encoding, "_prepare", preparing)
    with pytest.raises(KeyboardInterrupt):
        encoding.encode(clips, timer)
    assert threads() == []


def test_a_single_video_needs_no_thread(encoding, timer, clips, monkeypatch):
    decode = encoding._decode
    where = []
    monkeypatch.setattr(encoding, "_decode", lambda source: where.append(threading.current_thread()) or decode(source))
    encoding.encode(clips[:1], timer)
    assert where == [threading.main_thread()]
