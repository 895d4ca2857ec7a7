"""Ask a model every question of a data set, in batches, and count the right answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from merv_fast.errors import VideoError
from merv_fast.integrations.evaluation.predictions import Predictions
from merv_fast.integrations.evaluation.questions import Question
from merv_fast.models import MervModel

__all__ = ["Score", "evaluate", "part_of", "prompt_of", "score"]


@dataclass(frozen=True)
class Score:
    """What came out so far.

    Args:
        right: questions answered rightly.
        answered: questions with an answer.
        failed: reason by question, of those whose video cannot be read; they count as wrong.
        missing: questions that no process has come to yet.
    """

    right: int
    answered: int
    failed: dict[str, str]
    missing: int

    @property
    def accuracy(self) -> float:
        """Of the questions that have been asked."""
        asked = self.answered + len(self.failed)
        return self.right / asked if asked else 0.0


def part_of(questions: Sequence[Question], number: int, parts: int) -> list[Question]:
    """The share of one of several processes: consecutive questions, as in the reference."""
    if not 0 <= number < parts:
        raise ValueError(f"eval: chunk_idx must lie in 0..{parts - 1}, got {number}")
    size = -(-len(questions) // parts)
    return list(questions[number * size : (number + 1) * size])


def batches(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """Questions about the same part of a video lie side by side: the model encodes it once."""
    ordered = sorted(questions, key=lambda question: (question.clip, str(question.video)))
    for _, alike in groupby(ordered, key=lambda question: question.clip):
        group = list(alike)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def evaluate(
    model: MervModel,
    questions: Sequence[Question],
    predictions: Predictions,
    *,
    batch_size: int = 8,
    each: Callable[[int], None] = lambda count: None,
    **generation: Any,
) -> None:
    """Answer those questions that have no answer yet; a video that cannot be read is a row with an error.

    Args:
        model: asked.
        questions: this process's.
        predictions: where answers are found and kept.
        batch_size: questions that are asked together.
        each: called with the number of questions of every batch that is done.
        generation: for ``MervModel.answer``.
    """
    done = predictions.done()
    left = [question for question in questions if "pred" not in done.get(question.key, {})]
    each(len(questions) - len(left))
    for batch in batches(left, batch_size):
        for row in answered(model, batch, generation):
            predictions.add(row)
        each(len(batch))


def answered(model: MervModel, batch: Sequence[Question], generation: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a batch; if a video in it is bad, of one question after the other."""
    prompts = [prompt_of(model, question.text) for question in batch]
    videos = [question.video for question in batch]
    clip: dict[str, Any] = dict(batch[0].clip)
    try:
        texts = model.generate(videos, prompts, batch_size=len(batch), **clip, **generation)
    except VideoError as error:
        if len(batch) > 1:
            return [row for question in batch for row in answered(model, [question], generation)]
        return [{**batch[0].row, "error": str(error)}]
    return [
        {**question.row, "pred": text, "message": question.text, "right_answer": question.answer}
        for question, text in zip(batch, texts, strict=True)
    ]


def prompt_of(model: MervModel, text: str) -> str:
    """The question in the format of the language model."""
    builder = model.get_prompt_builder()
    builder.add_turn(role="human", message=text)
    return builder.get_prompt()


def score(questions: Sequence[Question], predictions: Predictions) -> Score:
    """Of all questions and all processes."""
    done = predictions.done()
    rows = [(question, done[question.key]) for question in questions if question.key in done]
    texts = [(question, row["pred"]) for question, row in rows if "pred" in row]
    failed = {question.key: row["error"] for question, row in rows if "pred" not in row}
    right = sum(question.is_right(text) for question, text in texts)
    return Score(right, len(texts), failed, len(questions) - len(rows))
