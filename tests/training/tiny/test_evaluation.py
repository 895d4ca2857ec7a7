"""Held-out questions: as many of each kind, about clips that are not those of training; and what guessing gets."""

import json
from collections import Counter
from math import sqrt

import numpy as np
import pytest

from merv_fast.training.tiny.__main__ import main, write_examples
from merv_fast.training.tiny.answering import Score
from merv_fast.training.tiny.evaluation import Asked, Blind, held_out_questions, is_new, plan, scores
from merv_fast.training.tiny.questions import KINDS, UNKNOWN, Question, questions_about
from merv_fast.training.tiny.scenes import draw_scene
from merv_fast.video import open_video


def training_questions(scenes):
    for index in range(scenes):
        rng = np.random.default_rng([1, index])
        yield from questions_about(draw_scene(rng, training=True), rng)


def test_as_many_questions_of_each_kind():
    planned = plan(220, seed=2, training=False)
    kinds = Counter(question.kind for questions in planned.values() for question in questions)
    assert kinds == dict.fromkeys(KINDS, 20)
    assert planned == plan(220, seed=2, training=False) != plan(220, seed=3, training=False)


def test_clips_are_new_and_answer_their_questions(tmp_path):
    asked = held_out_questions(tmp_path / "new", 22, seed=2, processes=1)
    assert len(asked) == 22
    assert all(len(open_video(each.clip)) >= 16 for each in asked)
    scenes = [draw_scene(np.random.default_rng([2, int(each.clip.stem.split("-")[1])]), False) for each in asked]
    assert [each.new for each in asked] == [is_new(scene) for scene in scenes]


def test_scores_count_what_matches():
    def asked(kind, answer, new=False):
        return Asked("clip", Question(kind, "?", answer, 0.5), new)

    some = [asked("colour", "red"), asked("colour", "blue", new=True), asked("camera", "A")]
    found = scores(some, ["red ", "Blue", "A"])
    assert found["colour"] == Score(2, 1, 1.0)
    assert found["new"] == Score(1, 0, 0.5)
    assert found["all"] == Score(3, 2, 1.5)
    with pytest.raises(ValueError, match="zip"):
        scores(some, ["red"])


def test_guessing_stays_at_chance():
    blind = Blind(list(training_questions(3000)))
    asked = [question for questions in plan(1650, 2, False).values() for question in questions]
    right = sum(blind.answer(question) == question.answer for question in asked)
    chances = [question.chance for question in asked]
    assert right < sum(chances) + 4 * sqrt(sum(chance * (1 - chance) for chance in chances))
    # It does know what can be the answer to what.
    assert right > 0.6 * sum(chances)


def test_guessing_finds_what_can_be_guessed():
    known = [Question("colour", "What colour is the star?", answer, 0.5) for answer in ["red"] * 40 + ["blue"] * 20]
    blind = Blind(known)
    assert blind.answer(Question("colour", "What colour is the star?", "?", 0.5)) == "red"
    assert blind.answer(Question("colour", "What colour is the cross?", "?", 0.5)) == "red"


def test_examples_are_one_of_each_kind_that_is_answered_rightly(tmp_path):
    asked = held_out_questions(tmp_path / "new", 165, seed=2, processes=1)
    answers = [each.question.answer for each in asked]
    wrong = next(place for place, answer in enumerate(answers) if answer != UNKNOWN)
    answers[wrong] = "nothing"
    write_examples(tmp_path / "chosen", asked, answers)
    rows = json.loads((tmp_path / "chosen/questions.json").read_text())
    assert [row["kind"] for row in rows] == list(KINDS)
    assert [row["answer"] in "ABC" for row in rows] == [bool(place % 2) for place in range(len(rows))]
    assert all(open_video(tmp_path / "chosen" / row["clip"]).fps > 0 for row in rows)
    assert len({(tmp_path / "chosen" / row["clip"]).read_bytes() for row in rows}) == len(rows)
    assert UNKNOWN not in [row["answer"] for row in rows]
    assert asked[wrong].question.text not in [row["question"] for row in rows]


def test_a_command_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        main(["ask"])
    assert "invalid choice" in capsys.readouterr().err
