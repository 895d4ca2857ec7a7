"""Ray Data on a cluster of this machine: processes are killed, and nothing is lost or repeated."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from merv_fast.integrations.corpus import EncodedCorpus, encode_corpus
from tests.integrations.corpus.reading import check_once

ray = pytest.importorskip("ray")

ROOT = Path(__file__).parents[3]
RUN = {"engine": "ray", "device": "cpu", "batch_size": 1, "shard_size": 2}


@pytest.fixture(scope="module")
def cluster():
    """Its address."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(ROOT))
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**28, log_to_driver=False, logging_level="ERROR")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    patch.undo()


class Killer(threading.Thread):
    """Kills, once each, the first processes of ours that are seen at work under the given titles.

    Attributes:
        killed: their ids by title.
    """

    def __init__(self, *titles):
        super().__init__(daemon=True)
        self.killed, self._titles, self._over = {}, titles, threading.Event()

    def run(self):
        while len(self.killed) < len(self._titles) and not self._over.wait(0.002):
            for title in set(self._titles) - self.killed.keys():
                for process in at_work(title):
                    os.kill(process, signal.SIGKILL)
                    self.killed[title] = process
                    break

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self.join()


def at_work(title):
    """Ids of processes below this one whose title begins so."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                found = Path("/proc", entry, "cmdline").read_bytes().startswith(title.encode())
            except OSError:
                continue
            if found and is_below(int(entry)):
                yield int(entry)


def is_below(process):
    """Whether this process started it, or what started it."""
    while process > 1:
        if process == os.getpid():
            return True
        try:
            process = int(Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


DECODES, ENCODES = "ray::MapBatches(decode_videos)", "ray::MapWorker(MapBatches(EncodeVideos)).submit"


def check_tokens(corpus, vidlm):
    """To the bit: one video at a time, the actor computes what this process does."""
    for path in corpus:
        expected = vidlm.encode(path)
        assert torch.equal(corpus[path].tokens, expected.tokens)
        assert corpus[path].encoder_weights == expected.encoder_weights


def test_killed_workers_lose_and_repeat_nothing(cluster, clips, vidlm, tmp_path):
    """While they are at work: a task that decodes, and the actor."""
    out, bad, seen = tmp_path / "out", tmp_path / "bad.mp4", []
    bad.write_bytes(b"no video")
    with Killer(DECODES, ENCODES) as killer:
        done = encode_corpus([clips, bad], out, progress=lambda *state: seen.append(state), **RUN)
    assert killer.killed.keys() == {DECODES, ENCODES}
    assert (done.encoded, done.failed, done.already) == (8, 1, 0)
    # Committed as it went on, not at the end.
    assert len(seen) > 2
    assert seen[-1] == (9, 8, 1)
    corpus = check_once(out, sorted(clips.glob("*.mp4")), [bad])
    assert "FFmpeg" in corpus.failed[str(bad)]
    check_tokens(corpus, vidlm)


@pytest.mark.slow
def test_another_model_on_a_machine_is_an_error(cluster, clips, tmp_path, monkeypatch):
    """What this process knows of the weights is not what an actor finds."""
    import merv_fast.integrations.corpus.encode as encode

    settings = encode.settings_of
    monkeypatch.setattr(encode, "settings_of", lambda *args: settings(*args) | {"weights": "others"})
    with pytest.raises(RuntimeError, match=r"encode: a worker failed: .*here differ: weights"):
        encode_corpus([clips], tmp_path, **RUN)
    assert ray.is_initialized()


@pytest.mark.slow
def test_a_killed_driver_loses_and_repeats_nothing(cluster, clips, vidlm, tmp_path):
    """After its first commit, with tasks under way on a cluster that lives on."""
    out = tmp_path / "out"
    command = ["encode", str(clips), "--out", str(out), "--engine", "ray", "--address", cluster, "--device", "cpu"]
    command += ["--shard-size", "2", "--batch-size", "1"]
    program = [sys.executable, "-m", "tests.integrations.corpus.driver", "SIGKILL", "1", *command]
    done = subprocess.run(program, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), done.stderr
    before = len(EncodedCorpus(out))
    assert 0 < before < 8
    done = encode_corpus([clips], out, **RUN)
    assert (done.encoded, done.already) == (8 - before, before)
    check_tokens(check_once(out, sorted(clips.glob("*.mp4"))), vidlm)
