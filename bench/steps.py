"""A step of the whole model: from decoded frames to the first token of an answer."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.cases import EAGER, MERV, OURS, Case, Setup, Way
from bench.clip import FRAMES, no_cost, prompts
from bench.comparison import Entry
from bench.front_end import SIDES
from bench.waterfall import TECHNIQUES, Steps, build, model_sizes
from merv_fast import MervModel
from merv_fast.models.requests import VisualTokens

__all__ = ["FIRST_TOKEN", "entries"]

FIRST_TOKEN = "first token"
GREEDY = {"do_sample": False, "max_new_tokens": 1}


def entries(device: str) -> Iterator[Entry]:
    setup = Setup(device, torch.bfloat16 if device == "cuda" else torch.float32, MERV)
    yield Entry(first_token(setup), setup, needs={EAGER: ["PIL"]})


def first_token(setup: Setup) -> Case:
    """Prepare, encode, fuse, prefill."""
    height, width = SIDES[setup.device]
    name = f"{FIRST_TOKEN}, {height}p, {model_sizes(setup)}"

    def make() -> tuple:
        return *build(setup), torch.randint(0, 256, (FRAMES, height, width, 3), dtype=torch.uint8)

    def step(vidlm: MervModel, wholes: nn.ModuleList, frames: Tensor, ours: bool) -> Tensor:
        _, tokens = Steps(vidlm, wholes, frozenset(TECHNIQUES if ours else ())).encode(frames)
        vidlm.generate(VisualTokens(tokens, None), prompts(vidlm)[0], **GREEDY)
        return tokens

    def ours(vidlm: MervModel, wholes: nn.ModuleList, frames: Tensor) -> Tensor:
        return step(vidlm, wholes, frames, ours=True)

    def theirs(vidlm: MervModel, wholes: nn.ModuleList, frames: Tensor) -> Tensor:
        return step(vidlm, wholes, frames, ours=False)

    return Case(name, 1, make, theirs, [Way(OURS, ours, [theirs]), Way(EAGER, theirs, [theirs])], no_cost)
