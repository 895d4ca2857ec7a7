"""How long each stage of a run takes, and the ranges that profilers show for stages and for calls of modules."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from merv_fast.runtime.peaks import PeakMemory
from merv_fast.spans import nvtx_ranges, span

__all__ = ["CallSpans", "StageTimer", "nvtx_ranges", "span"]

Name = str | Callable[[tuple[Any, ...], Mapping[str, Any]], str | None]
"""Of a span, or what makes it of a call's arguments; None for no span."""


class StageTimer:
    """Adds up the wall-clock time of named stages, waiting for the caller's stream at both ends of each.

    Each stage is also a `span`. Its peak of memory on GPUs is noted too, for which PyTorch's own count of the peak
    (``torch.cuda.max_memory_allocated``) starts anew at each stage.

    Args:
        device: whose work, queued on the caller's stream, belongs to a stage.
        others: GPUs whose memory counts beside that of ``device``.
        host_memory: whether the memory of the process counts as well; on Linux.

    Attributes:
        milliseconds: of each stage.
        peak_bytes: `PeakMemory` of each stage, that of other threads among it; empty where nothing is counted.

    Example:
        >>> timer = StageTimer(torch.device("cpu"))
        >>> with timer.stage("decode"):
        ...     pass
        >>> list(timer.milliseconds)
        ['decode']
    """

    def __init__(self, device: torch.device, others: Sequence[torch.device] = (), *, host_memory: bool = False) -> None:
        self.device = device
        self._peak = PeakMemory([device, *others], host=host_memory)
        self.milliseconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block under ``name``, adding to what earlier blocks of that name took."""
        self._wait()
        self._peak.start()
        started = time.perf_counter()
        try:
            with span(name):
                try:
                    yield
                finally:
                    self._wait()
        finally:
            took = (time.perf_counter() - started) * 1e3
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + took
            if (peak := self._peak.read()) is not None:
                self.peak_bytes[name] = max(peak, self.peak_bytes.get(name, 0))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            # Not for the device: another thread may be capturing a graph.
            torch.cuda.current_stream(self.device).synchronize()


class CallSpans:
    """A `span` around each call of modules, by hooks that are gone after the ``with`` block.

    A module that is compiled keeps its graph and shows no spans inside it. Threads do not see each other's.

    Example:
        >>> with CallSpans() as calls, torch.profiler.profile() as profile:
        ...     layer = nn.Linear(2, 2)
        ...     calls.around(layer, "encode/layer")
        ...     _ = layer(torch.ones(1, 2))
        >>> "merv/encode/layer" in {event.key for event in profile.key_averages()}
        True
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._local = threading.local()

    def __enter__(self) -> CallSpans:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._close(0)

    def around(self, module: nn.Module, name: Name) -> None:
        """A span for each call of ``module``; spans that an exception left open inside end with it."""
        self.between(module, module, name)

    def between(self, first: nn.Module, last: nn.Module, name: Name) -> None:
        """A span from the start of a call of ``first`` to the end of one of ``last``."""
        mark = object()
        self._handles += [
            first.register_forward_pre_hook(
                lambda _, args, kwargs: self._start(mark, name, args, kwargs), with_kwargs=True
            ),
            last.register_forward_hook(lambda *_: self._stop(mark), always_call=True),
        ]

    def gap(self, first: nn.Module, last: nn.Module, name: Name) -> None:
        """A span from the end of a call of ``first``, whose arguments ``name`` gets, to the start of ``last``'s."""
        mark = object()
        self._handles += [
            first.register_forward_hook(
                lambda _, args, kwargs, out: self._start(mark, name, args, kwargs), with_kwargs=True
            ),
            last.register_forward_pre_hook(lambda *_: self._stop(mark)),
        ]

    def _start(self, mark: object, name: Name, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        known = name if isinstance(name, str) else name(args, kwargs)
        if known is not None:
            opened = span(known)
            opened.__enter__()
            self._open.append((mark, opened))

    def _stop(self, mark: object) -> None:
        """End the innermost span of ``mark``, if there is one, and what an exception left open inside."""
        if torch.compiler.is_dynamo_compiling():
            return
        depths = [depth for depth, (other, _) in enumerate(self._open) if other is mark]
        if depths:
            self._close(depths[-1])

    @property
    def _open(self) -> list[tuple[object, AbstractContextManager[None]]]:
        """This thread's spans, the innermost last."""
        if not hasattr(self._local, "spans"):
            self._local.spans = []
        return self._local.spans

    def _close(self, depth: int) -> None:
        """End this thread's spans down to ``depth``."""
        while len(self._open) > depth:
            self._open.pop()[1].__exit__(None, None, None)
