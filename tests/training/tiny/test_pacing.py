"""What is answered badly is asked about more often."""

import numpy as np
import pytest
import torch

from merv_fast.models.splice import IGNORE_INDEX
from merv_fast.training.tiny.pacing import EASY, MEMORY, Pace
from merv_fast.training.tiny.packing import Rows
from merv_fast.training.tiny.questions import Question

FREE, CHOICE = Question("colour", "What?", "red", 0.2), Question("colour", "What?\nA. red", "A", 0.5)
OTHER = Question("order", "Which?", "red", 0.5)


def rows(labels, owners):
    labels, owners = torch.tensor(labels), torch.tensor(owners)
    return Rows(torch.zeros_like(labels), labels, torch.zeros_like(labels), owners)


def test_losses_are_of_the_questions_whose_tokens_they_are_of():
    no = IGNORE_INDEX
    packed = rows(
        [[no, no, 5, 2, no, 7, 2], [no, no, no, 6, no, no, no]], [[0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, -1, -1, -1]]
    )
    pace = Pace()
    pace.note([[FREE, CHOICE], [OTHER]], packed, torch.tensor([2.0, 2.0, 3.0, 3.0, 4.0]))
    step = 1 / MEMORY
    twice = 1 - (1 - step) ** 2
    assert pace.losses == pytest.approx(
        {("colour", False): 1 + twice * 1, ("colour", True): 1 + twice * 2, ("order", False): 1 + step * 3}
    )


def test_hard_forms_are_asked_more_often():
    rng, pace = np.random.default_rng(0), Pace()
    pace.losses |= {("colour", False): 0.9, ("colour", True): 0.3, ("order", False): 0.0}
    first = [pace.choose([OTHER, CHOICE, FREE], 1, rng)[0] for _ in range(5000)]
    total = 0.9 + 0.3 + EASY
    for question, weight in ((FREE, 0.9), (CHOICE, 0.3), (OTHER, EASY)):
        assert first.count(question) / 5000 == pytest.approx(weight / total, abs=0.02)


def test_no_question_is_asked_twice_and_none_of_a_clip_that_has_none():
    rng, pace = np.random.default_rng(0), Pace()
    questions = [FREE, CHOICE, OTHER]
    assert sorted(map(str, pace.choose(questions, 9, rng))) == sorted(map(str, questions))
    assert len(pace.choose(questions, 2, rng)) == 2
    assert pace.choose([], 9, rng) == []
