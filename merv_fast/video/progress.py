"""A sign of life from a decoder to whoever waits for it in another process."""

from typing import Any

__all__ = ["show_progress_in", "tick"]

_counter: Any = None


def tick() -> None:
    """Count one step; a worker of `VideoLoader` that does not do so for its ``timeout`` is given up."""
    if _counter is not None:
        _counter.value += 1


def show_progress_in(counter: Any) -> None:
    """Let `tick` count in ``counter.value``, an integer that another process reads; None for nowhere."""
    global _counter
    _counter = counter
