"""The local engine: what it writes, and what it leaves alone."""

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from merv_fast.cli.app import app, main
from merv_fast.integrations.corpus import EncodedCorpus, encode_corpus
from merv_fast.integrations.corpus.encoder import Encoder
from merv_fast.integrations.corpus.folder import CorpusFolder
from merv_fast.integrations.corpus.rows import from_parquet
from merv_fast.integrations.vllm import prompt_embeds
from merv_fast.models import MervVideoModel, VisualTokens
from tests.integrations.corpus.reading import check_once, tokens_in_batch

ROOT = Path(__file__).parents[3]
BATCH = {"device": "cpu", "batch_size": 3, "shard_size": 5}
PROMPT = "What happens?"


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 8)
    (folder / "empty.mp4").touch()
    return folder


@pytest.fixture(scope="module")
def finished(clips, bad, tmp_path_factory):
    """A corpus of clips and bad files."""
    folder = tmp_path_factory.mktemp("corpus") / "new"
    seen = []
    done = encode_corpus([clips, bad], folder, progress=lambda *state: seen.append(state), workers=2, **BATCH)
    assert (done.encoded, done.failed, done.already, done.failed_before) == (8, 2, 0, 0)
    assert seen[-1] == (10, 8, 2)
    return folder


def videos(clips):
    return sorted(clips.glob("*.mp4"))


def test_tokens_are_those_of_a_batch(finished, clips, bad, vidlm):
    corpus = check_once(finished, videos(clips), sorted(bad.iterdir()))
    paths = videos(clips)
    for start in range(0, len(paths), 3):
        batch = paths[start : start + 3]
        for path, tokens, weights in zip(batch, *tokens_in_batch(vidlm, batch), strict=True):
            assert torch.equal(corpus[path].tokens, tokens)
            assert corpus[path].encoder_weights == weights
    assert list(corpus) == list(map(str, paths))
    assert len(corpus) == 8
    row = corpus.row(paths[3])
    assert (row.height, row.width, row.size, row.model) == (44, 48, paths[3].stat().st_size, "merv-tiny")
    assert row.tensors == [{"name": f"{row.id}/tokens", "dtype": "float32", "shape": [128, 160]}]


def test_one_at_a_time_is_as_the_model_does_it(clips, vidlm, tmp_path):
    """To the bit: tokens, weights, answers, and that no encoder runs for an answer."""
    paths = videos(clips)[:2]
    encode_corpus(paths, tmp_path, device="cpu", batch_size=1, workers=0)
    corpus = EncodedCorpus(tmp_path)
    for path in paths:
        expected, got = vidlm.encode(path), corpus[path]
        assert torch.equal(got.tokens, expected.tokens)
        assert got.encoder_weights == expected.encoder_weights
        assert list(got.encoder_weights) == list(expected.encoder_weights)
        (answer,) = vidlm.answer(got, PROMPT, max_new_tokens=8)
        assert answer.answer == vidlm.generate(path, PROMPT, max_new_tokens=8)
        assert answer.timings_ms["encode"] == 0


def test_no_encoder_is_needed_for_answers_and_prompts(finished, clips, vidlm, monkeypatch):
    """By ``generate``, and as embeddings for vLLM."""
    corpus, paths = EncodedCorpus(finished), videos(clips)[:3]
    tokens = [VisualTokens(each, None) for each in tokens_in_batch(vidlm, paths)[0]]
    answers, embeds = vidlm.generate(tokens, PROMPT, max_new_tokens=4), prompt_embeds(vidlm, tokens, PROMPT)
    for name in ("prepare", "encode", "fuse"):
        monkeypatch.delattr(MervVideoModel, name)
    assert vidlm.generate([corpus[path] for path in paths], PROMPT, max_new_tokens=4) == answers
    stored = prompt_embeds(vidlm, [corpus[path] for path in paths], PROMPT)
    assert all(torch.equal(got, expected) for got, expected in zip(stored, embeds, strict=True))


def test_bad_files_have_their_reasons(finished, bad):
    corpus = EncodedCorpus(finished)
    noise, empty = str(bad / "noise.mp4"), str(bad / "empty.mp4")
    assert corpus.failed[empty] == "is an empty file"
    assert "FFmpeg" in corpus.failed[noise]
    assert noise not in corpus
    with pytest.raises(KeyError, match=r"failed: is an empty file"):
        corpus[empty]
    with pytest.raises(KeyError, match=r"'other.mp4' is not in"):
        corpus["other.mp4"]


