"""Questions about a scene, with their answers: such that the question alone does not tell them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import numpy as np

from merv_fast.training.tiny.scenes import CAMERAS, COLOURS, DIRECTIONS, SHAPES, Scene, Thing

__all__ = ["KINDS", "UNKNOWN", "Question", "questions_about"]

UNKNOWN = "I don't know"
NUMBERS = ("one", "two", "three", "four")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        kind: a key of ``KINDS``.
        text: what is asked; of multiple choice with its options.
        answer: what is right.
        chance: the share of right answers without the video, at best.
    """

    kind: str
    text: str
    answer: str
    chance: float

    @property
    def is_choice(self) -> bool:
        """Whether it is multiple choice."""
        return "\n" in self.text


class Draft(NamedTuple):
    """A question before it is free or multiple choice.

    Args:
        text: what is asked.
        answer: what is right.
        answers: what could be right.
        absent: the same question about something that is not there.
        tempting: what multiple choice offers instead of the right answer, default any of ``answers``.
    """

    text: str
    answer: str
    answers: Sequence[str]
    absent: str | None = None
    tempting: Sequence[str] = ()


def questions_about(scene: Scene, rng: np.random.Generator, kinds: Sequence[str] | None = None) -> list[Question]:
    """Random questions that the scene answers: of each kind at most two, half of them multiple choice."""
    found = []
    for kind in kinds or KINDS:
        for asked in KINDS[kind](scene, rng):
            choose = choices if rng.random() < 0.5 else free
            found.append(choose(kind, asked, rng, scene.theme == "nothing"))
    return found


def free(kind: str, asked: Draft, rng: np.random.Generator, nothing: bool) -> Question:
    """The question as it stands; of what is absent as often as any other answer is right."""
    count = len(asked.answers) + (asked.absent is not None)
    if nothing or (asked.absent is not None and rng.random() < 1 / count):
        return Question(kind, asked.absent or asked.text, UNKNOWN, 1 / count)
    return Question(kind, asked.text, asked.answer, 1 / count)


def choices(kind: str, asked: Draft, rng: np.random.Generator, nothing: bool) -> Question:
    """Three options in random order, one of them that one cannot know; the answer is a letter."""
    wrong = [answer for answer in asked.tempting or asked.answers if answer != asked.answer]
    unknown = nothing or (asked.absent is not None and rng.random() < 1 / 3)
    options = [asked.answer, str(rng.choice(wrong)), UNKNOWN]
    options = [options[place] for place in rng.permutation(3)]
    lines = [f"{letter}. {option}" for letter, option in zip("ABC", options, strict=True)]
    text = (asked.absent if unknown else None) or asked.text
    right = "ABC"[options.index(UNKNOWN if unknown else asked.answer)]
    return Question(kind, "\n".join([text, *lines]), right, 1 / (2 if asked.absent is None else 3))


def pick(rng: np.random.Generator, things: Sequence[Thing]) -> Thing:
    """One of them."""
    return things[int(rng.integers(len(things)))]


def missing(rng: np.random.Generator, scene: Scene, shapes: Sequence[str] = SHAPES) -> str:
    """The name of something that is not there."""
    there = {thing.name for thing in scene.things}
    names = [f"{colour} {shape}" for colour in COLOURS for shape in shapes if f"{colour} {shape}" not in there]
    return str(rng.choice(names))


def order(scene: Scene, rng: np.random.Generator) -> Iterator[Draft]:
    """Of two things that appear or vanish: which is first, or whether one is before the other."""
    found = events(scene)
    if len(found) < 2:
        return
    first, second = (found[place] for place in rng.permutation(len(found))[:2])
    earlier = "before" if first.time < second.time else "after"
    text = f"Does the {first.name} {first.verb} before or after the {second}?"
    yield Draft(text, earlier, ("before", "after"))
    alike = [event for event in found if event.verb == first.verb]
    if len(alike) > 1:
        one, other = (alike[place] for place in rng.permutation(len(alike))[:2])
        names = (one.name, other.name)
        text = f"Which {one.does} first, the {one.name} or the {other.name}?"
        yield Draft(text, names[one.time > other.time], names)


