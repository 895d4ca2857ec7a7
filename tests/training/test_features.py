"""Features of frozen encoders: computed once, found again, and the same losses as running the encoders."""

import pytest
import torch

from merv_fast.errors import VideoError
from merv_fast.training import encode_videos, features, train
from merv_fast.training.features import AT_ONCE
from merv_fast.video import load_frames
from tests import budgets
from tests.training.small import ANSWERS, QUICK, conversation, small_model, write_clips, write_data

ROOM = 2**30


@pytest.fixture
def small():
    return small_model()


def count_runs(monkeypatch, model):
    """Videos that each call of ``encode`` gets."""
    runs, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda inputs: runs.append(len(inputs[0])) or encode(inputs))
    return runs


def test_they_are_what_the_encoders_return_and_are_kept(small, clips, tmp_path, monkeypatch):
    video_model = small.model.video_model
    runs, reads = count_runs(monkeypatch, video_model), []
    monkeypatch.setattr(
        features, "load_frames", lambda path, *args, **kw: reads.append(path) or load_frames(path, *args, **kw)
    )
    stored = encode_videos(video_model, [*clips, clips[0]], tmp_path, ROOM)
    assert runs == [AT_ONCE, AT_ONCE]
    assert reads == clips
    with torch.no_grad():
        inputs = video_model.prepare([load_frames(clip, 8).movedim(-1, 1) for clip in clips[:AT_ONCE]])
        expected = video_model.encode(inputs)
    runs.clear()
    reads.clear()
    for index, clip in enumerate(clips[:AT_ONCE]):
        for got, each in zip(stored.of(clip), expected, strict=True):
            assert torch.equal(got, each[index])
    again = encode_videos(video_model, clips, tmp_path, ROOM)
    assert (again.keys, runs, reads) == (stored.keys, [], [])
    same = encode_videos(small_model().model.video_model, clips, tmp_path, ROOM)
    assert (same.keys, reads) == (stored.keys, [])
    other = encode_videos(small_model(seed=1).model.video_model, clips[:1], tmp_path, ROOM)
    assert other.keys[clips[0]] != stored.keys[clips[0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read(small, clips, tmp_path, workers):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    videos = [clips[0], tmp_path / "broken.mp4", tmp_path / "absent.mp4"]
    arguments = (small.model.video_model, videos, tmp_path / "kept", ROOM)
    stored = encode_videos(*arguments, on_error="skip", workers=workers)
    assert stored.keys.keys() - stored.faults.keys() == {clips[0]}
    for video in videos[1:]:
        with pytest.raises(VideoError, match=video.name):
            stored.of(video)
    with pytest.raises(VideoError):
        encode_videos(*arguments, workers=workers)


def test_errors(small, clips, tmp_path):
    video_model = small.model.video_model
    with pytest.raises(
        ValueError, match=r"max_bytes must be at least the 0\.0 GiB that the features of 16 videos take"
    ):
        encode_videos(video_model, clips, tmp_path, 1000)
    stored = encode_videos(video_model, clips[:1], tmp_path, ROOM)
    (entry,) = tmp_path.glob("*.safetensors")
    entry.unlink()
    with pytest.raises(RuntimeError, match=r"the features of .*0\.mp4 are gone"):
        stored.of(clips[0])
    video_model.train()
    with pytest.raises(ValueError, match="encoders must be in evaluation mode"):
        encode_videos(video_model, clips[:1], tmp_path, ROOM)


@pytest.mark.parametrize(("stage", "bf16"), [("align", False), ("finetune", False), ("finetune", True)])
def test_they_give_the_losses_of_running_the_encoders(clips, tmp_path, monkeypatch, stage, bf16):
    entries = [conversation(answer, video=str(clip)) for clip, answer in zip(clips[:7], ANSWERS, strict=False)]
    data = write_data(tmp_path, [*entries, conversation("Yes.")])
    arguments = QUICK | {"max_steps": 8, "global_batch_size": 4, "per_device_train_batch_size": 4, "bf16": bf16}
    losses, runs = {}, {}
    for cache in (None, tmp_path / "cache"):
        small = small_model()
        runs[cache] = count_runs(monkeypatch, small.model.video_model)
        out = tmp_path / f"out-{cache is None}"
        losses[cache] = train(small, stage, data, out, cache=cache, arguments=arguments).losses
    assert sum(runs[None]) == 4 * 7
    assert runs[tmp_path / "cache"] == [7]
    running, kept = losses.values()
    assert len(set(running)) == 8
    assert max(abs(a - b) for a, b in zip(running, kept, strict=True)) <= budgets.TRAINING * running[0]


def test_a_stage_that_trains_encoders_keeps_nothing(data, tmp_path):
    with pytest.raises(ValueError, match="cache must be left out of the stage full"):
        train(small_model(), "full", data, tmp_path / "out", cache=tmp_path / "cache")


def test_features_follow_the_contents_of_a_file(small, tmp_path):
    first, second = write_clips(tmp_path, 2)
    video_model = small.model.video_model
    before = encode_videos(video_model, [first], tmp_path / "kept", ROOM).keys[first]
    first.write_bytes(second.read_bytes())
    assert encode_videos(video_model, [first], tmp_path / "kept", ROOM).keys[first] != before


def test_copies_of_a_video_are_encoded_once(small, clips, tmp_path, monkeypatch):
    runs = count_runs(monkeypatch, small.model.video_model)
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clips[0].read_bytes())
    stored = encode_videos(small.model.video_model, [clips[0], clips[1], copy], tmp_path / "kept", ROOM)
    assert runs == [2]
    assert stored.keys[copy] == stored.keys[clips[0]] != stored.keys[clips[1]]
    assert all(torch.equal(a, b) for a, b in zip(stored.of(copy), stored.of(clips[0]), strict=True))
    assert not torch.equal(stored.of(copy)[0], stored.of(clips[1])[0])
