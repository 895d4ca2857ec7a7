"""A file that one process writes to at a time."""

from __future__ import annotations

import fcntl

__all__ = ["lock"]


def lock(handle: int, otherwise: str) -> None:
    """Keep an open file for this process; the lock goes when the file is closed, if only by the end of the process.

    Raises:
        RuntimeError: another process has it; ``otherwise`` is the message.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RuntimeError(otherwise) from error