def test_a_video_is_found_by_any_path(finished, clips, monkeypatch, tmp_path):
    corpus = pickle.loads(pickle.dumps(EncodedCorpus(finished)))
    path = clips / "1.mp4"
    monkeypatch.chdir(clips)
    (tmp_path / "link.mp4").symlink_to(path)
    assert all(name in corpus for name in (path, str(path), "1.mp4", tmp_path / "link.mp4", corpus.row(path).id))
    assert 3 not in corpus
    # Its file need not be there any more.
    assert "gone.mp4" not in corpus


def test_what_is_there_is_left_alone(finished, clips, bad, monkeypatch):
    """No video is opened again, and nothing is written."""
    import merv_fast.integrations.corpus.local as local

    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    monkeypatch.delattr(local, "VideoLoader")
    done = encode_corpus([clips, bad], finished, **BATCH)
    assert (done.encoded, done.failed, done.already, done.failed_before) == (0, 0, 8, 2)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_what_changed_or_failed_is_encoded_again(clips, tmp_path):
    source, out = tmp_path / "a.mp4", tmp_path / "out"
    source.write_bytes(b"not yet")
    run = {"device": "cpu", "workers": 0}
    assert encode_corpus([source], out, **run).failed == 1
    assert encode_corpus([source], out, **run).failed_before == 1
    assert encode_corpus([source], out, retry_failed=True, **run).failed == 1
    source.write_bytes((clips / "0.mp4").read_bytes())
    assert encode_corpus([source], out, **run).encoded == 1
    first = EncodedCorpus(out)[source].tokens.clone()
    assert encode_corpus([source], out, retry_failed=True, **run).already == 1
    source.write_bytes((clips / "5.mp4").read_bytes())
    assert encode_corpus([source], out, **run).encoded == 1
    corpus = check_once(out, [source])
    assert not torch.equal(corpus[source].tokens, first)
    assert corpus.failed == {}


def test_another_model_or_clip_is_refused(finished, clips, vidlm, tmp_path):
    changed = tmp_path / "changed"
    with torch.no_grad():
        weight = next(vidlm.model.video_model.tail.parameters())
        before = weight.clone()
        weight += 1
        vidlm.save_pretrained(changed)
        with pytest.raises(ValueError, match=r"EncodedCorpus: vidlm must be the model of .*, which has weights"):
            EncodedCorpus(finished).check(vidlm)
        weight.copy_(before)
    EncodedCorpus(finished).check(vidlm)
    with pytest.raises(
        ValueError, match=r"settings must be those of .*, but weights is \w{12}... there, \w{12}... now$"
    ):
        encode_corpus([clips], finished, model=changed, **BATCH)
    with pytest.raises(ValueError, match=r"but clip_start_sec is 0.0 there, 0.5 now$"):
        encode_corpus([clips], finished, clip_start_sec=0.5, **BATCH)
    with pytest.raises(ValueError, match=r"but dtype is 'float32' there, 'bfloat16' now; weights is"):
        encode_corpus([clips], finished, dtype=torch.bfloat16, **BATCH)


def test_features_can_be_fused_later(clips, vidlm, tmp_path):
    path = clips / "2.mp4"
    encode_corpus([path], tmp_path, keep="features", device="cpu", workers=0)
    with pytest.raises(ValueError, match="vidlm must be given to fuse the features"):
        EncodedCorpus(tmp_path)[path]
    corpus = EncodedCorpus(tmp_path, vidlm)
    corpus.check(vidlm)
    features = corpus.tensors(path)
    assert list(features) == list(vidlm.model.video_model.encoders)
    assert all(feature.ndim == 3 for feature in features.values())
    expected = vidlm.encode(path)
    assert torch.equal(corpus[path].tokens, expected.tokens)
    assert corpus[path].encoder_weights == expected.encoder_weights


def test_a_clip_of_each_video(clips, vidlm, tmp_path):
    path = clips / "2.mp4"
    encode_corpus([path], tmp_path, clip_start_sec=0.4, clip_end_sec=1.0, device="cpu", workers=0)
    expected = vidlm.encode(path, clip_start_sec=0.4, clip_end_sec=1.0)
    assert torch.equal(EncodedCorpus(tmp_path)[path].tokens, expected.tokens)
    assert not torch.equal(vidlm.encode(path).tokens, expected.tokens)


def test_a_decoder_that_dies_is_a_reason(clips, tmp_path, monkeypatch):
    import merv_fast.integrations.corpus.local as local
    from tests.integrations.corpus.crashing import decode_or_crash

    loader = local.VideoLoader
    monkeypatch.setattr(
        local,
        "VideoLoader",
        lambda paths, count, workers, **clip: loader(paths, workers=workers, decode=decode_or_crash),
    )
    encode_corpus(videos(clips)[:3], tmp_path, workers=1, **BATCH)
    corpus = check_once(tmp_path, [clips / "0.mp4", clips / "2.mp4"], [clips / "1.mp4"])
    assert corpus.failed == {str(clips / "1.mp4"): "ended the process that decoded it (SIGKILL)"}


