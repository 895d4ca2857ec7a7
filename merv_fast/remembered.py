"""What is computed from weights alone, kept until they are written to; a CUDA graph may read it as a constant."""

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar, Token
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from merv_fast.versions import Versions

__all__ = ["Constants", "Remembered"]

_CONSTANTS: ContextVar["Constants | None"] = ContextVar("constants", default=None)


class Flag:
    """Up until the owner's results are to be forgotten, of which there may be one a stream or dtype."""

    up = True


class Entry:
    """A result, and the tensors it was computed from as they were before that."""

    def __init__(self, versions: Versions, result: Any, tag: Hashable, flag: Flag) -> None:
        self.versions, self.result, self.tag, self.flag = versions, result, tag, flag

    def holds(self) -> bool:
        return self.flag.up and self.versions.unchanged()


class Remembered:
    """Results by owner, a module or a tensor, each as long as the owner lives and the tensors are what they were.

    >>> import torch
    >>> weight, doubled = torch.ones(2), Remembered()
    >>> first = doubled.get(weight, [weight], lambda: 2 * weight)
    >>> doubled.get(weight, [weight], lambda: 2 * weight) is first
    True
    >>> _ = weight.mul_(3)
    >>> doubled.get(weight, [weight], lambda: 2 * weight)
    tensor([6., 6.])
    """

    def __init__(self) -> None:
        # By identity, as tensors compare elementwise.
        self._entries = WeakIdKeyDictionary()

    def get(self, owner: Any, tensors: Sequence[Tensor], compute: Callable[[], Any], tag: Hashable = None) -> Any:
        """``compute()``, or what it gave before for the same tensors and an equal ``tag``."""
        constants, entry = _CONSTANTS.get(), self._entries.get(owner)
        known = entry is not None and entry.tag == tag
        if not known or not entry.versions.same(tensors, in_capture=constants is not None):
            # In this order: what another thread writes meanwhile makes the result one of the past.
            versions, result = Versions(tensors), compute()
            entry = self._entries[owner] = Entry(versions, result, tag, entry.flag if entry else Flag())
        if constants is not None:
            constants.add(entry)
        return entry.result

    def forget(self, owner: Any) -> None:
        """Compute anew for ``owner``, also where a graph took what there was for a constant."""
        entry = self._entries.pop(owner, None)
        if entry is not None:
            entry.flag.up = False


class Constants:
    """While a graph is captured: what has been computed from weights is read there, not computed again by every replay.

    Without it a captured call computes all from the weights of the replay's time. With it, the call must run once in
    this scope, on the stream of the capture, before it is captured there, and a graph may be replayed as long as
    `hold` and this object lives.

    >>> import torch
    >>> weight, doubled, constants = torch.ones(2), Remembered(), Constants()
    >>> with constants:
    ...     result = doubled.get(weight, [weight], lambda: 2 * weight)
    >>> constants.hold()
    True
    >>> _ = weight.mul_(3)
    >>> constants.hold()
    False
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._outer: Token | None = None

    def __enter__(self) -> "Constants":
        self._outer = _CONSTANTS.set(self)
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._outer is not None
        _CONSTANTS.reset(self._outer)

    def add(self, entry: Entry) -> None:
        """Keep what is read, unless it is made inside of the capture: every replay then makes it anew."""
        if not entry.versions.captured and not any(entry is known for known in self._entries):
            self._entries.append(entry)

    def hold(self) -> bool:
        """Whether every weight is what it was."""
        return all(entry.holds() for entry in self._entries)
