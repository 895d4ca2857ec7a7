"""Whether a module is still what it was when something was made of it, found out in a fraction of a millisecond."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import chain

import torch
from torch import Tensor, nn

from merv_fast.modules.attention import HeadAttention

__all__ = ["Parts"]

PLAIN = (Tensor, nn.Parameter)


class Parts:
    """The parts of a module and where their weights are, as they are now.

    Args:
        module: whose parameters, buffers and modules are looked at.

    Attributes:
        device: of its first parameter or buffer, or the CPU.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> parts = Parts(layer)
        >>> before = parts.state()
        >>> _ = layer.weight.data.zero_()
        >>> parts.state() == before
        True
        >>> _ = layer.double()
        >>> parts.state() == before
        False
    """

    def __init__(self, module: nn.Module) -> None:
        # Walking the tree at every call would take three times as long as looking into what it consists of.
        self._parts = list(module.modules())
        self._weights = [held for part in self._parts for held in (part._parameters, part._buffers)]
        self._children = [part._modules for part in self._parts if part._modules]
        self._hooks = [hooks for part in self._parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._attention = [part for part in self._parts if isinstance(part, HeadAttention)]
        self._devices = {tensor.device for held in self._weights for tensor in held.values() if tensor is not None}
        self.device = next(iter(sorted(self._devices, key=str)), torch.device("cpu"))

    def state(self) -> Hashable:
        """Equal as long as weights are in the same memory, and parts, modes, hooks and attention are the same."""
        tensors = [tensor for held in self._weights for tensor in held.values() if tensor is not None]
        return (
            tuple([tensor.data_ptr() if type(tensor) in PLAIN else id(tensor) for tensor in tensors]),
            # Memory may have been given back and be had again.
            tuple([tensor.dtype for tensor in tensors]),
            tuple(map(id, chain.from_iterable(held.values() for held in self._children))),
            tuple([part.training for part in self._parts]),
            any(self._hooks),
            tuple([part.backend for part in self._attention]),
        )

    def obstacle(self, serves: Callable[[torch.device], bool]) -> str | None:
        """Why calls of the module, as it is, cannot be captured in a CUDA graph, as far as it can be told so."""
        if not self._devices:
            return "there are no weights, by which to tell the device"
        if len(self._devices) > 1:
            names = " and ".join(sorted(map(str, self._devices)))
            return f"weights are on {names}, and a graph is captured on one GPU"
        if not serves(self.device):
            return f"weights are on {self.device}, which has no CUDA graphs"
        tensors = [tensor for held in self._weights for tensor in held.values() if tensor is not None]
        if others := sorted({type(tensor).__name__ for tensor in tensors} - {kind.__name__ for kind in PLAIN}):
            return f"weights are {' and '.join(others)}, whose memory cannot be told"
        if any(part.training for part in self._parts):
            return "the module is in training mode"
        if any(self._hooks):
            return "modules have forward hooks, which a replay would not call"
        return None
