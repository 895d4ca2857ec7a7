"""The language model learns to answer; and how well it does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.splice import IGNORE_INDEX
from merv_fast.training.tiny.clips import Clips, batches
from merv_fast.training.tiny.exercises import exercises
from merv_fast.training.tiny.learning import Learner
from merv_fast.training.tiny.pacing import Pace
from merv_fast.training.tiny.packing import pack, run_rows
from merv_fast.training.tiny.questions import Question, questions_about

__all__ = ["Score", "learn_to_answer", "score"]

MUON = 0.004
"""Muon's learning rate. At five times as much, what `prime` has set is gone before it has been of use."""


def learn_to_answer(
    model: MervForConditionalGeneration,
    tokenizer: Any,
    clips: Clips,
    features: Sequence[NDArray[np.float16]],
    epochs: int,
    batch: int = 16,
    most: int = 10,
    exercised: int = 300,
    rate: float = 1e-3,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> list[dict[str, float]]:
    """Train the language model; encoders, projectors and fusion stay as they are.

    Args:
        model: to be trained.
        tokenizer: its tokenizer.
        clips: to ask about; every time other questions.
        features: what the encoders return for them.
        epochs: how often each clip is asked about.
        batch: clips of a step.
        most: questions of a clip, chosen by `Pace`.
        exercised: steps, the first ones, in which each clip's questions are followed by two of `exercises`.
        rate: AdamW's learning rate at its peak, for all but the matrices that `Muon` moves.
        seed: of clips' order and of questions.
        rank: which of the processes of the default group this is, each of which takes a share of every batch.
        ranks: how many there are.

    Returns:
        The loss, as of `Learner.log`.
    """
    from rich.progress import track

    rng = np.random.default_rng([seed, 1, rank])
    model.requires_grad_(True).train()
    # What nothing is read from yet would only be forgotten.
    model.video_model.requires_grad_(False).eval()
    steps = epochs * (len(clips.scenes) // batch)
    learner, pace = learner_of(model, rate, steps, together=ranks > 1), Pace()
    for chosen in track(batches(len(clips.scenes), batch, epochs, seed), "answers", total=steps, disable=rank > 0):
        chosen = chosen[rank::ranks]
        shown = [clips.scenes[place] for place in chosen]
        drawn = [[each for _ in range(6) for each in questions_about(scene, rng)] for scene in shown]
        asked = [pace.choose(questions, most, rng) for questions in drawn]
        if learner.step < exercised:
            asked = [[*questions, *exercises(rng, 2)] for questions in asked]
        given = [torch.from_numpy(each[chosen]).float() for each in features]
        rows = pack(asked, model, tokenizer)
        losses = nn.functional.cross_entropy(*run_rows(model, rows, given), reduction="none")
        learner.learn(losses.mean())
        pace.note(asked, rows, losses.detach())
    model.eval()
    return learner.log


def learner_of(model: MervForConditionalGeneration, rate: float, steps: int, together: bool) -> Learner:
    """Muon for the matrices of the language model's layers, AdamW for all else that learns."""
    layers: Any = model.get_decoder().layers
    matrices = [parameter for parameter in layers.parameters() if parameter.ndim == 2]
    inside = set(matrices)
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in inside]
    return Learner("answers", matrices, rest, steps, (MUON, rate), rising=0.01, falling=0.8, together=together)


class Score(NamedTuple):
    """Of some questions: how many there are, how many were answered rightly, and how many are by chance at best."""

    asked: int
    right: int
    chance: float


@torch.no_grad()
def score(
    model: MervForConditionalGeneration,
    tokenizer: Any,
    asked: Sequence[Sequence[Question]],
    features: Sequence[NDArray[np.float16]],
    batch: int = 16,
) -> dict[str, Score]:
    """Exact match of greedy answers by kind of question: an answer is right if each of its tokens is the likeliest."""
    found: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        rows = pack(some, model, tokenizer)
        given = [torch.from_numpy(each[start : start + batch]).float() for each in features]
        logits, right = run_rows(model, rows, given)
        learned = rows.labels[:, 1:] != IGNORE_INDEX
        clip, owner = learned.nonzero()[:, 0], rows.owners[:, 1:][learned]
        missed = logits.argmax(-1) != right
        wrong = set(zip(clip[missed].tolist(), owner[missed].tolist(), strict=True))
        for row, questions in enumerate(some):
            for number, question in enumerate(questions, 1):
                found[question.kind].append(((row, number) not in wrong, question.chance))
    return {
        kind: Score(len(results), sum(right for right, _ in results), sum(chance for _, chance in results))
        for kind, results in found.items()
    }
