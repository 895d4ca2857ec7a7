"""A tensor that is computed when somebody looks at its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["Deferred"]

DESCRIPTIONS = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")
) | {Tensor.size, Tensor.dim, Tensor.__len__, Tensor.is_floating_point}
"""What can be told without the values."""


class Deferred(Tensor):
    """Stands for ``make()``, which runs at the first use of the values, and once.

    Every function of PyTorch takes it for the tensor that it stands for. So the code between a module that returns one
    and a module that knows how to do without its values need not know of either.

    Args:
        make: computes the tensor.
        shape: of that tensor.
        like: gives dtype and device.
        made_of: for those who can do without the values: what ``make`` would compute them from.
    """

    make: Callable[[], Tensor]
    made: Tensor | None
    made_of: Any

    @staticmethod
    def __new__(  # noqa: D102
        cls, make: Callable[[], Tensor], shape: Sequence[int], like: Tensor, made_of: Any = None
    ) -> Deferred:
        self = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=like.dtype, device=like.device)
        self.make, self.made, self.made_of = make, None, made_of
        return self

    def tensor(self) -> Tensor:
        """The tensor that this one stands for."""
        if self.made is None:
            self.made = self.make()
        return self.made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in DESCRIPTIONS and all(each.made is None for each in args if isinstance(each, Deferred)):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        args, kwargs = tree_map_only(Deferred, Deferred.tensor, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Where PyTorch itself sets `__torch_function__` aside.
        args, kwargs = tree_map_only(Deferred, Deferred.tensor, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)
