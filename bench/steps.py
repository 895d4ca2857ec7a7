"""A step of the whole model: from decoded frames to the first token of an answer."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.cases import EAGER, MERV, OURS, Case, Setup, Way
from bench.clip import FRAMES, no_cost, prompts
from bench.comparison import Entry
from bench.encoders import GRAPHED
from bench.front_end import FAST, PLAIN, SIDES, models, tokens_of
from bench.waterfall import Steps, model_sizes
from merv_fast import MervModel
from merv_fast.models.requests import VisualTokens
from merv_fast.models.video_model import MervVideoModel

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
        frames = torch.randint(0, 256, (FRAMES, height, width, 3), dtype=torch.uint8)
        return *models(setup, frames), frames

    def step(vidlm: MervModel, tokens: Tensor) -> Tensor:
        vidlm.generate(VisualTokens(tokens, None), prompts(vidlm)[0], **GREEDY)
        return tokens

    def ours(vidlm: MervModel, wholes: nn.ModuleList, graphed: None, frames: Tensor) -> Tensor:
        return step(vidlm, Steps(vidlm, wholes, FAST).encode(frames)[1])

    def replayed(vidlm: MervModel, wholes: nn.ModuleList, graphed: MervVideoModel, frames: Tensor) -> Tensor:
        return step(vidlm, tokens_of(graphed, frames))

    def theirs(vidlm: MervModel, wholes: nn.ModuleList, graphed: None, frames: Tensor) -> Tensor:
        return step(vidlm, Steps(vidlm, wholes, PLAIN).encode(frames)[1])

    ways = [Way(OURS, ours, [theirs]), Way(EAGER, theirs, [theirs])]
    if setup.device == "cuda":
        ways.append(Way(GRAPHED, replayed, [theirs]))
    return Case(name, 1, make, theirs, ways, no_cost)
