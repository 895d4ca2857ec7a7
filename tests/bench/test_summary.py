"""bench.summary: at most 39 lines, whatever there is, and exit code 1 where a stage failed."""

import json
from dataclasses import replace

import pytest

from bench.summary import MOST, main, summarise
from bench.table import append
from tests.bench.test_table import ROW


def results(folder, stages, targets=(), failures=()):
    (folder / "stages.txt").write_text("".join(f"{name} {code} 12\n" for name, code in stages))
    about = {"device": "a GPU", "torch": "2.11", "triton": "3.6", "commit": "0123456789abcdef", "date": "2026-11-22"}
    (folder / "kernels.json").write_text(
        json.dumps(about | {"targets": list(targets), "failures": list(failures), "left_out": []})
    )
    return folder


def target(verdict, measured=1.5):
    return {"name": "tail", "asked": 1.2, "at_most": True, "measured": measured, "verdict": verdict}


def test_everything_right(tmp_path, capsys):
    results(tmp_path, [("tests", 0), ("bench", 0)], [target("met"), target("missed"), target("not measured", None)])
    (tmp_path / "tests.log").write_text("....\n812 passed in 3.0s\n")
    append(tmp_path / "bench.csv", [replace(ROW, p50=1.5), replace(ROW, impl="eager", p50=2.0, p80=3.0)])
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for line in (
        "tests          ok           12 s  812 passed in 3.0s",
        "a GPU, torch 2.11, triton 3.6, commit 0123456789ab, 2026-11-22",
        "targets of the kernels: 1 met, 1 missed, 1 not measured",
        "  missed: tail: <= 1.2, got 1.50",
        "  not measured: front end, B=1: eager over it: >= 10",
        "pool_tokens, 16x16x1024, B=1: 1.500 ms; eager x1.33",
    ):
        assert line in text.splitlines(), text


@pytest.mark.parametrize(("code", "word"), [("1", "FAILED 1"), ("124", "cut short"), ("127", "not there")])
def test_a_stage_that_failed(tmp_path, capsys, code, word):
    results(tmp_path, [("tests", 0), ("memcheck", code)])
    (tmp_path / "memcheck.log").write_text("FAILED tests/x.py::test_y - off\nERROR SUMMARY: 3 errors\n")
    assert main([str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert word in text
    assert "FAILED tests/x.py::test_y - off" in text


def test_much_of_everything_is_cut(tmp_path):
    stages = [(f"stage{i}", "1") for i in range(14)]
    results(tmp_path, stages, [target("missed")] * 30, [f"case {i}: off" for i in range(30)])
    for name, _ in stages:
        (tmp_path / f"{name}.log").write_text("FAILED test\n" * 30)
    (tmp_path / "tune.log").write_text("a: best b\n" * 30)
    append(tmp_path / "bench.csv", [replace(ROW, case=f"B={B}") for B in range(30)])
    lines, right = summarise(tmp_path)
    assert not right
    assert len(lines) <= MOST == 39
    for text in ("and 24 more", "and 27 more"):
        assert any(text in line for line in lines), lines


def test_nothing_was_left(tmp_path):
    (tmp_path / "stages.txt").write_text("kernels 124 3\n")
    lines, right = summarise(tmp_path)
    assert not right
    assert "bench.kernels left no results" in lines
    assert "pytest bench/ --benchmark left no results" in lines
