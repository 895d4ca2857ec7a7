"""The ways from the reference's to ours, and that one which is wrong is noticed."""

import pytest
import torch

from bench.cases import EAGER, MERV, OURS, Setup
from bench.comparison import Comparison
from bench.verify import WrongResult
from bench.waterfall import TECHNIQUES, Steps, entries, names


def test_every_technique_alone_and_in_order():
    ways = list(names().items())
    assert ways[0] == (EAGER, frozenset())
    assert [chosen for _, chosen in ways[1:6]] == [{each} for each in TECHNIQUES]
    assert [chosen for _, chosen in ways[6:]] == [set(TECHNIQUES[:count]) for count in range(2, 6)]
    assert ways[-1][0] == OURS


def test_a_technique_that_is_wrong_has_no_number(monkeypatch):
    pytest.importorskip("av")
    (entry,) = entries("cpu")
    assert entry.setup == Setup("cpu", torch.float32, MERV)
    comparison = Comparison(entry)
    assert comparison.verify(OURS) < 1e-4
    prepare = Steps.prepare
    monkeypatch.setattr(Steps, "prepare", lambda steps, frames: prepare(steps, frames.flip(2)))
    # It would resize mirrored frames; ours does not go through it.
    with pytest.raises(WrongResult, match="off by"):
        comparison.verify("decode")
