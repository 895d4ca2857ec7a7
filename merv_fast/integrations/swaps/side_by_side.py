"""Encoders that somebody else calls one after another, on streams of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from merv_fast.integrations.swaps.deferred import Deferred
from merv_fast.integrations.swaps.findings import Swap
from merv_fast.runtime.streams import CUDA, Streams

__all__ = ["find_lanes"]

LANE = "_merv_fast_lane"
"""Where a module keeps the number of its stream, and the forward that runs there."""


def find_lanes(model: Any, streams: Streams = CUDA) -> dict[nn.Module, Swap]:
    """Swaps of a model's encoders that are called one after another and used when all have been called.

    Those are the reference's ``video_backbones``, and ``dino_featurizer`` and ``siglip_featurizer`` of prismatic. Each
    begins when the caller's stream is done with what it has been given. What it returns can be passed on at once;
    the caller's stream waits when something is computed from it.
    """
    encoders: Sequence[nn.Module] = [
        module
        for name in ("dino_featurizer", "siglip_featurizer")
        if isinstance(module := getattr(model, name, None), nn.Module)
    ]
    if isinstance(backbones := getattr(model, "video_backbones", None), nn.ModuleList):
        encoders = list(backbones)
    if len(encoders) < 2:
        return {}
    why = f"one of {len(encoders)} encoders that do not wait for each other"
    return {
        encoder: Swap(aside, "a stream of its own on a GPU", why, {LANE: (number, encoder.forward, streams)})
        for number, encoder in enumerate(encoders)
    }


def aside(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
    """What the module's forward returns, on a GPU from a stream of its own."""
    number, forward, streams = vars(module)[LANE]
    if not (isinstance(x, Tensor) and on_gpu(x)) or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return forward(x, *args, **kwargs)
    device = x.device
    lane, caller = streams.side(device, number), streams.current(device)
    streams.wait(lane, caller)
    for given in (x, *args):
        if isinstance(given, Tensor):
            streams.keep(given, lane)
    with streams.use(lane):
        output = forward(x, *args, **kwargs)
    if type(output) is not Tensor:
        streams.wait(caller, lane)
        return output
    return Deferred(joining(output, lane, streams), output.shape, output)


def joining(output: Tensor, lane: Any, streams: Streams) -> Callable[[], Tensor]:
    """Waits for ``lane`` on whatever stream first needs its output."""

    def join() -> Tensor:
        caller = streams.current(output.device)
        streams.wait(caller, lane)
        streams.keep(output, caller)
        return output

    return join


def on_gpu(x: Tensor) -> bool:
    """Whether there is a stream to run on."""
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()
