"""Questions: the answers are right by another reading of the scene, and cannot be guessed from the text."""

import re
from collections import Counter, defaultdict
from math import isfinite, sqrt

import numpy as np
import pytest

from merv_fast.training.tiny.questions import KINDS, UNKNOWN, questions_about
from merv_fast.training.tiny.scenes import COLOURS, SHAPES, draw_scene

NAME = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"


def asked(count, seed=3, training=True):
    """Scenes with their questions."""
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scene = draw_scene(rng, training)
        for question in questions_about(scene, rng):
            yield scene, question


@pytest.fixture(scope="module")
def many():
    return list(asked(2500))


def options(question):
    """The text without its options, the options by letter, and the answer's own words."""
    text, *lines = question.text.split("\n")
    given = dict(line.split(". ", 1) for line in lines)
    return text, given, given.get(question.answer, question.answer) if given else question.answer


def moment(scene, name, verb):
    """When a thing appears or vanishes."""
    (thing,) = (thing for thing in scene.things if thing.name == name)
    return thing.appears if verb.startswith("appear") else thing.vanishes


def find(scene, name):
    return next((thing for thing in scene.things if thing.name == name), None)


def truth(scene, text):
    """What is right, by reading the question's words."""
    names = [" ".join(found) for found in re.findall(NAME, text)]
    time = 1.0 if text.endswith("the end?") else 0.0
    if text.startswith("What does the camera"):
        return scene.camera
    if text.startswith("Is the camera"):
        return "static" if scene.camera == "static" else "moving"
    if text.startswith("How many"):
        word = text.split()[2].removesuffix("es" if "crosses" in text else "s")
        return ("one", "two", "three", "four")[sum(word in ("shape", thing.shape) for thing in scene.things) - 1]
    if text.startswith("What colour"):
        return next((thing.colour for thing in scene.things if f" {thing.shape}?" in text), UNKNOWN)
    if text.startswith("What shape"):
        return next((thing.shape for thing in scene.things if f" {thing.colour} thing" in text), UNKNOWN)
    if text.startswith("Which moves"):
        fast = max(names, key=lambda name: find(scene, name).distance)
        return fast if "faster" in text else next(name for name in names if name != fast)
    if text.startswith("Which way") and "move" in text:
        return find(scene, names[0]).direction if find(scene, names[0]) else UNKNOWN
    if text.startswith("Which way"):
        return find(scene, names[0]).pointing(time) if find(scene, names[0]) else UNKNOWN
    if text.startswith("Where"):
        if not find(scene, names[0]):
            return UNKNOWN
        x, y = find(scene, names[0]).place(time)
        return f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"
    if text.startswith("Does"):
        first, second = (
            moment(scene, name, verb) for name, verb in zip(names, re.findall("appear|vanish", text), strict=False)
        )
        return "before" if first < second else "after"
    verb = re.search("appear|vanish", text)[0]
    if text.startswith("Which"):
        return min(names, key=lambda name: moment(scene, name, verb))
    events = sorted(
        (time, thing.name, word)
        for thing in scene.things
        for time, word in ((thing.appears, "appears"), (thing.vanishes, "vanishes"))
        if time > 0 and isfinite(time)
    )
    if text.startswith("What happens"):
        place = next(place for place, event in enumerate(events) if event[1] == names[0])
        other = events[place + (1 if "right after" in text else -1)]
        return f"{other[1]} {other[2]}"
    alike = [event for event in events if event[2].startswith(verb)]
    return alike[0 if "first" in text else -1][1]


def test_answers_are_right(many):
    kinds = Counter()
    for scene, question in many:
        text, _, answer = options(question)
        assert answer == truth(scene, text), (text, scene)
        kinds[question.kind] += 1
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 100


def test_options_are_three_and_in_any_order(many):
    places = Counter()
    for _, question in many:
        _, given, answer = options(question)
        if given:
            assert len(set(given.values())) == 3
            assert UNKNOWN in given.values()
            assert answer in given.values()
            places[question.answer] += 1
        assert 1 <= len(answer.split()) <= 4
    total = places.total()
    assert total > 1000
    assert all(abs(places[letter] - total / 3) < 4 * sqrt(total * 2 / 9) for letter in "ABC")


def test_no_answer_is_likelier_than_chance(many):
    # The likeliest answer of a template, by its place among the options or the names in the question.
    found = defaultdict(Counter)
    chances = defaultdict(float)
    for scene, question in many:
        if not scene.things:
            continue
        text, given, answer = options(question)
        names = [" ".join(each) for each in re.findall(NAME, text)]
        template = re.sub("|".join([*COLOURS, *SHAPES]), "_", text)
        key = (template, bool(given), *(option == UNKNOWN for option in given.values()))
        meaning = question.answer if given else f"name {names.index(answer)}" if answer in names else answer
        found[key][meaning] += 1
        chances[key] += question.chance
    for key, answers in found.items():
        total = answers.total()
        chance = chances[key] / total
        if total > 60:
            # The likeliest of 72 answers is a little above their mean in any case.
            assert answers.most_common(1)[0][1] < total * chance + 4 * sqrt(total * chance * (1 - chance)) + 3, key


def test_in_a_clip_with_nothing_nothing_is_known():
    rng = np.random.default_rng(1)
    scene = draw_scene(rng, True, "nothing")
    questions = [question for _ in range(20) for question in questions_about(scene, rng)]
    assert {question.kind for question in questions} == {"orientation", "where", "colour", "shape", "direction"}
    assert {options(question)[2] for question in questions} == {UNKNOWN}


def test_only_the_kinds_that_are_asked_for():
    rng = np.random.default_rng(1)
    scene = draw_scene(rng, True, "motion")
    assert {question.kind for question in questions_about(scene, rng, ["count"])} == {"count"}
