"""Keep autocast out of an op: it would change the dtypes that the op's contract promises."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["outside_autocast", "without_autocast"]


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast is off for the device of ``tensor``; none is entered where it is off already."""
    kind = tensor.device.type
    # A device without autocast, such as meta, may not even be asked.
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The ``backward(ctx, grad, ...)`` of an op, unchanged where it is called inside autocast."""

    @wraps(backward)
    def run(ctx: Any, grad: Tensor, *grads: Tensor) -> Any:
        with without_autocast(grad):
            return backward(ctx, grad, *grads)

    return run
