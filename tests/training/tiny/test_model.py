"""merv-tiny's tokenizer: answers are whole, and any text comes back as it was."""

import numpy as np
import pytest

from merv_fast.training.tiny.model import tiny_tokenizer
from merv_fast.training.tiny.questions import CORNERS, NAMES, NUMBERS, UNKNOWN, questions_about
from merv_fast.training.tiny.scenes import CAMERAS, COLOURS, DIRECTIONS, SHAPES, draw_scene


@pytest.fixture(scope="module")
def texts():
    found = []
    for index in range(400):
        rng = np.random.default_rng([5, index])
        found += [f"In: {q.text}\nOut: {q.answer}" for q in questions_about(draw_scene(rng, False), rng)]
    return found


@pytest.fixture(scope="module")
def tokenizer(texts):
    return tiny_tokenizer(texts)


def test_an_answer_is_one_token(tokenizer):
    for answer in (*CORNERS, *CAMERAS, *COLOURS, *SHAPES, *DIRECTIONS, *NUMBERS, UNKNOWN, "before", "moving", "A"):
        assert len(tokenizer.tokenize(f" {answer}")) == 1, answer
    for name in NAMES:
        assert len(tokenizer.tokenize(f" {name}")) == 2, name


def test_what_begins_like_an_answer_is_not_cut(tokenizer):
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in pieces(" Ared upper")] == ["ĠAredĠupper"]
    assert [piece for piece, _ in pieces(" A upper")] == ["ĠA", "Ġupper"]


def test_a_question_is_as_long_with_its_answer_as_without(tokenizer, texts):
    for text in texts:
        question, answer = text.split("\nOut:")
        prompt = tokenizer(f"{question}\nOut:").input_ids
        assert tokenizer(text).input_ids[: len(prompt)] == prompt
        assert 1 <= len(tokenizer(text).input_ids) - len(prompt) <= 3, answer


def test_questions_are_short(tokenizer, texts):
    assert np.mean([len(tokenizer.tokenize(text)) for text in texts]) < 10


def test_any_text_comes_back(tokenizer, texts):
    for text in [*texts[:50], "Wer läuft dort? 走 \t  red  circles, A.B. Ared"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
