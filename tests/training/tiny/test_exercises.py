"""Exercises: the text tells the answer, and nothing else about it does."""

from collections import Counter

import numpy as np

from merv_fast.training.tiny.exercises import exercises
from merv_fast.training.tiny.questions import UNKNOWN


def test_answers_are_in_the_text():
    found = exercises(np.random.default_rng(0), 600)
    counts, places = Counter(), Counter()
    for each in found:
        asked, *lines = each.text.split("\n")
        options = dict(line.split(". ", 1) for line in lines)
        assert list(options) == ["A", "B", "C"]
        assert len(set(options.values())) == 3
        unknown = next(letter for letter, option in options.items() if option == UNKNOWN)
        places[unknown] += 1
        word = asked.removesuffix("?")
        if word in options:
            assert each.answer == options[word]
            counts["letter", word] += 1
        else:
            assert options[each.answer] == word
            counts["option", each.answer] += 1
    assert len(counts) == 6
    assert min(counts.values()) > 70
    assert min(places[letter] for letter in "ABC") > 160