def test_a_killed_run_goes_on(clips, tmp_path):
    """The whole program, killed after its second commit: what is missing is all that is done then."""
    out, seen = tmp_path / "out", []
    command = ["encode", str(clips), "--out", str(out), "--shard-size", "1", "--batch-size", "1", "--workers", "1"]
    program = [sys.executable, "-m", "tests.integrations.corpus.driver", "SIGKILL", "2", *command, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), done.stderr
    assert len(EncodedCorpus(out)) == 2
    done = encode_corpus([clips], out, progress=lambda *state: seen.append(state), workers=0, **BATCH)
    assert (done.encoded, done.already) == (6, 2)
    assert seen[-1] == (6, 6, 0)
    check_once(out, videos(clips))


def test_ctrl_c_keeps_what_is_encoded(clips, tmp_path, monkeypatch, capsys):
    """Exit code 130, no stack, no lock; also what waited for its shard to be full is there."""
    prepare, count = Encoder.prepare, itertools.count()

    def prepare_and_interrupt(self, frames):
        if next(count) == 5:
            signal.raise_signal(signal.SIGINT)
        return prepare(self, frames)

    monkeypatch.setattr(Encoder, "prepare", prepare_and_interrupt)
    command = ["encode", str(clips), "--out", str(tmp_path), "--batch-size", "2", "--workers", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["merv-fast", *command])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (130, "")
    assert "Traceback" not in captured.err
    assert len(EncodedCorpus(tmp_path)) == 4
    assert encode_corpus([clips], tmp_path, workers=0, **BATCH).encoded == 4
    check_once(tmp_path, videos(clips))


def test_arguments_out_of_range(clips, tmp_path):
    for name, value, rule in (
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("shard_size", -1, "shard_size must be at least 1, got -1"),
        ("keep", "frames", "keep must be one of tokens, features, got 'frames'"),
        ("engine", "spark", "engine must be one of local, ray, got 'spark'"),
    ):
        with pytest.raises(ValueError, match=f"encode: {rule}"):
            encode_corpus([clips], tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_the_command(clips, bad, tmp_path, monkeypatch):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{clips / '0.mp4'}\n\n{clips / '1.mp4'}\n")
    out = tmp_path / "out"
    command = ["encode", str(bad / "noise.mp4"), "-", "--list", str(listed), "--out", str(out), "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, "--workers", "1"], input=f"{clips / '2.mp4'}\n{clips / '0.mp4'}\n")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"3 encoded, 1 failed, 0 already there: {out}\n"
    again = CliRunner().invoke(app, ["encode", str(bad / "noise.mp4"), "--out", str(out), "--device", "cpu"])
    assert again.stdout == (
        f"0 encoded, 0 failed, 0 already there: {out} (1 failed before; --retry-failed tries them again)\n"
    )
    as_json = CliRunner().invoke(app, ["encode", str(clips / "1.mp4"), "--out", str(out), "--device", "cpu", "--json"])
    assert json.loads(as_json.stdout) == {
        "encoded": 0,
        "failed": 0,
        "already": 1,
        "failed_before": 0,
        "folder": str(out),
    }
    assert len(from_parquet(out / "manifest.parquet")[0]) == 4


def test_errors_of_the_command_are_one_line(clips, tmp_path, monkeypatch, capsys):
    def error(*arguments):
        monkeypatch.setattr(sys, "argv", ["merv-fast", "encode", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert (stop.value.code, captured.out) == (1, "")
        return captured.err

    out = tmp_path / "out"
    assert (
        error("--out", out)
        == "error: encode: videos must be given as arguments, with --list, or as lines of stdin (-), got none\n"
    )
    with CorpusFolder(out):
        assert error(clips, "--out", out) == f"error: encode: no other process may write to {out} meanwhile\n"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert error(clips, "--out", out).startswith(
        "error: encode: pyarrow must be installed: pip install 'merv-fast[corpus]'"
    )
    done = CliRunner().invoke(app, ["encode", str(clips), "--out", str(out), "--address", "auto"])
    assert done.exit_code == 2
    assert "--address must be left out without --engine ray" in done.stderr


def test_without_ray(clips, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"encode: ray must be installed: pip install 'merv-fast\[ray\]'"):
        encode_corpus([clips], tmp_path / "out", engine="ray")
    assert encode_corpus([clips / "0.mp4"], tmp_path / "out", device="cpu", workers=0).encoded == 1
