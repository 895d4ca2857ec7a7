"""How long each stage of a run takes, and its name in a profiler."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["StageTimer"]


class StageTimer:
    """Adds up the wall-clock time of named stages, waiting for the device at both ends of each.

    Each stage is also a ``torch.profiler`` range, and an NVTX range on a CUDA device.

    Args:
        device: the device whose queued work belongs to a stage.

    Example:
        >>> timer = StageTimer(torch.device("cpu"))
        >>> with timer.stage("decode"):
        ...     pass
        >>> list(timer.milliseconds)
        ['decode']
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block under ``name``, adding to what earlier blocks of that name took."""
        self._wait()
        started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.nvtx.range_push(name)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._wait()
            if self.device.type == "cuda":
                torch.cuda.nvtx.range_pop()
            took = (time.perf_counter() - started) * 1e3
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + took

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
