"""The steps of the Ray engine, without Ray."""

import json
import os
from dataclasses import asdict, replace

import pyarrow as pa
import pytest
import torch

from merv_fast.integrations.corpus.encoder import ModelSource, settings_of
from merv_fast.integrations.corpus.folder import CorpusFolder
from merv_fast.integrations.corpus.items import find_items
from merv_fast.integrations.corpus.job import Job
from merv_fast.integrations.corpus.ray_data import EncodeVideos
from merv_fast.integrations.corpus.ray_tasks import decode_videos, write_shards
from merv_fast.integrations.corpus.reader import EncodedCorpus
from merv_fast.integrations.corpus.rows import Row
from merv_fast.video import load_frames
from tests.integrations.corpus.reading import tokens_in_batch

CLIP = {"clip_start_sec": 0.0, "clip_end_sec": None}
FRAMES = 16
"""Of a clip, that merv-tiny looks at."""


@pytest.fixture
def decoded(clips, tmp_path):
    """Tables of a good, a bad and two good videos."""
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    items = find_items([clips / "0.mp4", tmp_path / "bad.mp4", clips / "1.mp4", clips / "2.mp4"])
    batch = pa.table({"item": [json.dumps(asdict(item)) for item in items]})
    return list(decode_videos(batch, FRAMES, CLIP))


def test_frames_cross_as_they_are(decoded, clips):
    assert [table.num_rows for table in decoded] == [1, 1, 1, 1]
    for table, name in zip(decoded, ("0.mp4", None, "1.mp4", "2.mp4"), strict=True):
        (row,) = table.to_pylist()
        if name is None:
            assert (row["frames"], row["shape"]) == (None, None)
            assert "FFmpeg" in row["reason"]
            continue
        frames = torch.frombuffer(bytearray(row["frames"]), dtype=torch.uint8).view(row["shape"])
        assert torch.equal(frames, load_frames(clips / name, FRAMES))
        assert row["reason"] is None


def test_processes_that_decode_do_not_run_the_program(clips, monkeypatch):
    """They would not start with this one, which is not there; and it is what it was afterwards."""
    import __main__

    monkeypatch.setattr(__main__, "__file__", "/nowhere/program.py", raising=False)
    monkeypatch.setattr(__main__, "__spec__", None)
    batch = pa.table({"item": [json.dumps(asdict(item)) for item in find_items([clips / "0.mp4"])]})
    (table,) = decode_videos(batch, FRAMES, CLIP)
    assert table["reason"].to_pylist() == [None]
    assert __main__.__file__ == "/nowhere/program.py"


def job_of(vidlm, out):
    settings = settings_of(vidlm.model.video_model, "tokens", CLIP, "cpu")
    source = ModelSource("merv-tiny", "cpu", torch.float32)
    return Job(os.fspath(out), settings, source, "tokens", CLIP, 4, 4, None, None)


def test_an_actor_refuses_other_weights(vidlm, tmp_path):
    job = job_of(vidlm, tmp_path)
    with pytest.raises(RuntimeError, match="must be the same on all machines, but here differ: weights"):
        EncodeVideos(replace(job, settings=job.settings | {"weights": "others"}))


def test_a_batch_with_a_bad_video(decoded, clips, vidlm, tmp_path):
    out = tmp_path / "out"
    job = job_of(vidlm, out)
    with CorpusFolder(out) as folder:
        folder.agree(job.settings)
        encoded = EncodeVideos(job)(pa.concat_tables(decoded))
        folder.commit([Row.from_json(text) for text in write_shards(encoded, job.folder)["row"].to_pylist()])
        folder.finish()
    corpus = EncodedCorpus(out)
    paths = [clips / f"{number}.mp4" for number in range(3)]
    assert [os.path.basename(path) for path in corpus.failed] == ["bad.mp4"]
    for path, tokens, weights in zip(paths, *tokens_in_batch(vidlm, paths), strict=True):
        assert torch.equal(corpus[path].tokens, tokens)
        assert corpus[path].encoder_weights == weights
        assert (corpus.row(path).height, corpus.row(path).width) == (32 + 4 * int(path.stem), 48)
    assert len(list((out / "shards").iterdir())) == 1
