"""Peaks are those of the call alone, and nothing counts that is wrong."""

import sys

import pytest
import torch

from bench import memory
from bench.baselines import encode
from bench.cases import EAGER

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MIB = 2**20


@LINUX
def test_only_what_comes_after_it_counts():
    torch.ones(512 * MIB // 4)
    kept = torch.ones(64 * MIB // 4)
    start = memory.forget("cpu")
    torch.ones(128 * MIB // 4)
    assert 120 * MIB < memory.most("cpu") - start < 180 * MIB
    assert kept.sum() == kept.numel()


@LINUX
def test_what_was_freed_counts_when_it_is_used_again():
    def small():
        # Of this size memory is not given back when it is freed.
        return [torch.ones(16 * 1024) for _ in range(2000)]

    small()
    start = memory.forget("cpu")
    small()
    assert memory.most("cpu") - start > 110 * MIB


@LINUX
def test_a_video_at_a_time_takes_less():
    whole, one = (memory.in_process(way, 4, "cpu") for way in (EAGER, "merv_fast, a video at a time"))
    assert one.peak_bytes < 0.7 * whole.peak_bytes
    assert whole.results_bytes == one.results_bytes > MIB
    assert max(whole.error, one.error) < memory.CLOSE[torch.float32]


def test_wrong_features_are_noticed(monkeypatch):
    monkeypatch.setattr(memory, "forget", lambda device: 0)
    monkeypatch.setattr(memory, "most", lambda device: 1)
    monkeypatch.setattr(memory.baselines, "encode", lambda *given: [x + 1 for x in encode(*given)])
    assert memory.measure(EAGER, 1, "cpu").error > 0.01
