"""Several questions about one video: ``python -m bench.questions [--model merv-tiny] [--questions 4] [--json FILE]``.

Asked together they cost one encoding, one prefill of the visual tokens, and a short prefill and decoding each; asked
one by one, as the reference answers them, each costs all of it. What ran is counted before it is timed: a line with
other counts or other answers has no time.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.pairs import THREADS, Line, check, compare, conclude
from merv_fast import MervModel, load_vid, sample_clip
from merv_fast.runtime.cache import VideoCache

__all__ = ["Work", "compare_questions", "count_work", "prompts_for"]

GREEDY = {"do_sample": False, "max_new_tokens": 8}
ASKED = (
    "What happens in this video?",
    "Which way does the ball move?",
    "How many shapes are there, and which of them moves first?",
    "Why?",
)


@dataclass
class Work:
    """What a call made the model do.

    ``encoded``: videos that went through the encoders. ``prefilled``: positions that went through the language model
    several at a time, of all rows, and ``visual`` those passes' rows that held visual tokens. ``decoded``: positions
    that went through it one at a time.
    """

    encoded: int = 0
    prefilled: int = 0
    visual: int = 0
    decoded: int = 0


def count_work(vidlm: MervModel, call: Callable[[], Any]) -> tuple[Any, Work]:
    """The result of ``call()``, and what it made ``vidlm`` do."""
    with _counted(vidlm) as work:
        return call(), work


@contextmanager
def _counted(vidlm: MervModel) -> Iterator[Work]:
    work = Work()
    visual_tokens = vidlm.model.video_model.num_video_tokens
    encoder = next(iter(vidlm.model.video_model.encoders.values()))

    def encoded(module: Any, args: tuple[Any, ...]) -> None:
        work.encoded += len(args[0])

    def passed(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows, positions = kwargs["inputs_embeds"].shape[:2]
        if positions == 1:
            work.decoded += rows
        else:
            work.prefilled += rows * positions
            work.visual += rows * (positions > visual_tokens)

    handles = [
        encoder.register_forward_pre_hook(encoded),
        vidlm.model.language_model.register_forward_pre_hook(passed, with_kwargs=True),
    ]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


def prompts_for(vidlm: MervModel, count: int) -> list[str]:
    """So many questions in the model's format."""
    prompts = []
    for index in range(count):
        builder = vidlm.get_prompt_builder()
        builder.add_turn(role="human", message=ASKED[index % len(ASKED)])
        prompts.append(builder.get_prompt())
    return prompts


def compare_questions(vidlm: MervModel, video: str | Path, count: int, rounds: int = 5) -> list[Line]:
    """Time ``count`` questions about ``video`` asked together against one by one, without and with what can be kept."""
    prompts = prompts_for(vidlm, count)

    def together() -> list[str]:
        return vidlm.generate(video, prompts, **GREEDY)

    def each() -> list[str]:
        return [vidlm.generate(video, prompt, **GREEDY) for prompt in prompts]

    def cached() -> list[str]:
        vidlm.cache = VideoCache()
        try:
            return each()
        finally:
            vidlm.cache = None

    def kept() -> list[str]:
        visual = vidlm.encode(video, prefill=True)
        return [vidlm.generate(visual, prompt, **GREEDY) for prompt in prompts]

    expected, apart = count_work(vidlm, each)
    check((apart.encoded, apart.visual) == (count, count), "questions one by one")
    for name, call, visual in (("together", together, 1), ("kept", kept, 1), ("cached", cached, count)):
        answers, work = count_work(vidlm, call)
        check(answers == expected and (work.encoded, work.visual) == (1, visual), f"questions {name}")
    others: dict[str, tuple[Callable[[], Any], float | None]] = {
        "one by one": (each, None),
        "one by one, tokens cached": (cached, None),
        "one by one, prefix kept": (kept, None),
    }
    return compare(f"{count} questions together", together, others, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="merv-tiny")
    parser.add_argument("--video", type=Path, default=sample_clip())
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the lines to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    vidlm = load_vid(arguments.model)
    conclude(compare_questions(vidlm, arguments.video, arguments.questions), arguments.json, {})


if __name__ == "__main__":
    main()
