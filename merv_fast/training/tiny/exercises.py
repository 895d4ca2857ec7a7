"""Multiple choice without a video: which letter stands for an option, and which option a letter stands for."""

from __future__ import annotations

import numpy as np

from merv_fast.training.tiny.questions import CORNERS, NAMES, NUMBERS, UNKNOWN, Question
from merv_fast.training.tiny.scenes import CAMERAS, COLOURS, DIRECTIONS, SHAPES

__all__ = ["exercises"]

OPTIONS = (
    tuple(COLOURS),
    SHAPES,
    tuple(DIRECTIONS),
    NUMBERS,
    CORNERS,
    NAMES,
    ("before", "after"),
    ("moving", "static"),
    CAMERAS,
)


def exercises(rng: np.random.Generator, count: int) -> list[Question]:
    """``count`` questions whose text tells the answer."""
    return [exercise(rng) for _ in range(count)]


def exercise(rng: np.random.Generator) -> Question:
    """Either "red?", which asks for a letter, or "B?", which asks for an option."""
    alike = OPTIONS[rng.integers(len(OPTIONS))]
    options = [*(alike[place] for place in rng.choice(len(alike), 2, replace=False)), UNKNOWN]
    options = [options[place] for place in rng.permutation(3)]
    lettered = dict(zip("ABC", options, strict=True))
    lines = [f"{letter}. {option}" for letter, option in lettered.items()]
    letter, option = list(lettered.items())[rng.integers(3)]
    asked, answer = (option, letter) if rng.random() < 0.5 else (letter, option)
    return Question("exercise", "\n".join([f"{asked}?", *lines]), answer, 1 / 3)
