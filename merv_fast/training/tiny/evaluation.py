"""How well a model answers about clips that it has never seen, and how far one gets that sees none."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from merv_fast.models.merv_model import MervModel
from merv_fast.training.tiny.answering import Score
from merv_fast.training.tiny.clips import clip_of
from merv_fast.training.tiny.questions import KINDS, Question, questions_about
from merv_fast.training.tiny.scenes import COLOURS, SHAPES, Scene, draw_scene, held_out

__all__ = ["Asked", "Blind", "ask_all", "held_out_questions", "is_new", "plan", "scores"]


class Asked(NamedTuple):
    """A question about a clip, and whether something in it moves in a way that is kept from training."""

    clip: Path
    question: Question
    new: bool


def plan(count: int, seed: int, training: bool) -> dict[int, list[Question]]:
    """Questions by the number of their scene: at least ``count``, of each kind as many as of the others."""
    left = dict.fromkeys(KINDS, -(-count // len(KINDS)))
    found: dict[int, list[Question]] = {}
    index = 0
    while wanted := [kind for kind, more in left.items() if more]:
        rng = np.random.default_rng([seed, index, 1])
        scene = draw_scene(np.random.default_rng([seed, index]), training)
        # Of a clip with nothing in it whoever knows nothing is right.
        for question in questions_about(scene, rng, wanted) if scene.things else ():
            if left[question.kind]:
                left[question.kind] -= 1
                found.setdefault(index, []).append(question)
        index += 1
    return found


def held_out_questions(folder: Path, count: int, seed: int = 2, processes: int = 2) -> list[Asked]:
    """At least ``count`` questions about new clips, half of whose moving things move in ways kept from training.

    Args:
        folder: where the clips go, made if need be.
        count: of questions.
        seed: one that no model was trained with.
        processes: that draw and encode.
    """
    from rich.progress import track

    folder.mkdir(parents=True, exist_ok=True)
    found: list[Asked] = []
    planned = plan(count, seed, training=False)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        made = pool.map(partial(new_clip, seed, folder), planned, chunksize=8)
        for questions, (scene, clip) in zip(planned.values(), track(made, "clips", total=len(planned)), strict=True):
            found += [Asked(clip, question, is_new(scene)) for question in questions]
    return found


def new_clip(seed: int, folder: Path, index: int) -> tuple[Scene, Path]:
    """One clip, in a process of its own."""
    return clip_of((seed, index), False, folder)


def is_new(scene: Scene) -> bool:
    """Whether something moves in a way that is kept from training."""
    return any(thing.direction and held_out(thing.colour, thing.shape, thing.direction) for thing in scene.things)


def ask_all(vidlm: MervModel, asked: Sequence[Asked], batch: int = 16) -> list[str]:
    """The model's greedy answers, in order."""
    from rich.progress import track

    answers: list[str] = []
    for start in track(range(0, len(asked), batch), "questions"):
        some = asked[start : start + batch]
        prompts = []
        for each in some:
            builder = vidlm.get_prompt_builder()
            builder.add_turn(role="human", message=each.question.text)
            prompts.append(builder.get_prompt())
        clips = [each.clip for each in some]
        answers += vidlm.generate(clips, prompts, batch_size=batch, do_sample=False, max_new_tokens=8, decoder="pyav")
    return answers


def scores(asked: Sequence[Asked], answers: Sequence[str]) -> dict[str, Score]:
    """By kind of question, ``new`` for those about clips with something new, and ``all``; answers match exactly."""
    found: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for each, answer in zip(asked, answers, strict=True):
        result = (answer.strip() == each.question.answer, each.question.chance)
        for key in (each.question.kind, *(["new"] if each.new else []), "all"):
            found[key].append(result)
    return {
        key: Score(len(results), sum(right for right, _ in results), sum(chance for _, chance in results))
        for key, results in found.items()
    }


class Blind:
    """Answers what was right most often when the question was asked in training, or one like it.

    Alike are questions that are the same but for the names of colours and shapes; and all of a kind.

    Args:
        questions: those of training, with their answers.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        self.seen: Mapping[str, Counter[str]] = defaultdict(Counter)
        for question in questions:
            for key in keys(question):
                self.seen[key][question.answer] += 1

    def answer(self, question: Question) -> str:
        """The likeliest answer to a question that was asked `ENOUGH` times, exactly or alike, or else by its kind."""
        known = [key for key in keys(question) if key in self.seen]
        chosen = next((key for key in known if self.seen[key].total() >= ENOUGH), known[-1])
        return self.seen[chosen].most_common(1)[0][0]


ENOUGH = 30
NAMES = re.compile("|".join([*COLOURS, *SHAPES]))


def keys(question: Question) -> list[str]:
    """What a question is known by, from all of it to its kind."""
    options = " with options" if question.is_choice else ""
    return [question.text, NAMES.sub("_", question.text), question.text.split()[0] + options, question.kind + options]
