"""The bundled clip as cases: file to frames, to the encoders' inputs, and to the answers of merv-tiny. On the CPU."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench import baselines
from bench.cases import MERV, OURS, Case, Setup, Way
from bench.comparison import Entry
from bench.cpu import COUNTS, RECIPES, prepare_each
from merv_fast import MervModel, load_frames, load_vid, sample_clip
from merv_fast.kernels._launch import Cost
from merv_fast.video.prepare import prepare_all

__all__ = ["entries"]

FRAMES, LENGTH = 32, 100
"""Frames that are sampled, of so many."""
DECORD, BOTH, AGAIN, ONCE = "decord", "decord + Pillow", "encoded for each question", "encoded once, asked one by one"
QUESTIONS = ("What happens in this video?", "Which way does the ball move?", "What color is the box?")
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}

CLIP = str(sample_clip())


def entries() -> Iterator[Entry]:
    setup = Setup("cpu", torch.float32, MERV)
    yield Entry(decoding(), setup, needs={OURS: ["av"], DECORD: ["av", "decord"]})
    yield Entry(reading(), setup, needs={OURS: ["av", "PIL"], BOTH: ["av", "PIL", "decord"]})
    yield Entry(asking(), setup, needs={impl: ["av"] for impl in (OURS, ONCE, AGAIN)})


def decoding() -> Case:
    """Frames in their places: every frame of the clip is what is chosen from."""

    def make() -> tuple[Tensor]:
        return (load_frames(CLIP, LENGTH),)

    def ours(every: Tensor) -> Tensor:
        return load_frames(CLIP, FRAMES)

    def theirs(every: Tensor) -> Tensor:
        return baselines.load_frames(CLIP, FRAMES)

    def nearest(frames: Tensor) -> Tensor:
        """Which frames of the clip they are: another FFmpeg may round their colours otherwise."""
        return closest(frames, load_frames(CLIP, LENGTH))

    ways = [Way(OURS, ours, [sampled]), Way(DECORD, theirs, [sampled], nearest)]
    return Case("load_frames, the bundled clip", 1, make, sampled, ways, no_cost)


def reading() -> Case:
    """Frames in their places, as the four encoders want them."""

    def make() -> tuple[Tensor]:
        return (load_frames(CLIP, LENGTH),)

    def ours(every: Tensor) -> list[Tensor]:
        return prepare_all(load_frames(CLIP, FRAMES), RECIPES, COUNTS)

    def theirs(every: Tensor) -> list[Tensor]:
        return prepare_each(baselines.load_frames(CLIP, FRAMES), torch.float32)

    def plainly(every: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return prepare_each(sampled(every), dtype)

    def nearest(inputs: list[Tensor]) -> list[Tensor]:
        every = load_frames(CLIP, LENGTH)
        whole = [baselines.prepare(every, recipe) for recipe in RECIPES]
        return [closest(frames, among) for frames, among in zip(inputs, whole, strict=True)]

    low = partial(plainly, dtype=torch.float32)
    ways = [Way(OURS, ours, [low]), Way(BOTH, theirs, [low], nearest)]
    return Case("prepare_all, from the bundled clip's file", 1, make, plainly, ways, no_cost)


def sampled(every: Tensor) -> Tensor:
    """The frames that MERV samples."""
    return every[torch.linspace(0, len(every) - 1, FRAMES, dtype=torch.float64).long()]


def closest(frames: Tensor, among: Tensor) -> Tensor:
    """For each of ``frames`` that of ``among`` from which it differs least."""
    return among[torch.cdist(frames.flatten(1).double(), among.flatten(1).double()).argmin(1)]


def asking() -> Case:
    """Three questions about one video; greedy, so that the answers must agree."""

    def make() -> tuple[MervModel]:
        return (load_vid("merv-tiny"),)

    def ours(model: MervModel) -> list[str]:
        return model.generate(CLIP, prompts(model), **GREEDY)

    def one_by_one(model: MervModel) -> list[str]:
        video = model.encode(CLIP)
        return [model.generate(video, prompt, **GREEDY) for prompt in prompts(model)]

    def again(model: MervModel) -> list[str]:
        return baselines.ask_each(model, CLIP, prompts(model), **GREEDY)

    def right(model: MervModel) -> list[Tensor]:
        return letters(again(model))

    ways = [Way(OURS, ours, [right], letters), Way(ONCE, one_by_one, [right], letters)]
    ways.append(Way(AGAIN, again, [right], letters))
    return Case("generate, three questions to merv-tiny about the bundled clip", 1, make, right, ways, no_cost)


def prompts(model: MervModel) -> list[str]:
    found = []
    for question in QUESTIONS:
        builder = model.get_prompt_builder()
        builder.add_turn(role="human", message=question)
        found.append(builder.get_prompt())
    return found


def letters(texts: Sequence[str]) -> list[Tensor]:
    """Texts as what can be compared."""
    return [torch.tensor(list(text.encode()), dtype=torch.uint8) for text in texts]


def no_cost(*arguments: Tensor) -> Cost:
    """Neither is counted."""
    return Cost(0, 0)
