"""The way from nothing to merv-tiny, stage by stage, each kept in a folder: a run goes on where it was stopped."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load_model, save_model

from merv_fast.encoders import VisionTransformer
from merv_fast.models.merv_model import MervModel
from merv_fast.training.tiny.aligning import align
from merv_fast.training.tiny.answering import learn_to_answer
from merv_fast.training.tiny.clips import Clips, make_clips
from merv_fast.training.tiny.model import build_tiny
from merv_fast.training.tiny.pretraining import pretrain, see
from merv_fast.training.tiny.questions import questions_about
from merv_fast.training.tiny.scenes import draw_scene

__all__ = ["Run"]

logger = logging.getLogger("merv_fast")

TEXTS = 1500
"""Scenes whose questions the tokenizer is made of: every word is in some of them."""

PRETRAINING = {"languagebind": 1, "dinov2": 5, "vivit": 2, "siglip": 5}

T = TypeVar("T")
U = TypeVar("U")
History = list[dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        folder: where everything goes: clips, encoders, features, the model, and ``log.json``.
        seed: all else follows from it.
        count: of clips.
        pretraining: how often each encoder sees each clip; of what sees single frames, one slot.
        word_steps: batches of `align`.
        answer_epochs: how often each clip is asked about.
        batch: clips of a step of `pretrain`, and half of those of `learn_to_answer`.
        processes: that make clips, train encoders, each of them one after the other, and learn to answer together.
    """

    folder: Path
    seed: int = 1
    count: int = 10000
    pretraining: Mapping[str, int] = field(default_factory=lambda: dict(PRETRAINING))
    word_steps: int = 1200
    answer_epochs: int = 7
    batch: int = 8
    processes: int = 2

    def __call__(self) -> MervModel:
        """Run every stage that has not been, and return the model."""
        for name, stage in {"clips": self.make, "encoders": self.encoders, "words": self.words}.items():
            self.stage(name, stage)
        with TemporaryDirectory() as meeting:
            self.stage("answers", partial(self.answers, meeting))
        return self.kept("answers")

    def start(self, **changes: Any) -> MervModel:
        """The model before it has learned anything; ``changes`` are those of `tiny_config`."""
        texts: list[str] = []
        for index in range(TEXTS):
            rng = np.random.default_rng([self.seed, index, 1])
            asked = questions_about(draw_scene(rng, training=False), rng)
            texts += [text for question in asked for text in (f"In: {question.text}\nOut:", question.answer)]
        return build_tiny(texts, self.seed, **changes)

    def make(self) -> None:
        """Make the clips."""
        make_clips(self.seed, self.count, self.folder / "clips", processes=self.processes)

    def read(self) -> Clips:
        """The clips."""
        return Clips.read(self.folder / "clips", self.seed)

    def encoders(self) -> None:
        """Train those encoders that have not been, as many side by side as there are processes."""
        left = [name for name in self.pretraining if name not in self.log()]
        for name, (seconds, history) in zip(left, self.side_by_side(self.encoder, left), strict=True):
            self.note(f"{name} history", history)
            self.note(name, seconds)

    def encoder(self, name: str) -> tuple[float, History]:
        """Train an encoder, keep it and what it sees; return seconds and the log."""
        start, alone = perf_counter(), self.processes == 1
        clips, encoder = self.read(), cast(VisionTransformer, self.start().model.video_model.encoders[name])
        history = pretrain(encoder, name, clips, self.pretraining[name], self.batch, seed=self.seed, progress=alone)
        save_model(encoder, str(self.folder / f"{name}.safetensors"))
        np.save(self.folder / f"{name}.npy", see(encoder, name, clips, progress=alone))
        return round(perf_counter() - start, 1), history

    def words(self) -> None:
        """Align projectors and fusion."""
        model = self.start()
        for name, encoder in model.model.video_model.encoders.items():
            load_model(encoder, self.folder / f"{name}.safetensors")
        clips, steps = self.read(), self.word_steps
        history = align(model.model, model.tokenizer, clips, self.features(), steps, seed=self.seed)
        save_model(model.model, str(self.folder / "words.safetensors"))
        self.note("words history", history)

    def answers(self, meeting: str) -> None:
        """Learn to answer, each process from its share of every batch."""
        found = list(self.side_by_side(partial(self.answer, meeting), range(self.processes)))
        self.note("answers history", found[0])

    def answer(self, meeting: str, rank: int) -> History:
        """One process that learns to answer; all come to the same weights, and the first one keeps them."""
        model, ranks = self.kept("words"), self.processes
        if ranks > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}/{ranks}", rank=rank, world_size=ranks)
        learn = partial(learn_to_answer, model.model, model.tokenizer, self.read(), self.features())
        history = learn(self.answer_epochs, 2 * self.batch, seed=self.seed, rank=rank, ranks=ranks)
        if rank == 0:
            save_model(model.model, str(self.folder / "answers.safetensors"))
        if ranks > 1:
            dist.destroy_process_group()
        return history

    def side_by_side(self, work: Callable[[T], U], items: Sequence[T]) -> Iterator[U]:
        """What comes of each item, in processes that share the cores; if there is to be one, in this one."""
        if self.processes == 1:
            yield from map(work, items)
            return
        share = partial(share_cores, self.processes, logger.getEffectiveLevel())
        with ProcessPoolExecutor(self.processes, get_context("spawn"), share) as pool:
            yield from pool.map(work, items)

    def kept(self, name: str) -> MervModel:
        """The model as a stage has left it."""
        model = self.start()
        load_model(model.model, self.folder / f"{name}.safetensors")
        return model

    def features(self) -> list[NDArray[np.float16]]:
        """What the encoders return for the clips."""
        return [np.load(self.folder / f"{name}.npy", mmap_mode="c") for name in self.pretraining]

    def stage(self, name: str, work: Callable[[], None]) -> None:
        """Do what has not been done in an earlier run."""
        if name not in self.log():
            start = perf_counter()
            work()
            self.note(name, round(perf_counter() - start, 1))

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


def share_cores(processes: int, level: int) -> None:
    """In a process that is one of several at work."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    logging.basicConfig(level=level, format="%(message)s")