def camera(scene: Scene, rng: np.random.Generator) -> Iterator[Draft]:
    """Whether the camera moves, and what it does."""
    moves = scene.camera != "static"
    if scene.theme == "camera":
        yield Draft("What does the camera do?", scene.camera, CAMERAS)
    # Most scenes are static: as often as not this is asked of one that is.
    share = STATIC_ASKED if scene.theme in ("motion", "events") else MOVING_ASKED if moves else 1.0
    if scene.theme in ("motion", "events", "camera") and rng.random() < share:
        yield Draft("Is the camera moving or static?", "moving" if moves else "static", ("moving", "static"))


MOVING_ASKED = 0.8
STATIC_ASKED = (0.15 * 0.8 * MOVING_ASKED - 0.15 * 0.2) / 0.6


def orientation(scene: Scene, rng: np.random.Generator) -> Iterator[Draft]:
    """Which way an arrow points at the start or at the end."""
    arrows = [thing for thing in lasting(scene) if thing.shape == "arrow"]
    if scene.theme == "nothing" or (arrows and scene.theme != "counting"):
        when = rng.integers(2)
        moment = ("start", "end")[when]
        text = "Which way does the {} point at the {}?"
        absent = text.format(missing(rng, scene, ["arrow"]), moment)
        arrow = pick(rng, arrows) if arrows else None
        given = (text.format(arrow.name, moment), arrow.points[when]) if arrow else (absent, "up")
        yield Draft(*given, list(DIRECTIONS), absent)


def where(scene: Scene, rng: np.random.Generator) -> Iterator[Draft]:
    """In which quarter of the picture something is at the start or at the end."""
    if scene.theme in ("camera", "counting"):
        return
    when = rng.integers(2)
    moment = ("start", "end")[when]
    clear = [(thing, thing.place(float(when))) for thing in lasting(scene)]
    clear = [(thing, at) for thing, at in clear if min(abs(at[0] - 0.5), abs(at[1] - 0.5)) > 0.09]
    if clear or scene.theme == "nothing":
        text = "Where is the {} at the {}?"
        absent = text.format(missing(rng, scene), moment)
        if not clear:
            yield Draft(absent, CORNERS[0], CORNERS, absent)
            return
        thing, (x, y) = clear[rng.integers(len(clear))]
        yield Draft(text.format(thing.name, moment), CORNERS[2 * (y > 0.5) + (x > 0.5)], CORNERS, absent)


def count(scene: Scene, rng: np.random.Generator) -> Iterator[Draft]:
    """How many shapes there are, or how many of one kind."""
    if scene.theme == "counting":
        shape = scene.things[0].shape
        number = sum(thing.shape == shape for thing in scene.things)
        yield Draft(f"How many {plural(shape)} are there?", NUMBERS[number - 1], NUMBERS)
    elif scene.theme == "motion":
        yield Draft("How many shapes are there?", NUMBERS[len(scene.things) - 1], NUMBERS)


def colour(scene: Scene, rng: np.random.Generator) -> Iterator[Draft]:
    """The colour of the only thing of its shape."""
    shapes = [thing.shape for thing in scene.things]
    alone = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
    if alone or scene.theme == "nothing":
        absent = f"What colour is the {rng.choice([shape for shape in SHAPES if shape not in shapes])}?"
        thing = pick(rng, alone) if alone else None
        text = f"What colour is the {thing.shape}?" if thing else absent
        yield Draft(text, thing.colour if thing else "red", list(COLOURS), absent)


