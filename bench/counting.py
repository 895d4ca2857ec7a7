"""What a call multiplies, counted on the ``meta`` device: nothing is computed, however large the model.

The formulas are those of torch.utils.flop_counter, read as MACs (a multiplication and its addition are one). An op of
merv_fast is counted as the products of its reference, which is its definition, so no formula for it could be wrong.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import Any, Self

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Count", "count", "parameters"]

aten = torch.ops.aten
LINEAR = {aten.mm, aten.addmm, aten.mv, aten.dot, aten.convolution}
POOLING = {aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d}
VECTORS: dict[Any, Callable[..., int]] = {
    aten.mv: lambda a, b, out_val: 2 * prod(a.shape),
    aten.dot: lambda a, b, out_val: 2 * prod(a.shape),
}
"""FLOPs of products with a vector, for which PyTorch has no formula."""
PRODUCT = re.compile("mm$|mv$|dot$|conv|attention|einsum|addr$")
"""Names of what multiplies."""


@dataclass(frozen=True)
class Count:
    """What a call needs.

    ``linear``: MACs of products with weights, of linear layers and convolutions. ``attention``: MACs of batched
    products, of activations with activations. ``pooled``: elements that adaptive average pooling reads.
    """

    linear: int = 0
    attention: int = 0
    pooled: int = 0

    @property
    def macs(self) -> int:
        """All products."""
        return self.linear + self.attention

    def __add__(self, other: Self) -> "Count":
        return Count(self.linear + other.linear, self.attention + other.attention, self.pooled + other.pooled)

    def __mul__(self, share: float) -> "Count":
        return Count(round(self.linear * share), round(self.attention * share), round(self.pooled * share))

    def __sub__(self, other: Self) -> "Count":
        return Count(self.linear - other.linear, self.attention - other.attention, self.pooled - other.pooled)


def count(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Count]:
    """The result of ``call(*args, **kwargs)``, and what it needed.

    Raises ``RuntimeError`` for a product that there is no formula for.
    """
    counter = _Counter()
    # Of all ways of attention, this one is made of products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        out = call(*args, **kwargs)
    return out, Count(counter.linear // 2, counter.attention // 2, counter.pooled)


def parameters(module: nn.Module) -> int:
    """Numbers that ``module`` learns."""
    return sum(parameter.numel() for parameter in module.parameters())


class _Counter(TorchDispatchMode):
    """Adds up the FLOPs of what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = self.attention = self.pooled = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, op = kwargs or {}, func.overloadpacket
        if func.namespace == "merv_fast":
            # What serves the op on meta makes a shape and no products.
            with self:
                return import_module(f"merv_fast.ops.{op.__name__}").reference(*args, **kwargs)
        formula = flop_registry.get(op) or VECTORS.get(op)
        if formula is None:
            # Called from a reference, what is made of other ops arrives whole.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            if PRODUCT.search(op.__name__):
                raise RuntimeError(f"count: every product must have a formula, got {func}")
        out = func(*args, **kwargs)
        if op in POOLING:
            self.pooled += args[0].numel()
        elif formula and op in LINEAR:
            self.linear += formula(*args, **kwargs, out_val=out)
        elif formula:
            self.attention += formula(*args, **kwargs, out_val=out)
        return out
