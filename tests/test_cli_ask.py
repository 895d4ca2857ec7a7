"""ask: text as it comes, and windows of long videos."""

import json
import sys

import pytest
from typer.testing import CliRunner

from merv_fast import sample_clip
from merv_fast.cli.app import app, main

runner = CliRunner()
ASK = ["ask", str(sample_clip()), "What happens?", "--max-new-tokens", "6", "--device", "cpu"]


def test_a_streamed_answer_is_printed_once():
    (answer,) = {json.loads(runner.invoke(app, [*ASK, "--json"]).stdout)["answer"] for _ in range(2)}
    plain, streamed = runner.invoke(app, ASK).stdout, runner.invoke(app, [*ASK, "--stream"]).stdout
    assert plain.count(answer) == streamed.count(answer) == 1
    assert streamed.splitlines()[0].strip() == answer
    assert "weight of each encoder" in streamed
    assert "total" in streamed


def test_text_comes_before_the_answer_is_complete(monkeypatch, random_merv):
    """Each piece is out when the next one is made."""
    from transformers import TextStreamer

    import merv_fast.cli.ask as command

    seen, put = [], TextStreamer.on_finalized_text
    monkeypatch.setattr(
        command.TextStreamer,
        "on_finalized_text",
        lambda self, text, stream_end=False: seen.append((text, stream_end)) or put(self, text, stream_end),
    )
    assert runner.invoke(app, [*ASK, "--stream", "--model", str(random_merv)]).exit_code == 0
    assert [end for _, end in seen] == [False] * 6 + [True]
    assert sum(bool(text) for text, _ in seen) > 1


def test_a_stream_is_no_json():
    done = runner.invoke(app, [*ASK, "--stream", "--json"])
    assert done.exit_code == 2
    assert "--stream must be left out with --json" in done.stderr


def test_windows_are_listed():
    answer = json.loads(runner.invoke(app, [*ASK, "--json", "--windows", "4"]).stdout)
    assert list(answer) == ["answer", "encoder_weights", "timings_ms", "model", "device", "windows"]
    assert [(w["start"], w["end"]) for w in answer["windows"]] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    for name, weight in answer["encoder_weights"].items():
        assert weight == pytest.approx(sum(w["encoder_weights"][name] for w in answer["windows"]) / 4)
    shown = runner.invoke(app, [*ASK, "--windows", "4"], env={"COLUMNS": "120"}).stdout
    assert all(bounds in shown for bounds in ("0.0-1.0", "1.0-2.0", "2.0-3.0", "3.0-4.0"))
    assert "each window" not in runner.invoke(app, ASK).stdout


def test_too_many_windows_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["merv-fast", *ASK, "--windows", "99"])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 1
    assert captured.out == ""
    assert captured.err.startswith(
        "error: generate: windows must be at most 31 for the language model's 4096 positions"
    )
    assert runner.invoke(app, [*ASK, "--windows", "0"]).exit_code == 2
