"""Projectors learn to tell what is where in the language model's own words, before it learns to listen to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from merv_fast.models.modeling import MervForConditionalGeneration
from merv_fast.training.tiny.clips import SLOTS, Clips, Truth
from merv_fast.training.tiny.learning import Learner
from merv_fast.training.tiny.scenes import CAMERAS, COLOURS, DIRECTIONS, SHAPES

__all__ = ["CODES", "WORDS", "align", "directions_of", "words_in"]

FIELDS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "moves": (None, *DIRECTIONS),
    "speed": ("slower", "faster"),
    "points": tuple(f"points {way}" for way in DIRECTIONS),
}
"""What a patch tells of the thing it shows: a name for each value of a field of `Truth` from 1 on, if it has one."""

EVENTS = ("appears", "vanishes", *(f"in slot {slot} or later" for slot in range(2, SLOTS)))
"""What befalls a thing, and when: in words that order can be told by."""

CENTRES = tuple(f"centre of a {shape}" for shape in SHAPES)
"""What there is one of for each thing and slot, to count by."""

HALVES = ("top half", "bottom half", "left half", "right half")
"""Where the centre of a thing is."""

WORDS = (*COLOURS, *SHAPES)
"""What questions call things by, which a visual token is to tell in the language model's own words."""

CODES = (
    *(name for names in list(FIELDS.values())[2:] for name in names if name),
    *(*EVENTS, *CENTRES, *HALVES, "start", "end", *CAMERAS, "moving"),
)
"""What else it is to tell; what each means the language model has to find out."""

LOUD, QUIET = 2.0, 6.0
"""From a token's share in a direction to a logit: words are to stand out three times as far as codes, for a question
finds a thing by them."""

RARE = -3.0
"""Logit of a name of which a token says nothing: most are not true of it."""


def words_in(truth: Tensor, camera: Tensor, cells: int) -> Tensor:
    """Which of ``WORDS`` and ``CODES`` are true of each visual token: [B, T * cells ** 2, names].

    What a token shows is what any of its patches does. "start" and "end" are true where there is a thing, and what the
    camera does of all tokens.

    Args:
        truth: [B, fields of `Truth`, T, grid, grid].
        camera: [B], places in ``CAMERAS``.
        cells: visual tokens along a side of a slot.
    """
    fields = dict(zip(Truth._fields, truth.unbind(1), strict=True))
    told = {
        name: fields[field] == value
        for field, names in FIELDS.items()
        for value, name in enumerate(names, 1)
        if name is not None
    }
    there = fields["thing"] > 0
    told["appears"], told["vanishes"] = fields["appears"] > 1, there & (fields["vanishes"] <= SLOTS)
    when = torch.where(told["appears"], fields["appears"], fields["vanishes"] * told["vanishes"]) - 1
    told |= {name: when >= slot for slot, name in enumerate(EVENTS[2:], 2)}
    told |= {name: told[shape] & (fields["centre"] > 0) for shape, name in zip(SHAPES, CENTRES, strict=True)}
    for half, (low, high) in {"y": HALVES[:2], "x": HALVES[2:]}.items():
        told[low], told[high] = there & (fields[half] < 50), there & (fields[half] >= 50)
    slot = torch.arange(SLOTS)[:, None, None]
    told["start"], told["end"] = there & (slot == 0), there & (slot == SLOTS - 1)
    told |= {name: (camera == place)[:, None, None, None].expand_as(there) for place, name in enumerate(CAMERAS)}
    told["moving"] = ~told["static"]
    patches = torch.stack([told[name] for name in (*WORDS, *CODES)], -1)
    return patches.unflatten(2, (cells, -1)).unflatten(4, (cells, -1)).any(5).any(3).flatten(1, 3)


def directions_of(model: MervForConditionalGeneration, tokenizer: Any) -> Tensor:
    """Directions [names, D] of ``WORDS``, by what sets each apart in the language model, and of ``CODES``, random.

    Their lengths are ``LOUD`` or ``QUIET``.

    Raises:
        ValueError: a word is more than one token.
    """
    embedding: Any = model.get_input_embeddings()
    embeddings = embedding.weight.detach()
    tokens = {word: tokenizer(f" {word}", add_special_tokens=False).input_ids for word in WORDS}
    if long := [word for word, ids in tokens.items() if len(ids) != 1]:
        raise ValueError(f"align: each word must be one token of the tokenizer, got more for {long}")
    ids = [ids[0] for ids in tokens.values()]
    # What all words have in common says nothing.
    words = embeddings[ids] - embeddings.mean(0)
    codes = torch.randn(len(CODES), words.shape[1], generator=torch.Generator().manual_seed(0))
    return torch.cat([LOUD * normalize(words, dim=1), QUIET * normalize(codes, dim=1)])


def align(
    model: MervForConditionalGeneration,
    tokenizer: Any,
    clips: Clips,
    features: Sequence[NDArray[np.float16]],
    steps: int,
    batch: int = 16,
    rate: float = 1e-2,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Train projectors and fusion: a visual token is to be near the embeddings of the words that are true of it.

    The fusion starts from weighing all encoders alike, whatever it sees, and learns at a tenth of the rate: at twice
    the projectors' it soon gives all weight to one encoder.

    Args:
        model: to be trained.
        tokenizer: its tokenizer, to which each of ``WORDS`` is one token.
        clips: to learn from.
        features: what the encoders returned for them.
        steps: how many batches.
        batch: clips of a step.
        rate: the learning rate at first.
        seed: of the choice of clips.

    Returns:
        Loss, and the share of true names that are told, as of `Learner.log`.
    """
    from rich.progress import track

    video = model.video_model
    names = directions_of(model, tokenizer)
    fusion: Any = video.tail.fusion
    for name, parameter in fusion.named_parameters():
        if name in ("k_proj.weight", "scalar"):
            torch.nn.init.zeros_(parameter)
    others: list[dict[str, Any]] = [
        {"params": list(video.tail.projectors.parameters())},
        {"params": list(fusion.parameters()), "lr": rate / 10},
    ]
    learner = Learner("words", [], others, steps, (0.0, rate), rising=0.01, falling=1.0)
    cells = round(model.config.projector_token_length**0.5)
    rng = np.random.default_rng([seed, 3])
    for _ in track(range(steps), "words"):
        chosen = np.sort(rng.choice(len(clips.truth), batch, replace=False))
        tokens = video.fuse([torch.from_numpy(each[chosen]).float() for each in features]).pooler_output
        true = words_in(torch.from_numpy(clips.truth[chosen]), torch.from_numpy(clips.camera[chosen]), cells)
        # Where encoders' tokens follow each other, all are to tell the same.
        true = true.repeat(1, tokens.shape[1] // true.shape[1], 1)
        told = tokens @ names.T + RARE
        loss = binary_cross_entropy_with_logits(told, true.float())
        learner.learn(loss, told=(told > 0)[true].float().mean().item())
    return learner.log
