"""Runs over a small data set: batches, parts, interruptions, bad videos, scores."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from merv_fast import load_vid, sample_clip
from merv_fast.cli.app import app
from merv_fast.integrations.evaluation.predictions import Predictions
from merv_fast.integrations.evaluation.questions import read_questions
from merv_fast.integrations.evaluation.run import evaluate, part_of, prompt_of, score
from tests.models.conftest import write_clip

GREEDY = {"max_new_tokens": 4, "do_sample": False}
SETTINGS = {"model": "merv-tiny"}


@pytest.fixture(scope="module")
def tiny():
    return load_vid("merv-tiny")


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    """Seven questions about two videos and parts of them; every second answer is what the model says."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "videos").mkdir()
    shutil.copy(sample_clip(), folder / "videos/one.mp4")
    write_clip(folder / "videos/two.mp4", frames=30)
    questions, answers = [], []
    for place in range(7):
        entry = {"question_id": f"q{place}", "video_name": ("one", "two")[place % 2], "question": f"What is {place}?"}
        if place > 4:
            entry |= {"options": ["a", "b", "c"], "num_option": 3}
        if place in (2, 5):
            entry |= {"time": [0.5, 2.0]}
        questions.append(entry)
        answers.append({"question_id": f"q{place}", "answer": "?", "answer_id": 0})
    save(folder, questions, answers)
    for question, answer in list(zip(read_questions(folder), answers, strict=True))[::2]:
        if not question.is_choice:
            clip = dict(question.clip)
            answer["answer"] = tiny.generate(question.video, prompt_of(tiny, question.text), **clip, **GREEDY)
    save(folder, questions, answers)
    return folder


def save(folder, questions, answers):
    (folder / "test_q.json").write_text(json.dumps(questions))
    (folder / "test_a.json").write_text(json.dumps(answers))


def run(tiny, data, out, part=(0, 1), **kwargs):
    predictions = Predictions(out, part, SETTINGS)
    counts = []
    try:
        questions = read_questions(data)
        evaluate(tiny, part_of(questions, *part), predictions, each=counts.append, **GREEDY, **kwargs)
        return score(questions, predictions), predictions.done(), counts
    finally:
        predictions.close()


@pytest.fixture(scope="module")
def whole(tiny, data, tmp_path_factory):
    """Predictions of a run at one go."""
    return run(tiny, data, tmp_path_factory.mktemp("whole"))


def test_answers_are_those_of_one_question_at_a_time(tiny, data, whole):
    result, done, counts = whole
    for question in read_questions(data):
        alone = tiny.generate(question.video, prompt_of(tiny, question.text), **dict(question.clip), **GREEDY)
        assert done[question.key]["pred"] == alone
        assert done[question.key]["message"] == question.text
    assert (result.right, result.answered, result.missing, result.failed) == (3, 7, 0, {})
    assert result.accuracy == 3 / 7
    assert sum(counts) == 7


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_change_nothing(tiny, data, whole, tmp_path, batch_size):
    assert run(tiny, data, tmp_path, batch_size=batch_size)[1] == whole[1]


def test_parts_come_together(tiny, data, whole, tmp_path):
    seen = [run(tiny, data, tmp_path, (number, 3))[0] for number in range(3)]
    assert [each.missing for each in seen] == [4, 1, 0]
    assert seen[-1].accuracy == whole[0].accuracy
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"pred_3_0.jsonl", "pred_3_1.jsonl", "pred_3_2.jsonl"}
    # Another division into parts finds all that there is.
    assert run(tiny, data, tmp_path, (0, 1))[2] == [7]


def test_a_run_goes_on_where_it_was_killed(tiny, data, whole, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    calls = []
    generate = type(tiny).generate

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return generate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny), "generate", dies)
        with pytest.raises(Killed):
            run(tiny, data, tmp_path, batch_size=2)
    path = tmp_path / "pred_1_0.jsonl"
    kept = path.read_text().splitlines()
    assert 0 < len(kept) < 7
    path.write_text("\n".join(kept) + '\n{"question_id": "q6", "pr')
    result, done, counts = run(tiny, data, tmp_path, batch_size=2)
    assert counts[0] == len(kept)
    assert done == whole[1]
    assert len(path.read_text().splitlines()) == 7
    assert result.accuracy == whole[0].accuracy


def test_a_bad_video_stops_nothing(tiny, data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    good = (folder / "videos/two.mp4").read_bytes()
    (folder / "videos/two.mp4").write_bytes(b"no video")
    result, done, _ = run(tiny, folder, tmp_path / "out")
    assert set(result.failed) == {"q1", "q3", "q5"}
    assert "two.mp4" in result.failed["q1"]
    assert (result.answered, result.missing) == (4, 0)
    assert result.accuracy == 3 / 7
    # They are asked again once the video is there.
    (folder / "videos/two.mp4").write_bytes(good)
    result, done, counts = run(tiny, folder, tmp_path / "out")
    assert counts[0] == 4
    assert not result.failed
    assert len(done) == result.answered == 7


def test_a_folder_belongs_to_one_run(tmp_path):
    first = Predictions(tmp_path, (0, 1), {"model": "a", "dtype": "auto"})
    with pytest.raises(RuntimeError, match="another process must not be writing"):
        Predictions(tmp_path, (0, 1), {"model": "a", "dtype": "auto"})
    Predictions(tmp_path, (1, 2), {"model": "a", "dtype": "auto"}).close()
    first.close()
    with pytest.raises(ValueError, match="a run must keep its settings, there are predictions with model 'a'"):
        Predictions(tmp_path, (0, 1), {"model": "b", "dtype": "auto"})


def test_a_row_holds_any_text(tmp_path):
    predictions = Predictions(tmp_path, (0, 1), SETTINGS)
    row = {"question_id": "q", "pred": "one\u2028two\x85three\nfour\x0bfive"}
    predictions.add(row)
    predictions.add({"question_id": "r", "pred": ""})
    assert list(predictions.rows()) == [row, {"question_id": "r", "pred": ""}]
    predictions.close()


def test_no_such_part():
    with pytest.raises(ValueError, match=r"chunk_idx must lie in 0\.\.2, got 3"):
        part_of([], 3, 3)


def test_the_command(data, tmp_path):
    words = ["eval", str(data), "--out", str(tmp_path), "--max-new-tokens", "4"]
    half = CliRunner().invoke(app, [*words, "--num-chunks", "2"])
    assert half.exit_code == 0, half.output
    assert "3 of 7 questions are left to other processes" in half.stderr
    assert not (tmp_path / "accuracy.json").exists()
    done = CliRunner().invoke(app, [*words, "--num-chunks", "2", "--chunk-idx", "1"])
    assert done.stdout.strip().startswith("accuracy 0.429 (3 of 7")
    assert "merv-tiny knows clips of coloured shapes and nothing else" in done.stderr
    assert json.loads((tmp_path / "accuracy.json").read_text())["right"] == 3
    as_json = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(as_json.stdout)["accuracy"] == 3 / 7
