"""What is decoded, and what becomes of an entry that cannot be read."""

import logging
from functools import partial

import av
import pytest
import torch
from torch.utils.data import DataLoader

from merv_fast.errors import VideoError
from merv_fast.training import EntryError, TrainingDataset, conversation_tokens, read_entries
from merv_fast.video import load_frames
from tests.models.random_merv import tiny_tokenizer
from tests.training.small import conversation, write_data

FRAMES = 8
TOKENISE = partial(conversation_tokens, tokenizer=tiny_tokenizer(), prompt_format="pure", max_length=64)


def dataset(folder, entries, **kwargs):
    return TrainingDataset(read_entries(write_data(folder, entries), check_files=False), TOKENISE, FRAMES, **kwargs)


@pytest.fixture
def broken(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    return str(tmp_path / "broken.mp4")


def test_a_video_is_decoded_by_the_rule_of_load_frames(tmp_path, clips):
    (sample,) = dataset(tmp_path, [conversation("A ball.", video=str(clips[0]))])
    assert torch.equal(sample.frames, load_frames(clips[0], FRAMES).movedim(-1, 1))
    assert sample.frames.dtype == torch.uint8
    assert len(sample.frames.unique(dim=0)) == FRAMES


def test_a_picture_is_a_repeated_frame(tmp_path, clips):
    with av.open(str(tmp_path / "p.png"), "w") as file:
        stream = file.add_stream("png")
        stream.height, stream.width, stream.pix_fmt = 24, 32, "rgb24"
        picture = load_frames(clips[0], 1)[0, :24, :32].contiguous()
        file.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        file.mux(stream.encode())
    (sample,) = dataset(tmp_path, [conversation("A ball.", image="p.png")])
    assert torch.equal(sample.frames, picture.movedim(-1, 0).expand(FRAMES, -1, -1, -1))


def test_text_alone_is_text_alone(tmp_path):
    (sample,) = dataset(tmp_path, [conversation("Yes.")])
    assert sample.frames is None
    assert sample.features is None
    assert sample.tokens == TOKENISE(read_entries(tmp_path / "data.json")[0])


def test_what_cannot_be_read_raises(tmp_path, broken, clips):
    data = dataset(tmp_path, [conversation("A ball.", video=broken), conversation("Yes.")])
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        data[0]
    assert data[1].tokens.ids
    with pytest.raises(EntryError, match="nothing of an answer is left"):
        dataset(tmp_path, [conversation("Yes.", question="Is it? " * 40)])[0]


def test_what_cannot_be_read_is_skipped_and_said(tmp_path, broken, clips, caplog):
    entries = [
        conversation("Yes.", question="Is it? " * 40),
        conversation("A ball.", video=broken),
        conversation("A box.", video=str(clips[0])),
        conversation("A room.", video=str(tmp_path / "absent.mp4")),
    ]
    data = dataset(tmp_path, entries, on_error="skip")
    with caplog.at_level(logging.WARNING, logger="merv_fast"):
        samples = [data[index] for index in range(4)]
    assert {tuple(sample.tokens.ids) for sample in samples} == {tuple(samples[2].tokens.ids)}
    assert [len(sample.skipped) for sample in samples] == [2, 1, 0, 3]
    assert "broken.mp4" in samples[1].skipped[0]
    assert [text.partition(":")[0] for text in caplog.messages] == ["skipped"] * 6


def test_nothing_to_train_on_raises(tmp_path, broken):
    data = dataset(tmp_path, [conversation("A ball.", video=broken)] * 3, on_error="skip")
    with pytest.raises(EntryError, match=r"none of 3 entries can be trained on; the last: .*broken\.mp4"):
        data[1]


def test_it_works_in_workers(tmp_path, broken, clips):
    entries = [conversation("A ball.", video=broken), conversation("A box.", video=str(clips[0]))]
    data = dataset(tmp_path, entries, on_error="skip")
    here = [data[index] for index in range(2)]
    there = list(DataLoader(data, batch_size=None, num_workers=2))
    for got, expected in zip(there, here, strict=True):
        assert got.tokens == expected.tokens
        assert got.skipped == expected.skipped
        assert torch.equal(got.frames, expected.frames)


def test_lengths_are_words_and_visual_tokens(tmp_path):
    entries = [conversation("One two.", question="Three?", video="v.mp4"), conversation("One.", question="Two?")]
    assert dataset(tmp_path, entries, video_tokens=100).lengths == [103, 2]
