"""What each part of merv-tiny is good for: the same model without it, or with another, from the same encoders."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from merv_fast.encoders import VisionTransformer
from merv_fast.training.tiny.aligning import align
from merv_fast.training.tiny.answering import Score, learn_to_answer, score
from merv_fast.training.tiny.clips import Clips, make_clips
from merv_fast.training.tiny.pretraining import see
from merv_fast.training.tiny.questions import questions_about
from merv_fast.training.tiny.recipe import Run

__all__ = ["VARIANTS", "Ablation", "ablate"]


class Variant(NamedTuple):
    """Arguments of `MervConfig` that differ from merv-tiny's, and whether the model is shown anything."""

    changes: dict[str, Any]
    sees: bool = True


VARIANTS = {
    "merv-tiny": Variant({}),
    **{f"{name} alone": Variant({"encoders": [name]}) for name in ("languagebind", "dinov2", "vivit", "siglip")},
    "concat": Variant({"feature_fusion": "concat"}),
    "learnable W": Variant({"feature_fusion": "scalar"}),
    "1 token": Variant({"projector_token_length": 1}),
    "4 tokens": Variant({"projector_token_length": 4}),
    "64 tokens": Variant({"projector_token_length": 64}),
    "blind": Variant({}, sees=False),
}
"""By what tables call them; a slot has 16 visual tokens where nothing else is said."""


class Ablation(NamedTuple):
    """What came of a variant: visual tokens of a clip, and scores by kind of question."""

    tokens: int
    scores: dict[str, Score]


def ablate(run: Run, count: int, seed: int, epochs: int, names: list[str] | None = None) -> Iterator[Ablation]:
    """Train variants in order, as many side by side as the run has processes, and ask them about new clips.

    Args:
        run: one whose encoders have been trained; its folder keeps the new clips, too.
        count: of new clips.
        seed: of these.
        epochs: how often each variant is asked about each clip of the run.
        names: keys of ``VARIANTS``, default all.
    """
    folder = run.folder / f"new-{seed}-{count}"
    if not (folder / f"{list(run.pretraining)[-1]}.npy").is_file():
        new = make_clips(seed, count, folder / "clips", training=False, processes=run.processes)
        for name, encoder in run.kept("words").model.video_model.encoders.items():
            np.save(folder / f"{name}.npy", see(cast(VisionTransformer, encoder), name, new))
    yield from run.side_by_side(partial(one, run, folder, seed, epochs), names or list(VARIANTS))


def one(run: Run, folder: Path, seed: int, epochs: int, name: str) -> Ablation:
    """Train a variant, and ask it."""
    variant = VARIANTS[name]
    model = run.start(**variant.changes)
    encoders = list(model.model.video_model.encoders)
    clips, new = run.read(), Clips.read(folder / "clips", seed, training=False)
    features = [each for each, of in zip(run.features(), run.pretraining, strict=True) if of in encoders]
    shown: list[NDArray[np.float16]] = [np.load(folder / f"{of}.npy") for of in encoders]
    if not variant.sees:
        features, shown = ([np.broadcast_to(np.float16(0), each.shape) for each in some] for some in (features, shown))
    align(model.model, model.tokenizer, clips, features, run.word_steps, seed=run.seed)
    learn_to_answer(model.model, model.tokenizer, clips, features, epochs, 2 * run.batch, seed=run.seed)
    rng = np.random.default_rng([seed, 4])
    # Of a clip with nothing in it whoever knows nothing is right.
    asked = [questions_about(scene, rng) if scene.things else [] for scene in new.scenes]
    held = [place for place, questions in enumerate(asked) if questions]
    found = score(model.model, model.tokenizer, [asked[place] for place in held], [each[held] for each in shown])
    return Ablation(model.model.video_model.num_video_tokens, found)
