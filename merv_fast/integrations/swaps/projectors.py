"""The reference's projectors that pool by averaging: pooling and projection as one op."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor, nn

from merv_fast import ops
from merv_fast.integrations.swaps.findings import Finding, Refusal, Swap
from merv_fast.integrations.swaps.layers import Layers, find_layers, tensors_of

__all__ = ["Pooling", "find_projector", "pooling_of"]

OTHERS = {
    "num_query_tokens": "learned queries pool, which is PyTorch's attention already",
    "convolution_pooling": "convolutions pool, which are PyTorch's already",
}
"""An attribute that tells the reference's other resamplers, and why they are left as they are."""


@dataclass(frozen=True)
class Pooling:
    """What a projector does, as ``pool_project`` takes it."""

    layers: Layers
    out_grid: tuple[int, int]
    slots: int
    over_slots: bool

    def grid(self, x: Tensor) -> tuple[int, int]:
        """The square grid of tokens of ``x`` [B, T, N, C], which must fit."""
        fits = x.ndim == 4 and (self.over_slots or x.shape[1] == self.slots)
        side = isqrt(x.shape[2]) if fits else 0
        if not fits or side * side != x.shape[2]:
            slots = "T" if self.over_slots else self.slots
            raise ValueError(f"projector: x must be [B, {slots}, a square number, C], got {list(x.shape)}")
        return side, side

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [B, T, N, C] to [B, slots * h * w, D]."""
        slots = self.slots if self.over_slots else None
        if not self.layers:
            return ops.pool_tokens(x, self.grid(x), self.out_grid, slots).flatten(1, 2)
        return ops.pool_project(x, *tensors_of(self.layers), self.grid(x), self.out_grid, slots)


def pooling_of(module: Any) -> Pooling | str | None:
    """How ``module`` pools and projects; why it cannot be said; None of a module of another kind.

    Of the kind are the reference's ``AveragePoolingProjector`` and ``AveragePooling3DProjector``: an adaptive average
    pooling and a ``projector``, and how many frames come out.
    """
    children: dict[str, Any] = dict(module.named_children())
    mlp = children.pop("projector", None)
    if mlp is None or len(children) != 1 or not hasattr(module, "output_frames"):
        return None
    (pool,) = children.values()
    if not isinstance(pool, (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)):
        return None
    layers = find_layers(mlp)
    if isinstance(layers, str):
        return layers
    size: Any = pool.output_size
    if not isinstance(size, tuple) or None in size:
        return f"it pools to {size} instead of a size for each dimension"
    return Pooling(layers, size[-2:], size[0] if len(size) == 3 else module.output_frames, len(size) == 3)


def find_projector(module: nn.Module) -> Finding | None:
    """The swap of a projector that averages; a refusal of the reference's other resamplers."""
    for attribute, why in OTHERS.items():
        if hasattr(module, attribute) and hasattr(module, "output_frames"):
            return Refusal(why)
    pooling = pooling_of(module)
    if pooling is None:
        return None
    if isinstance(pooling, str):
        return Refusal(pooling)
    rows, columns = pooling.out_grid
    op = "pool_project" if pooling.layers else "pool_tokens"
    return Swap(project, op, f"averages to {rows}x{columns} tokens, {len(pooling.layers)} linear layer(s)")


def project(module: nn.Module, x: Tensor) -> Tensor:
    """What the module computes, from the layers that it has now."""
    pooling = pooling_of(module)
    if not isinstance(pooling, Pooling):
        raise RuntimeError(f"projector: must still be the one that was accelerated, got {module}")
    return pooling(x)
