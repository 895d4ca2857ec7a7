"""From decoded frames, and from a file, to visual tokens: ours, ours as one CUDA graph, and the reference's way."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.cases import EAGER, MERV, OURS, Case, Setup, Way
from bench.clip import CLIP, FRAMES, closest, no_cost, sampled
from bench.comparison import Entry
from bench.encoders import GRAPHED
from bench.waterfall import TECHNIQUES, Steps, all_frames, build, model_sizes
from merv_fast import MervModel, load_frames
from merv_fast.models.video_model import MervVideoModel

__all__ = ["FAST", "FRONT_END", "PLAIN", "SIDES", "entries", "models", "tokens_of"]

FRONT_END, FROM_FILE = "front end", "front end and decoding"
SIDES = {"cpu": (240, 320), "cuda": (720, 1280)}
PLAIN, FAST = frozenset[str](), frozenset(TECHNIQUES)


def entries(device: str) -> Iterator[Entry]:
    setup = Setup(device, torch.bfloat16 if device == "cuda" else torch.float32, MERV)
    yield Entry(from_frames(setup), setup, needs={EAGER: ["PIL"]})
    needs = {OURS: ["av"], GRAPHED: ["av"], EAGER: ["av", "decord", "PIL"]}
    yield Entry(from_file(setup), setup, needs=needs, least=5)


def from_frames(setup: Setup) -> Case:
    """Frames start on the host."""
    height, width = SIDES[setup.device]

    def make() -> tuple:
        frames = torch.randint(0, 256, (FRAMES, height, width, 3), dtype=torch.uint8)
        return *models(setup, frames), frames

    def ours(vidlm: MervModel, wholes: nn.ModuleList, graphed: None, frames: Tensor) -> Tensor:
        return Steps(vidlm, wholes, FAST).encode(frames)[1]

    def replayed(vidlm: MervModel, wholes: nn.ModuleList, graphed: MervVideoModel, frames: Tensor) -> Tensor:
        return tokens_of(graphed, frames)

    def theirs(vidlm: MervModel, wholes: nn.ModuleList, graphed: None, frames: Tensor) -> Tensor:
        return Steps(vidlm, wholes, PLAIN).encode(frames)[1]

    ways = [Way(OURS, ours, [theirs]), Way(EAGER, theirs, [theirs])]
    if setup.device == "cuda":
        ways.append(Way(GRAPHED, replayed, [theirs]))
    return Case(f"{FRONT_END}, {height}p, {model_sizes(setup)}", 1, make, theirs, ways, no_cost)


def from_file(setup: Setup) -> Case:
    """The bundled clip, decoded on the CPU."""

    def make() -> tuple:
        return models(setup, load_frames(CLIP, FRAMES))

    def ours(vidlm: MervModel, wholes: nn.ModuleList, graphed: None) -> Tensor:
        return Steps(vidlm, wholes, FAST).encode(None)[1]

    def replayed(vidlm: MervModel, wholes: nn.ModuleList, graphed: MervVideoModel) -> Tensor:
        return tokens_of(graphed, load_frames(CLIP, FRAMES))

    def theirs(vidlm: MervModel, wholes: nn.ModuleList, graphed: None) -> tuple[Steps, Tensor]:
        steps = Steps(vidlm, wholes, PLAIN)
        return steps, steps.encode(None)[0]

    def shown(result: tuple[Steps, Tensor]) -> Tensor:
        # Another FFmpeg may round their colours otherwise: it goes on with the frames to which they are nearest.
        steps, frames = result
        return steps.encode(closest(frames, all_frames()))[1]

    def right(vidlm: MervModel, wholes: nn.ModuleList, graphed: None) -> Tensor:
        return Steps(vidlm, wholes, PLAIN).encode(sampled(all_frames()))[1]

    ways = [Way(OURS, ours, [right]), Way(EAGER, theirs, [right], shown)]
    if setup.device == "cuda":
        ways.append(Way(GRAPHED, replayed, [right]))
    return Case(f"{FROM_FILE}, the bundled clip, {model_sizes(setup)}", 1, make, right, ways, no_cost)


def models(setup: Setup, frames: Tensor) -> tuple[MervModel, nn.ModuleList, MervVideoModel | None]:
    """Ours, the reference's encoders, and on a GPU ours with one graph for such frames; the same weights in all."""
    vidlm, wholes = build(setup)
    if setup.device == "cpu":
        return vidlm, wholes, None
    graphed = copy.deepcopy(vidlm.model.video_model)
    graphed.use_graphs()
    for _ in range(2):
        tokens_of(graphed, frames)
    if not graphed.graphs.whole.buckets:
        raise RuntimeError(f"front end: it must be one graph, got {graphed.graphs}")
    return vidlm, wholes, graphed


@torch.no_grad()
def tokens_of(model: MervVideoModel, frames: Tensor) -> Tensor:
    """``[S, D]`` of frames ``[F, H, W, 3]``."""
    return model.get_video_features(frames.movedim(-1, 1)[None]).pooler_output[0]
