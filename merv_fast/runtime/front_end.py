"""From decoded frames to visual tokens as one CUDA graph, and its steps as graphs of their own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from merv_fast.runtime.concurrent import ConcurrentEncoders
from merv_fast.runtime.graphs import CUDA_GRAPHS, GraphedCall, GraphPool, Graphs, remember

__all__ = ["FrontEndGraphs"]

SIDE = 64
"""Of the frames on which it is tried out whether preparing them can be captured."""


class FrontEndGraphs:
    """``replay`` does all at once; ``encode`` and ``fuse`` can be called by themselves, as features are kept too.

    The graphs share memory. A small video is captured at once, by which is found out what can be. Unless that was done
    before, encoders are measured first: the lanes of ``concurrent`` are then planned by what each takes.

    Args:
        prepare: from uint8 frames ``[B, F, H, W, 3]``, and the dtype of the weights, to E inputs.
        concurrent: runs the encoders where no graph does; its lanes and costs hold for captures too.
        tail: from a list of features to tensors.
        num_frames: F.
        max_graphs: shapes kept of each of the three.
        max_bytes: of all graphs and buffers, or None.
        graphs: what captures and replays; for tests.

    Attributes:
        whole: from one batch of frames to what ``tail`` gives, or None where no graph serves.
        encode: from E inputs to E features.
        fuse: from E features to what ``tail`` gives.

    Raises:
        ValueError: ``max_graphs`` is not positive.
    """

    def __init__(
        self,
        prepare: Callable[[Tensor, torch.dtype], list[Tensor]],
        concurrent: ConcurrentEncoders,
        tail: nn.Module,
        num_frames: int,
        *,
        max_graphs: int = 4,
        max_bytes: int | None = None,
        graphs: Graphs = CUDA_GRAPHS,
    ) -> None:
        held: Any = concurrent.encoders
        encoders = held if isinstance(held, nn.Module) else held_together(concurrent.modules())
        # On streams of its own: another thread may encode without a graph while this is captured.
        captured = ConcurrentEncoders(held, streams=graphs)

        def encode(inputs: list[Tensor]) -> list[Any]:
            captured.lanes, captured.costs = concurrent.lanes, concurrent.costs
            return captured(inputs)

        def whole(inputs: list[Tensor]) -> Any:
            (frames,) = inputs
            return tail(encode(prepare(frames, dtype_of(encoders, tail))))

        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self._meeting = Lock()
        self.pool = GraphPool(max_bytes, graphs)
        self.encode = GraphedCall(encode, encoders, plain=concurrent, max_graphs=max_graphs, pool=self.pool)
        self.fuse = GraphedCall(tail, tail, max_graphs=max_graphs, pool=self.pool)
        self.whole = GraphedCall(
            whole,
            held_together([encoders, tail]),
            plain=lambda inputs: None,
            max_graphs=max_graphs,
            pool=self.pool,
        )
        if self.obstacle is None:
            # Inputs come, as features go, where the tail is.
            device = next(chain(tail.parameters(), encoders.parameters())).device
            frames = torch.zeros(1, num_frames, SIDE, SIDE, 3, dtype=torch.uint8, device=device)
            with torch.no_grad():
                inputs = prepare(frames, dtype_of(encoders, tail))
                concurrent.costs = concurrent.costs or captured.measure(inputs)
                self.encode.try_out(inputs)
                self.fuse.try_out(self.encode(inputs))
                self.whole.try_out([frames])
            # Its memory serves the graphs of frames that do come.
            self.whole.clear()

    def replay(self, frames: Tensor) -> Any:
        """What ``tail`` gives for ``frames`` by one graph, or None: then the steps are to be taken.

        Videos differ in size where encoders' inputs do not, and a capture takes as long as several calls: frames of a
        shape are captured when it comes for the second time.

        Args:
            frames: uint8 ``[B, F, H, W, 3]``, on the device of the weights.
        """
        with self._meeting:
            met = frames.shape in self._met
            remember(self._met, frames.shape, None)
        return self.whole([frames]) if met else None

    @property
    def obstacle(self) -> str | None:
        """Why one of the three runs without graphs, or None."""
        for call in self.pool.calls:
            call.check()
        return next((call.obstacle for call in self.pool.calls if call.obstacle), None)

    def __str__(self) -> str:
        for call in self.pool.calls:
            call.check()
        calls = f"from frames to tokens: {self.whole}; encode: {self.encode}; fuse: {self.fuse}"
        return f"{calls}; {self.pool.bytes / 2**20:.0f} MiB together"

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy of the model has its own weights, and no graphs of them.
        return type(None), ()


def held_together(modules: Iterable[nn.Module]) -> nn.ModuleList:
    """One module of several, whose modes are their own."""
    together = nn.ModuleList(modules)
    together.training = False
    return together


def dtype_of(*modules: nn.Module) -> torch.dtype:
    """Of the first weight that is a floating-point number, as transformers has it."""
    weights = chain.from_iterable(module.parameters() for module in modules)
    return next(weight.dtype for weight in weights if weight.is_floating_point())
