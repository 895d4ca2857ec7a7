"""Projectors, fusion and language model learn to answer: all questions about a clip in one row, sharing its tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from merv_fast.encoders import VisionTransformer
from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.models.splice import IGNORE_INDEX
from merv_fast.training.data import Entry, Turn
from merv_fast.training.tiny.clips import Clips, batches
from merv_fast.training.tiny.exercises import exercises
from merv_fast.training.tiny.learning import Learner
from merv_fast.training.tiny.pretraining import see
from merv_fast.training.tiny.questions import Question, questions_about
from merv_fast.training.tokens import conversation_tokens

__all__ = ["Rows", "Score", "encode_clips", "learn_to_answer", "pack", "run_rows", "score"]


MUON = 0.004
"""Muon's learning rate. At five times as much, what `prime` has set is gone before it has been of use."""


class Rows(NamedTuple):
    """Questions and answers of a batch of clips.

    Args:
        ids: [B, S], BOS and places for the visual tokens, then every question with its answer.
        labels: [B, S], -100 but for answers.
        positions: [B, S]: each question follows the visual tokens as if it were alone.
        owners: [B, S], which question a token belongs to, from 1; 0 for what all share, -1 for padding.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    owners: Tensor

    def mask(self) -> Tensor:
        """[B, 1, S, S]: a token sees those before it that all share, or that are of its own question."""
        owners = self.owners
        shared = (owners == 0)[:, None] | (owners[:, :, None] == owners[:, None])
        return (shared & torch.ones(shared.shape[1:], dtype=torch.bool).tril())[:, None]


def pack(asked: Sequence[Sequence[Question]], model: MervForConditionalGeneration, tokenizer: Any) -> Rows:
    """The rows of the questions about each clip of a batch."""
    config, visual = model.config, model.video_model.num_video_tokens
    rows = []
    for questions in asked:
        row = [[tokenizer.bos_token_id] + [config.video_token_id] * visual]
        row += [[IGNORE_INDEX] * (visual + 1), list(range(visual + 1)), [0] * (visual + 1)]
        for owner, question in enumerate(questions, 1):
            turns = (Turn("human", question.text), Turn("gpt", question.answer))
            ids, labels = conversation_tokens(Entry("", None, turns), tokenizer, config.prompt_format, 256)
            own = (ids[1:], labels[1:], range(visual + 1, visual + len(ids)), [owner] * (len(ids) - 1))
            for column, more in zip(row, own, strict=True):
                column.extend(more)
        rows.append(row)
    fill = (tokenizer.pad_token_id, IGNORE_INDEX, 0, -1)
    columns = ([torch.tensor(row[place]) for row in rows] for place in range(4))
    padded = (nn.utils.rnn.pad_sequence(column, True, value) for column, value in zip(columns, fill, strict=True))
    return Rows(*padded)


def run_rows(model: MervForConditionalGeneration, rows: Rows, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits at the answers' tokens, and those tokens."""
    video = model.video_model.fuse(features)
    hidden = model.get_decoder()(
        inputs_embeds=model.embed(rows.ids, video), attention_mask=rows.mask(), position_ids=rows.positions
    ).last_hidden_state
    learned = rows.labels[:, 1:] != IGNORE_INDEX
    return model.get_output_embeddings()(hidden[:, :-1][learned]), rows.labels[:, 1:][learned]


def encode_clips(model: MervForConditionalGeneration, clips: Clips) -> list[NDArray[np.float16]]:
    """What each encoder returns for all clips: [N, T, N_e, C] each."""
    encoders = model.video_model.encoders.items()
    return [see(cast("VisionTransformer", encoder), name, clips) for name, encoder in encoders]


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
        features: what `encode_clips` returned for them.
        epochs: how often each clip is asked about.
        batch: clips of a step.
        most: questions of a clip.
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
    learner = learner_of(model, rate, steps, together=ranks > 1)
    for chosen in track(batches(len(clips.scenes), batch, epochs, seed), "answers", total=steps, disable=rank > 0):
        chosen = chosen[rank::ranks]
        shown = [clips.scenes[place] for place in chosen]
        asked = [some([each for _ in range(6) for each in questions_about(scene, rng)], most, rng) for scene in shown]
        if learner.step < exercised:
            asked = [[*questions, *exercises(rng, 2)] for questions in asked]
        given = [torch.from_numpy(each[chosen]).float() for each in features]
        logits, right = run_rows(model, pack(asked, model, tokenizer), given)
        learner.learn(nn.functional.cross_entropy(logits, right))
    model.eval()
    return learner.log


def learner_of(model: MervForConditionalGeneration, rate: float, steps: int, together: bool) -> Learner:
    """Muon for the matrices of the language model's layers, AdamW for all else that learns."""
    layers: Any = model.get_decoder().layers
    matrices = [parameter for parameter in layers.parameters() if parameter.ndim == 2]
    inside = set(matrices)
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in inside]
    return Learner("answers", matrices, rest, steps, (MUON, rate), rising=0.01, falling=0.5, together=together)


def some(questions: list[Question], most: int, rng: np.random.Generator) -> list[Question]:
    """At most so many of them, in random order."""
    return [questions[place] for place in rng.permutation(len(questions))[:most]]


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
