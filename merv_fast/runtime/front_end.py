"""Encoders side by side, and what makes visual tokens of their features, as CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from merv_fast.modules.weighing import WeighingFusion
from merv_fast.runtime.concurrent import ConcurrentEncoders
from merv_fast.runtime.graphs import CUDA_GRAPHS, GraphedCall, GraphPool, Graphs

__all__ = ["FrontEndGraphs"]


class FrontEndGraphs:
    """``encode`` and ``fuse`` as graphs that share memory; each can be called by itself, as features are kept too.

    One video is captured at once, by which is found out whether it can be.

    Args:
        concurrent: runs the encoders where no graph does; its lanes and costs hold for captures too.
        tail: from a list of features to tensors.
        shapes: of the encoders' inputs for one video.
        max_graphs: shapes kept of each of the two.
        max_bytes: of all graphs and buffers, or None.
        graphs: what captures and replays; for tests.

    Attributes:
        encode: from E inputs to E features.
        fuse: from E features to what ``tail`` gives.

    Raises:
        ValueError: ``max_graphs`` is not positive.
    """

    def __init__(
        self,
        concurrent: ConcurrentEncoders,
        tail: nn.Module,
        shapes: Sequence[Sequence[int]],
        *,
        max_graphs: int = 4,
        max_bytes: int | None = None,
        graphs: Graphs = CUDA_GRAPHS,
    ) -> None:
        held: Any = concurrent.encoders
        encoders = held if isinstance(held, nn.Module) else nn.ModuleList(concurrent.modules())
        # On streams of its own: another thread may encode without a graph while this is captured.
        captured = ConcurrentEncoders(held, streams=graphs)

        def encode(inputs: list[Tensor]) -> list[Any]:
            captured.lanes, captured.costs = concurrent.lanes, concurrent.costs
            return captured(inputs)

        def forget() -> None:
            """Let a capture fold the query, so that replays do it with the weights of their time."""
            for part in tail.modules():
                if isinstance(part, WeighingFusion):
                    part.train(part.training)

        self.pool = GraphPool(max_bytes, graphs)
        self.encode = GraphedCall(encode, encoders, plain=concurrent, max_graphs=max_graphs, pool=self.pool)
        self.fuse = GraphedCall(tail, tail, refresh=forget, max_graphs=max_graphs, pool=self.pool)
        if self.obstacle is None:
            # Inputs come, as features go, where the tail is.
            weight = next(chain(tail.parameters(), encoders.parameters()))
            inputs = [torch.zeros(*shape, dtype=weight.dtype, device=weight.device) for shape in shapes]
            self.encode.try_out(inputs)
            with torch.no_grad():
                self.fuse.try_out(self.encode(inputs))

    @property
    def obstacle(self) -> str | None:
        """Why one of the two runs without graphs, or None."""
        return self.encode.obstacle or self.fuse.obstacle

    def __str__(self) -> str:
        return f"encode: {self.encode}; fuse: {self.fuse}; {self.pool.bytes / 2**20:.0f} MiB together"

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy of the model has its own weights, and no graphs of them.
        return type(None), ()
