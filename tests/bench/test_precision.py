"""Errors of precisions are in the order that they must have, and float32 has none."""

import pytest
import torch

from bench import precision
from merv_fast.assets import examples


def test_each_precision(monkeypatch):
    monkeypatch.setattr(precision, "take_turns", lambda ways, device, least: [[1.0, 2.0, 3.0]] * len(ways))
    found = {outcome.precision: outcome for outcome in precision.measure("cpu")}
    assert list(found) == ["float32", *precision.PRECISIONS]
    assert (found["float32"].tokens, found["float32"].shares, set(found["float32"].features.values())) == (0, 0, {0.0})
    # Steps of 2 ** -11, 2 ** -8 and 2 ** -4.
    for encoder in found["fp8"].features:
        errors = [found[name].features[encoder] for name in ("float16", "bfloat16", "fp8")]
        assert errors == sorted(errors)
        assert 0 < errors[0] < 0.005 < errors[2] < 0.1
    assert all(outcome.milliseconds == 2.0 for outcome in found.values())


def test_apart():
    x = torch.tensor([3.0, 4.0])
    assert abs(precision.apart(x * 1.1, x) - 0.1) < 1e-6


def test_trained_weights(monkeypatch):
    pytest.importorskip("av")
    monkeypatch.setattr(precision, "take_turns", lambda ways, device, least: [[1.0, 2.0, 3.0]] * len(ways))
    few = examples()[:3]
    monkeypatch.setattr(precision, "examples", lambda: few)
    found = {outcome.precision: outcome for outcome in precision.measure_trained("cpu")}
    assert list(found) == ["float32", *precision.PRECISIONS]
    assert found["float32"].right == len(few)
    assert 0 == found["float32"].shares < found["float16"].shares < found["bfloat16"].shares < 0.05
    assert all(0 < outcome.right <= len(few) for outcome in found.values())
