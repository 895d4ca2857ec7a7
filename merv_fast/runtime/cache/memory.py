"""Tensors by key in memory, of which the least recently used leave first."""

from collections import OrderedDict
from threading import Lock

from torch import Tensor

__all__ = ["MemoryTier", "Tensors", "size_of"]

Tensors = dict[str, Tensor]
"""One entry."""


class MemoryTier:
    """At most ``max_bytes`` of tensors, the least recently used leaving first; safe under threads.

    An entry larger than that is not kept. What is put in must not be written to afterwards.

    >>> import torch
    >>> tier = MemoryTier(max_bytes=8)
    >>> for key in ("a", "b", "c"):
    ...     tier.put(key, {"x": torch.zeros(1)})
    >>> tier.get("a"), tier.nbytes
    (None, 8)
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._entries: OrderedDict[str, Tensors] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Tensors | None:
        """The entry itself, now the most recently used, or None."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: str, tensors: Tensors) -> None:
        """Keep ``tensors`` under ``key``, in place of what was there."""
        size = size_of(tensors)
        with self._lock:
            if (old := self._entries.pop(key, None)) is not None:
                self.nbytes -= size_of(old)
            if size > self.max_bytes:
                return
            # Room first, so that the bound holds at every moment.
            while self.nbytes + size > self.max_bytes:
                self.nbytes -= size_of(self._entries.popitem(last=False)[1])
            self._entries[key] = tensors
            self.nbytes += size

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0


def size_of(tensors: Tensors) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.nbytes for tensor in tensors.values())
