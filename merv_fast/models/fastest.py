"""How the encoders of a model run fastest on this machine, found out by running them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from merv_fast.models.video_model import MervVideoModel

__all__ = ["WAYS", "use_fastest"]

WAYS = {
    "plain": (False, False),
    "graphs": (True, False),
    "compiled": (False, True),
    "compiled, graphs": (True, True),
}
"""Whether there are CUDA graphs, and whether blocks are compiled."""

TIE = 1.03
"""How much longer a way may take than the fastest and be chosen all the same, if it comes before: so much is noise."""

REPEATS = 10


@torch.no_grad()
def use_fastest(model: MervVideoModel, *, compiled: bool = True) -> Mapping[str, float]:
    """Let the encoders run the way that takes the least time for one video here: `WAYS` has the names.

    CUDA graphs (``model.use_graphs``) and compiled blocks (``model.use_compile``) are tried, each alone and together.
    What was set before is given up; it is set again, but for options, if anything fails. The model should be where, and
    in the dtype and with the attention, in which it will be used. To compile takes a minute or so.

    Args:
        model: in evaluation mode.
        compiled: whether to try that.

    Returns:
        Milliseconds of each way that was tried, that which was chosen first; as `explain` prints them.

    Raises:
        ValueError: the model is in training mode, or on the ``meta`` device.

    Example:
        >>> import merv_fast
        >>> video_model = merv_fast.load_vid("merv-tiny").model.video_model
        >>> list(use_fastest(video_model, compiled=False))
        ['plain']
    """
    if model.training or model.device.type == "meta":
        got = "one in training mode" if model.training else "one on meta"
        raise ValueError(f"use_fastest: model must be in evaluation mode on a device, got {got}")
    count = max(config.num_frames for config in model.encoder_configs.values())
    frames = torch.zeros(1, count, 3, 64, 64, dtype=torch.uint8, device=model.device)
    with as_before(model):
        inputs = model.prepare(frames)
        found: dict[str, float] = {}
        for name, (graphs, blocks) in WAYS.items():
            if blocks and not compiled:
                continue
            set_way(model, name)
            if not graphs or (model.graphs is not None and model.graphs.encode.obstacle is None):
                found[name] = measure(model, inputs)
        best = min(found.values())
        chosen = next(name for name, milliseconds in found.items() if milliseconds <= TIE * best)
    set_way(model, chosen)
    model.ways = {chosen: found[chosen]} | found
    return model.ways


def set_way(model: MervVideoModel, name: str) -> None:
    graphs, blocks = WAYS[name]
    model.use_compile(blocks)
    model.use_graphs(4 if graphs else None)


def measure(model: MervVideoModel, inputs: list[Tensor]) -> float:
    """Median milliseconds of encoding one video."""
    gpu = model.device.type == "cuda"
    times = []
    # The first compiles and captures, the second meets what both have left behind.
    for _ in range(2 + REPEATS):
        started = time.perf_counter()
        model.encode(inputs)
        if gpu:
            torch.cuda.current_stream(model.device).synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[2:])


@contextmanager
def as_before(model: MervVideoModel) -> Iterator[None]:
    """What was compiled and captured is so again after an error."""
    compiled, graphs = model.compiled, model.graphs
    try:
        yield
    except BaseException:
        model.use_compile(compiled)
        model.use_graphs(graphs.encode.max_graphs if graphs is not None else None)
        raise
