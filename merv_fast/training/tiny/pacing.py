"""Which questions to ask: more of those that are still answered badly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from merv_fast.models.splice import IGNORE_INDEX
from merv_fast.training.tiny.packing import Rows
from merv_fast.training.tiny.questions import Question

__all__ = ["Pace"]

EASY = 0.05
"""Loss from which on questions are not asked any less often."""
MEMORY = 100
"""Questions of a form over which its loss is averaged, roughly."""


class Pace:
    """The loss of late of each form of question, free or multiple choice of each kind, and a choice by it."""

    def __init__(self) -> None:
        self.losses: dict[tuple[str, bool], float] = defaultdict(lambda: 1.0)

    def choose(self, questions: Sequence[Question], most: int, rng: np.random.Generator) -> list[Question]:
        """At most so many of them, in random order, each as likely as the loss of its form is high."""
        weights = np.array([max(EASY, self.losses[form_of(question)]) for question in questions])
        count = min(most, len(questions))
        chosen = rng.choice(len(questions), count, replace=False, p=weights / weights.sum()) if count else ()
        return [questions[place] for place in chosen]

    def note(self, asked: Sequence[Sequence[Question]], rows: Rows, losses: Tensor) -> None:
        """Learn how hard questions were.

        Args:
            asked: of each clip.
            rows: what they were packed to.
            losses: [answers' tokens], in the order of `run_rows`.
        """
        learned = rows.labels[:, 1:] != IGNORE_INDEX
        places = torch.stack([learned.nonzero()[:, 0], rows.owners[:, 1:][learned] - 1], 1)
        for (clip, number), loss in zip(places.tolist(), losses.tolist(), strict=True):
            form = form_of(asked[clip][number])
            self.losses[form] += (loss - self.losses[form]) / MEMORY


def form_of(question: Question) -> tuple[str, bool]:
    """Its kind, and whether it is multiple choice."""
    return question.kind, question.is_choice
