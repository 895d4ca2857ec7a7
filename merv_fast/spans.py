"""Named ranges for profilers, below every layer, so that each can name what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.autograd import profiler

__all__ = ["PREFIX", "nvtx_ranges", "span"]

PREFIX = "merv/"

_NOTHING = nullcontext()
_nvtx = False


def span(name: str) -> AbstractContextManager[None]:
    """A range ``merv/<name>`` around the block: in ``torch.profiler`` while one runs, in NVTX within `nvtx_ranges`.

    Otherwise, and where ``torch.compile`` traces, it is one shared object that does nothing.

    >>> with torch.profiler.profile() as profile, span("fuse"):
    ...     _ = torch.ones(2).sum()
    >>> "merv/fuse" in {event.key for event in profile.key_averages()}
    True
    """
    # First, so that a traced caller does not depend on the rest and is not compiled again for a profiler.
    if torch.compiler.is_dynamo_compiling() or not (profiler._is_profiler_enabled or _nvtx):
        return _NOTHING
    return _recorded(PREFIX + name)


@contextmanager
def nvtx_ranges() -> Iterator[None]:
    """Let each `span` of the process, whatever its thread, also be an NVTX range; for Nsight Systems and the like.

    Raises:
        RuntimeError: PyTorch was built without NVTX (from the first `span`).
    """
    global _nvtx
    outer, _nvtx = _nvtx, True
    try:
        yield
    finally:
        _nvtx = outer


@contextmanager
def _recorded(name: str) -> Iterator[None]:
    marked = _nvtx
    if marked:
        torch.cuda.nvtx.range_push(name)
    try:
        with profiler.record_function(name) if profiler._is_profiler_enabled else _NOTHING:
            yield
    finally:
        if marked:
            torch.cuda.nvtx.range_pop()
