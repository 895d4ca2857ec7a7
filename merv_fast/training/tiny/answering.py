"""Projectors, fusion and language model learn to answer: all questions about a clip in one row, sharing its tokens."""

from __future__ import annotations

import logging
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
from merv_fast.training.tiny.pretraining import EVERY, pixels_of
from merv_fast.training.tiny.questions import Question, questions_about
from merv_fast.training.tokens import conversation_tokens

__all__ = ["Rows", "Score", "encode_clips", "learn_to_answer", "pack", "run_rows", "score"]


logger = logging.getLogger("merv_fast")

FUSION = 0.003
"""The fusion's learning rate, as a share of that of all else."""


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


@torch.no_grad()
def encode_clips(model: MervForConditionalGeneration, clips: Clips, batch: int = 16) -> list[NDArray[np.float16]]:
    """What each encoder returns for all clips: [N, T, N_e, C] each."""
    from rich.progress import track

    found: list[NDArray[np.float16]] = []
    for name, module in model.video_model.encoders.items():
        encoder = cast("VisionTransformer", module)
        shape = (len(clips.frames), encoder.config.slots, encoder.config.tokens_per_slot, encoder.config.width)
        features = np.empty(shape, np.float16)
        for start in track(range(0, len(clips.frames), batch), f"{name} sees"):
            features[start : start + batch] = encoder(pixels_of(clips.frames[start : start + batch], encoder)).numpy()
        found.append(features)
    return found


def learn_to_answer(
    model: MervForConditionalGeneration,
    tokenizer: Any,
    clips: Clips,
    features: Sequence[NDArray[np.float16]],
    epochs: int,
    batch: int = 16,
    most: int = 8,
    rate: float = 1.5e-3,
    seed: int = 0,
) -> list[float]:
    """Train all but the encoders.

    Args:
        model: to be trained.
        tokenizer: its tokenizer.
        clips: to ask about; every time other questions.
        features: what `encode_clips` returned for them.
        epochs: how often each clip is asked about.
        batch: clips of a step.
        most: questions of a clip.
        rate: the learning rate at its peak.
        seed: of clips' order and of questions.

    Returns:
        The loss, every `EVERY` steps the mean since the last.
    """
    from rich.progress import track

    rng = np.random.default_rng([seed, 1])
    model.requires_grad_(True).train()
    model.video_model.encoders.requires_grad_(False).eval()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fusion = set(model.video_model.tail.fusion.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in learning if parameter not in fusion]},
        # Before the language model reads what an encoder tells, to weigh it less seems to help, and it stays unread.
        {"params": list(fusion), "lr": FUSION * rate},
    ]
    steps = epochs * (len(clips.scenes) // batch)
    optimiser = torch.optim.AdamW(groups, lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [rate, FUSION * rate], steps, pct_start=0.05)
    log: list[float] = []
    since: list[float] = []
    for chosen in track(batches(len(clips.scenes), batch, epochs, seed), "answers", total=steps):
        shown = [clips.scenes[place] for place in chosen]
        asked = [some([*questions_about(scene, rng), *questions_about(scene, rng)], most, rng) for scene in shown]
        given = [torch.from_numpy(each[chosen]).float() for each in features]
        logits, right = run_rows(model, pack(asked, model, tokenizer), given)
        loss = nn.functional.cross_entropy(logits, right)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        schedule.step()
        since.append(loss.item())
        if len(since) == EVERY:
            log.append(float(np.mean(since)))
            since = []
            logger.info("answers, step %d: loss %.3f", len(log) * EVERY, log[-1])
    model.eval()
    return log


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
