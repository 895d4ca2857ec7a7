"""What explain says of prefixes, caches and memory, and how memory is measured, on a GPU that is played."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import merv_fast
from merv_fast.models import merv_model
from merv_fast.models.explanation import _between_calls
from merv_fast.models.merv_model import MervModel
from merv_fast.runtime import peaks
from merv_fast.runtime.cache import VideoCache
from merv_fast.runtime.trace import StageTimer
from tests.models.test_merv_model import GREEDY, QUESTIONS, prompt


def row(vidlm, part):
    (found,) = [choice for choice in merv_fast.explain(vidlm) if choice.part == part]
    return found


@pytest.fixture
def gpu(monkeypatch):
    """What is called of torch.cuda, in order; peaks are 1, 2, 3, ... MiB."""
    calls = []

    def peak(device):
        calls.append("max")
        return calls.count("max") << 20

    stream = SimpleNamespace(synchronize=lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    # All of the device may not be waited for: another thread may capture a graph.
    monkeypatch.setattr(torch.cuda, "synchronize", None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    return calls


def test_the_budget_of_tokens(tiny):
    each, positions = tiny.model.video_model.num_video_tokens, tiny.config.get_text_config().max_position_embeddings
    found = row(tiny, "visual tokens")
    assert found.runs == f"{each} a video, or a window of one"
    (most,) = (int(word) for word, after in pairwise(found.why.split()) if after == "windows,")
    assert most * each < positions <= (most + 1) * each


def test_graphs(tiny):
    assert row(tiny, "CUDA graphs").runs == "none"
    assert "use_graphs was not called" in row(tiny, "CUDA graphs").why
    try:
        tiny.model.video_model.use_graphs()
        # On a CPU there are none, and it says so.
        assert row(tiny, "CUDA graphs").runs == "none"
        assert "cpu" in row(tiny, "CUDA graphs").why.lower()
    finally:
        tiny.model.video_model.use_graphs(None)


def test_prefixes(tiny, monkeypatch):
    assert row(tiny, "prefill").runs == "what prompts about a video begin with, once"
    assert row(tiny.model, "prefill") == row(tiny, "prefill")
    monkeypatch.setattr(tiny.model.generation_config, "num_beams", 4)
    assert row(tiny, "prefill").runs == "each prompt from its start"
    assert row(tiny, "prefill").why == "num_beams is 4"


def test_the_cache(tiny, clips, tmp_path):
    assert row(tiny, "cache").runs == "none"
    try:
        for folder, where in ((None, "memory"), (tmp_path, "memory and disk")):
            tiny.cache = VideoCache(folder=folder)
            tiny.encode(clips[2])
            tiny.encode(clips[2])
            found = row(tiny, "cache")
            assert (found.runs, found.where) == ("tokens of each video", where)
            assert found.why.startswith("1 hits (0 from disk), 1 misses; 1 in memory, 0.1 of 1073.7 MB")
            assert (str(tmp_path) in found.why) == (folder is not None)
    finally:
        tiny.cache = None


def test_memory_of_a_cpu_is_not_measured(tiny, clips):
    tiny.generate(clips[2], prompt(tiny, QUESTIONS[0]), **GREEDY)
    assert tiny.last_memory == {}
    found = row(tiny, "peak memory")
    assert (found.runs, found.why) == ("not measured", "of GPUs only, unless MervModel.host_memory is set")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count")
def test_memory_of_the_process(tiny, clips):
    tiny.host_memory = True
    try:
        assert row(tiny, "peak memory").why == "neither answer nor encode was called yet"
        tiny.encode(clips[2])
        assert list(tiny.last_memory) == ["decode", "prepare", "encode", "fuse"]
        tiny.generate(clips[2], prompt(tiny, QUESTIONS[0]), **GREEDY)
        assert list(tiny.last_memory)[-1] == "generate"
        found = row(tiny, "peak memory")
        assert found.runs.startswith("decode ")
        assert found.why.startswith("of the process")
    finally:
        tiny.host_memory, tiny.last_memory = False, {}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count")
def test_each_stage_of_a_process_has_its_own_peak():
    timer = StageTimer(torch.device("cpu"), host_memory=True)
    with timer.stage("small"):
        pass
    with timer.stage("large"):
        torch.ones(1 << 28, dtype=torch.uint8)
    with timer.stage("after"):
        pass
    before, most, after = (timer.peak_bytes[name] >> 20 for name in ("small", "large", "after"))
    assert before + 200 < most < before + 400
    assert after < most - 200


def test_a_process_whose_peak_cannot_be_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(peaks, "PROCESS", tmp_path / "nothing")
    timer = StageTimer(torch.device("cpu"), host_memory=True)
    with timer.stage("decode"):
        pass
    assert timer.peak_bytes == {}


def test_peaks_of_several_gpus_are_added(monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", started.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: 1 << gpu.index)
    gpus = [torch.device("cuda", index) for index in (0, 2, 0)]
    memory = peaks.PeakMemory([*gpus, torch.device("cpu")])
    memory.start()
    assert started == gpus[:2]
    assert memory.read() == 5


def test_a_stage_counts_its_own_peak(gpu):
    timer = StageTimer(torch.device("cuda"))
    with timer.stage("decode"):
        gpu.append("work")
    # What was queued before is done before the count starts, and what the stage queued before it is read.
    assert gpu == ["wait", "reset", "work", "wait", "max"]
    with pytest.raises(RuntimeError), timer.stage("encode"):
        raise RuntimeError
    with timer.stage("decode"):
        pass
    assert timer.peak_bytes == {"decode": 3 << 20, "encode": 2 << 20}
    gpu.clear()
    with timer.stage("encode"):
        pass
    assert timer.peak_bytes["encode"] == 2 << 20  # 1 MiB this time


def test_on_a_cpu_nothing_is_asked(gpu):
    timer = StageTimer(torch.device("cpu"))
    with timer.stage("decode"):
        pass
    assert gpu == []
    assert timer.peak_bytes == {}


def test_the_most_of_each_stage_is_kept(tiny, clips, monkeypatch):
    """Over the batches of a call, and of the last call only."""
    peaks = iter([(5, 1), (3, 7), (2, 2)])

    class Played(StageTimer):
        def __init__(self, device, others=(), *, host_memory=False):
            super().__init__(device)
            self.peak_bytes = {stage: peak << 20 for stage, peak in zip(("decode", "encode"), next(peaks), strict=True)}

    monkeypatch.setattr(merv_model, "StageTimer", Played)
    text = prompt(tiny, QUESTIONS[0])
    try:
        tiny.generate(clips[:2], text, batch_size=1, **GREEDY)
        assert tiny.last_memory == {"decode": 5 << 20, "encode": 7 << 20}
        monkeypatch.setattr(MervModel, "device", property(lambda self: torch.device("cuda:0")))
        _, found = _between_calls(tiny)
        assert (found.runs, found.where) == ("decode 5 MiB, encode 7 MiB", "cuda:0")
        monkeypatch.undo()
        monkeypatch.setattr(merv_model, "StageTimer", Played)
        tiny.generate(clips[0], text, **GREEDY)
        assert tiny.last_memory == {"decode": 2 << 20, "encode": 2 << 20}
    finally:
        tiny.last_memory = {}


def test_before_the_first_answer_nothing_is_known(tiny, monkeypatch):
    monkeypatch.setattr(MervModel, "device", property(lambda self: torch.device("cuda:0")))
    monkeypatch.setattr(tiny, "last_memory", {})
    _, found = _between_calls(tiny)
    assert (found.runs, found.why) == ("not measured", "neither answer nor encode was called yet")
