"""Keep autocast out of an op: it would change the dtypes that the op's contract promises."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["without_autocast"]


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast is off for the device of ``tensor``; none is entered where it is off already."""
    kind = tensor.device.type
    # A device without autocast, such as meta, may not even be asked.
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()
