"""Tell whether tensors have been written to, so that what was computed from them can be kept until then."""

from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor, nn

__all__ = ["Versions"]


class Versions:
    """The state of some tensors at one moment.

    PyTorch counts every in-place write to a tensor, an optimiser's step and ``load_state_dict`` among them. It
    does not count writes through ``tensor.data``, and counts none for tensors made in inference mode: with one
    of those, or one of a subclass, the state is never the same again. Nor is it while a CUDA graph is captured:
    what is computed then has no value yet.

    >>> import torch
    >>> weight = torch.ones(2)
    >>> versions = Versions([weight])
    >>> versions.same([weight])
    True
    >>> _ = weight.mul_(2)
    >>> versions.same([weight])
    False
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [ref(tensor) for tensor in tensors]
        capturing = torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()
        self.counts = None if capturing else _counts(tensors)

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are those, in the same memory, and have not been written to since."""
        return (
            self.counts is not None
            and len(tensors) == len(self.tensors)
            and all(mine() is tensor for mine, tensor in zip(self.tensors, tensors, strict=True))
            and self.counts == _counts(tensors)
        )


def _counts(tensors: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference() for tensor in tensors):
        return None
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]
