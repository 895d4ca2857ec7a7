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
    what is computed then has no value yet, and what was computed before may be gone when the graph is replayed.
    Nor on another CUDA stream, which has not waited for what was computed.

    Attributes:
        captured: whether this was a moment of a capture.

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
        self.captured = _capturing()
        self.counts = None if self.captured else _counts(tensors)
        self.stream = _stream(tensors)

    def same(self, tensors: Sequence[Tensor], in_capture: bool = False) -> bool:
        """Whether ``tensors`` are those, in the same memory, and have not been written to since.

        With ``in_capture`` also while a graph is captured: what was computed is then kept for it.
        """
        return (
            (in_capture or not _capturing())
            and self.stream == _stream(tensors)
            and len(tensors) == len(self.tensors)
            and all(mine() is tensor for mine, tensor in zip(self.tensors, tensors, strict=True))
            and self.unchanged()
        )

    def unchanged(self) -> bool:
        """Whether all of them are still there, in the same memory, and have not been written to since."""
        tensors = [tensor for mine in self.tensors if (tensor := mine()) is not None]
        return self.counts is not None and self.counts == _counts(tensors)


def _capturing() -> bool:
    return torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()


def _stream(tensors: Sequence[Tensor]) -> int | None:
    """The stream on which work with the tensors is done now; None on a CPU."""
    gpu = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    return None if gpu is None else torch.cuda.current_stream(gpu).cuda_stream


def _counts(tensors: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference() for tensor in tensors):
        return None
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]
