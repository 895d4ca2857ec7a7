"""A batch in parts that fit into memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["in_chunks"]

logger = logging.getLogger("merv_fast")


def in_chunks(call: Callable[[list[Tensor]], list[Tensor]], inputs: Sequence[Tensor], size: int) -> list[Tensor]:
    """``call(inputs)`` for so many rows of the batch at a time, joined.

    If memory runs out, once, half as many rows at a time do the rest, and a warning says so.

    Args:
        call: from tensors ``[b, ...]`` to tensors ``[b, ...]``.
        inputs: tensors ``[B, ...]``.
        size: at least 1.

    Raises:
        ValueError: ``size`` is not positive.
        torch.OutOfMemoryError: one row does not fit, or half as many neither.
    """
    if size < 1:
        raise ValueError(f"in_chunks: size must be at least 1, got {size}")
    batch, start, halved = len(inputs[0]), 0, False
    parts: list[list[Tensor]] = []
    while start < batch or not parts:
        rows = min(size, batch - start)
        part = [x[start : start + rows] for x in inputs] if rows < batch else list(inputs)
        try:
            parts.append(call(part))
            start += rows
            continue
        except torch.OutOfMemoryError as error:
            if halved or rows < 2:
                raise
            reason = str(error).partition("\n")[0]
        # Here the error, which held what had been computed, is gone.
        size, halved = rows // 2, True
        logger.warning("out of memory with %d videos at a time, going on with %d (%s)", rows, size, reason)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return parts[0] if len(parts) == 1 else [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
