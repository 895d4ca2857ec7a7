"""What is needed of CUDA to let work run side by side."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CUDA", "Streams"]


class Streams(Protocol):
    """Streams of GPUs: work on one runs in order, work on two runs in any order unless one waits for the other."""

    def current(self, device: torch.device) -> Any:
        """The stream of ``device`` on which the caller works."""

    def side(self, device: torch.device, number: int) -> Any:
        """A stream of ``device`` for work beside the caller's: the same for the same number."""

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Work in this block goes to ``stream``."""

    def wait(self, waiting: Any, awaited: Any) -> None:
        """Work given to ``waiting`` from now on begins when what ``awaited`` has been given so far is done."""

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """The memory of ``tensor`` is not given away before what ``stream`` has been given so far is done."""

    def synchronise(self, device: torch.device) -> None:
        """Wait for what the stream of ``device`` on which the caller works has been given so far.

        Not for the whole device: CUDA does not allow that while another thread captures a graph.
        """


class _CudaStreams:
    """PyTorch's."""

    def current(self, device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.current_stream(device)

    # There is one object, and streams live as long as the process.
    @cache  # noqa: B019
    def side(self, device: torch.device, number: int) -> torch.cuda.Stream:
        return torch.cuda.Stream(device)

    def use(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def wait(self, waiting: torch.cuda.Stream, awaited: torch.cuda.Stream) -> None:
        waiting.wait_stream(awaited)

    def keep(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        if tensor.is_cuda:
            tensor.record_stream(stream)

    def synchronise(self, device: torch.device) -> None:
        torch.cuda.current_stream(device).synchronize()


CUDA: Streams = _CudaStreams()
