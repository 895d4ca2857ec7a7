"""A decoder's steps: a sign of life to whoever waits in another process, and where a time limit is looked at."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any

from merv_fast.errors import VideoError

__all__ = ["show_progress_in", "tick", "time_limit"]

_counter: Any = None
_limit: ContextVar[tuple[float, str, float] | None] = ContextVar("limit", default=None)


def tick() -> None:
    """Count one step; a worker of `VideoLoader` that does not do so for its ``timeout`` is given up.

    Raises:
        VideoError: The time of an enclosing `time_limit` is over.
    """
    if _counter is not None:
        _counter.value += 1
    if (limit := _limit.get()) is not None and monotonic() > limit[0]:
        _, path, seconds = limit
        raise VideoError(path, f"took longer than {seconds:g} s to decode (VideoLimits.max_decode_seconds)")


@contextmanager
def time_limit(path: str, seconds: float) -> Iterator[None]:
    """Let `tick` raise after so many seconds; not longer than an enclosing limit allows."""
    outer, end = _limit.get(), monotonic() + seconds
    token = _limit.set(outer if outer and outer[0] < end else (end, path, seconds))
    try:
        yield
    finally:
        _limit.reset(token)


def show_progress_in(counter: Any) -> None:
    """Let `tick` count in ``counter.value``, an integer that another process reads; None for nowhere."""
    global _counter
    _counter = counter
