"""What the whole model's times should be, from the rows of a table."""

from dataclasses import replace

import pytest

from bench.cases import EAGER, OURS
from bench.encoders import GRAPHED, TRANSFORMERS
from bench.targets import Target, of_the_model
from tests.bench.test_table import ROW


def row(op, case, impl, p50, percent=None):
    return replace(ROW, op=op, case=case, impl=impl, p20=p50, p50=p50, p80=p50, percent_of_roof=percent)


def test_verdicts():
    assert str(Target("a", 1.25, 1.2, at_most=True)) == "missed: a: <= 1.2, got 1.25"
    assert str(Target("a", 1.25, 1.2)) == "met: a: >= 1.2, got 1.25"
    assert str(Target("a", None, 10)) == "not measured: a: >= 10"


def test_of_nothing():
    assert [target.verdict for target in of_the_model([])] == ["not measured"] * 5


def test_the_best_of_our_ways_counts():
    rows = [
        row("encoders", "all four, 224 px, B=1", OURS, 12.0, 50.0),
        row("encoders", "all four, 224 px, B=1", GRAPHED, 10.0, 60.0),
        row("encoders", "all four, 224 px, B=1", EAGER, 30.0, 20.0),
        row("encoders", "all four, 224 px, B=8", OURS, 90.0, 69.0),
        row("encoder", "dinov2, 224 px, B=1", OURS, 1.0, 99.0),
        row("front end", "720p, 224 px, B=1", EAGER, 200.0),
        row("front end", "720p, 224 px, B=1", TRANSFORMERS, 1.0),
        row("front end", "720p, 224 px, B=1", GRAPHED, 16.0),
        row("front end", "720p, 224 px, B=1", OURS, 25.0),
        row("front end and decoding", "the bundled clip, B=1", OURS, 25.0),
        row("answer", "128 tokens, B=1", OURS, 300.0, 40.0),
        row("answer", "128 tokens, B=1", "merv_fast, static cache, compiled", 130.0, 80.0),
    ]
    found = [(target.measured, target.verdict) for target in of_the_model(rows)]
    assert found == [
        (60.0, "met"),
        (69.0, "missed"),
        (12.5, "met"),
        (None, "not measured"),
        (pytest.approx(1.25), "met"),
    ]