def shape(scene: Scene, rng: np.random.Generator) -> Iterator[Draft]:
    """The shape of the only thing of its colour."""
    colours = [thing.colour for thing in scene.things]
    alone = [thing for thing in scene.things if colours.count(thing.colour) == 1]
    others = [name for name in COLOURS if name not in colours]
    # Where arrows turn, most things are arrows.
    if scene.theme != "orientation" and others and (alone or scene.theme == "nothing"):
        absent = f"What shape is the {rng.choice(others)} thing?"
        thing = pick(rng, alone) if alone else None
        text = f"What shape is the {thing.colour} thing?" if thing else absent
        yield Draft(text, thing.shape if thing else "circle", SHAPES, absent)


def direction(scene: Scene, rng: np.random.Generator) -> Iterator[Draft]:
    """Which way something moves."""
    movers = [thing for thing in scene.things if thing.direction] if scene.theme == "motion" else []
    if movers or scene.theme == "nothing":
        absent = f"Which way does the {missing(rng, scene)} move?"
        thing = pick(rng, movers) if movers else None
        text = f"Which way does the {thing.name} move?" if thing else absent
        yield Draft(text, (thing.direction if thing else None) or "left", list(DIRECTIONS), absent)


def speed(scene: Scene, rng: np.random.Generator) -> Iterator[Draft]:
    """Which of two things is faster or slower."""
    fast = [thing for thing in scene.things if thing.speed == "fast"]
    slow = [thing for thing in scene.things if thing.speed == "slow"]
    if fast and slow and scene.theme == "motion":
        pair = (pick(rng, fast).name, pick(rng, slow).name)
        word = rng.integers(2)
        names = pair if rng.random() < 0.5 else pair[::-1]
        text = f"Which moves {('faster', 'slower')[word]}, the {names[0]} or the {names[1]}?"
        yield Draft(text, pair[word], names)


def ends(scene: Scene, rng: np.random.Generator) -> Iterator[Draft]:
    """What appears or vanishes first or last."""
    found = events(scene)
    verb = ("appear", "vanish")[rng.integers(2)]
    alike = sorted(event for event in found if event.verb == verb)
    if len(alike) > 1:
        last = rng.integers(2)
        names = [event.name for event in alike]
        yield Draft(f"What {alike[0].does} {('first', 'last')[last]}?", names[-last], NAMES, tempting=names)


def neighbours(scene: Scene, rng: np.random.Generator) -> Iterator[Draft]:
    """What happens right before or after something else does."""
    found = sorted(events(scene))
    if len(found) < 2:
        return
    place = int(rng.integers(len(found) - 1))
    after = rng.integers(2)
    known, asked = (found[place], found[place + 1]) if after else (found[place + 1], found[place])
    answers = [f"{name} {verb}" for name in NAMES for verb in ("appears", "vanishes")]
    wrong = [str(event) for event in found if event not in (known, asked)]
    text = f"What happens right {('before', 'after')[after]} the {known}?"
    yield Draft(text, str(asked), answers, tempting=wrong)


KINDS: dict[str, Callable[[Scene, np.random.Generator], Iterator[Draft]]] = {
    "order": order,
    "camera": camera,
    "orientation": orientation,
    "where": where,
    "count": count,
    "colour": colour,
    "shape": shape,
    "direction": direction,
    "speed": speed,
    "first or last": ends,
    "before or after": neighbours,
}
"""Kinds of questions, the first four of them the poster's."""


class Event(NamedTuple):
    """Something appears or vanishes."""

    time: float
    name: str
    verb: str

    @property
    def does(self) -> str:
        """The verb in the third person."""
        return f"{self.verb}es" if self.verb == "vanish" else f"{self.verb}s"

    def __str__(self) -> str:
        return f"{self.name} {self.does}"


def events(scene: Scene) -> list[Event]:
    """What appears and what vanishes."""
    there = [Event(thing.appears, thing.name, "appear") for thing in scene.things if thing.appears > 0]
    return there + [Event(thing.vanishes, thing.name, "vanish") for thing in scene.things if isfinite(thing.vanishes)]


def lasting(scene: Scene) -> list[Thing]:
    """Things that are there all the time."""
    return [thing for thing in scene.things if not thing.appears and not isfinite(thing.vanishes)]


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"
