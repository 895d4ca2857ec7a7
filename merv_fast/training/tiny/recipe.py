"""The way from nothing to merv-tiny, stage by stage, each kept in a folder: a run goes on where it was stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_model, save_model
from torch import nn

from merv_fast.encoders import VisionTransformer
from merv_fast.models.merv_model import MervModel
from merv_fast.training.tiny.aligning import align
from merv_fast.training.tiny.answering import encode_clips, learn_to_answer
from merv_fast.training.tiny.clips import Clips, make_clips
from merv_fast.training.tiny.model import build_tiny
from merv_fast.training.tiny.pretraining import pretrain
from merv_fast.training.tiny.questions import questions_about
from merv_fast.training.tiny.scenes import draw_scene

__all__ = ["Run"]

logger = logging.getLogger("merv_fast")

TEXTS = 1500
"""Scenes whose questions the tokenizer is made of: every word is in some of them."""


PRETRAINING = {"languagebind": (1, 2e-3), "dinov2": (10, 2e-3), "vivit": (2, 1e-3), "siglip": (10, 2e-3)}


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        folder: where everything goes: clips, encoders, features, the model, and ``log.json``.
        seed: all else follows from it.
        count: of clips.
        pretraining: how often each encoder sees each clip, and its learning rate; of what sees single frames, one slot.
        word_steps: batches of `align`.
        answer_epochs: how often each clip is asked about.
        batch: clips of a step of `pretrain`, and half of those of `learn_to_answer`.
        processes: that make clips.
    """

    folder: Path
    seed: int = 1
    count: int = 10000
    pretraining: Mapping[str, tuple[int, float]] = field(default_factory=lambda: dict(PRETRAINING))
    word_steps: int = 1500
    answer_epochs: int = 5
    batch: int = 8
    processes: int = 2

    def __call__(self) -> MervModel:
        """Run every stage that has not been, and return the model."""
        clips = self.stage("clips", self.make, self.read)
        model = self.start()
        for name, (epochs, rate) in self.pretraining.items():
            encoder = cast(VisionTransformer, model.model.video_model.encoders[name])
            learn = partial(pretrain, encoder, name, clips, epochs, batch=self.batch, rate=rate, seed=self.seed)
            self.learned(name, encoder, learn)
        features = self.stage("features", partial(self.encode, model, clips), self.features)
        words = partial(align, model.model, model.tokenizer, clips, features, self.word_steps, seed=self.seed)
        self.learned("words", model.model, words)
        answer = partial(learn_to_answer, model.model, model.tokenizer, clips, features)
        self.learned("answers", model.model, partial(answer, self.answer_epochs, 2 * self.batch, seed=self.seed))
        return model

    def start(self) -> MervModel:
        """The model before it has learned anything."""
        texts: list[str] = []
        for index in range(TEXTS):
            rng = np.random.default_rng([self.seed, index, 1])
            asked = questions_about(draw_scene(rng, training=False), rng)
            texts += [text for question in asked for text in (f"In: {question.text}\nOut:", question.answer)]
        return build_tiny(texts, self.seed)

    def make(self) -> Clips:
        """Make the clips."""
        return make_clips(self.seed, self.count, self.folder / "clips", processes=self.processes)

    def read(self) -> Clips:
        """The clips of an earlier run."""
        return Clips.read(self.folder / "clips", self.seed)

    def encode(self, model: MervModel, clips: Clips) -> list[NDArray[np.float16]]:
        """What the encoders return, which is kept."""
        found = encode_clips(model.model, clips)
        for name, each in zip(self.pretraining, found, strict=True):
            np.save(self.folder / f"{name}.npy", each)
        return found

    def features(self) -> list[NDArray[np.float16]]:
        """What the encoders returned in an earlier run."""
        return [np.load(self.folder / f"{name}.npy", mmap_mode="c") for name in self.pretraining]

    def learned(self, name: str, module: nn.Module, learn: Callable[[], Any]) -> None:
        """Train a module, or read what came of it."""
        file = self.folder / f"{name}.safetensors"

        def fresh() -> None:
            history = learn()
            save_model(module, str(file))
            self.note(f"{name} history", history)

        self.stage(name, fresh, lambda: load_model(module, str(file)))

    def stage(self, name: str, fresh: Callable[[], Any], kept: Callable[[], Any]) -> Any:
        """What a stage makes, or made in an earlier run."""
        if name in self.log():
            return kept()
        start = perf_counter()
        made = fresh()
        self.note(name, round(perf_counter() - start, 1))
        return made

    def log(self) -> dict[str, Any]:
        """Seconds of each stage that has been, and what was measured in it."""
        file = self.folder / "log.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def note(self, key: str, value: Any) -> None:
        """Add to the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / "log.json.new"
        fresh.write_text(json.dumps(self.log() | {key: value}, indent=1))
        fresh.replace(self.folder / "log.json")
